"""Everything that changes while training: model, moving average, the objective's memory, optimiser, step counter.

All of it goes to a plain dict and back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.engine.optimiser import Optimiser
from training.objectives.private_torch import foreach_lerp_


class TrainState:
    """Hold a model in training, its objective's memory and the optimiser of both."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: Optimiser,
        *,
        average: bool,
        memory: nn.Module | None = None,
        average_decay: float = 0.999,
    ) -> None:
        """Begin at step 0; with `average`, keep a moving average of the model's parameters, with `average_decay`."""
        self.model, self.optimiser, self.memory = model, optimiser, nn.Module() if memory is None else memory
        parameters = model.named_parameters()
        self.averaged = {name: value.detach().clone() for name, value in parameters} if average else {}
        self.average_decay = average_decay
        self.step = 0  # updates done

    def trained(self) -> list[nn.Parameter]:
        """Return all that the optimiser updates: the parameters of the model, then of the memory."""
        return [*self.model.parameters(), *self.memory.parameters()]

    def apply_gradients(self, lr: float) -> None:
        """Update at `lr`, then the moving average with decay min(`average_decay`, (1+t)/(10+t)) (docs/method.md,
        step 8).
        """
        self.optimiser.update(lr)
        if self.averaged:
            decay = min(self.average_decay, (1 + self.step) / (10 + self.step))
            live = [value.detach() for value in self.model.parameters()]
            foreach_lerp_(list(self.averaged.values()), live, 1 - decay)
        self.step += 1

    def finite(self) -> bool:
        """Tell whether no parameter is NaN or infinite; one host sync."""
        return all(bool(torch.isfinite(value).all()) for value in self.trained())

    def predict(self, image_BCHW: Tensor) -> Tensor:
        """Return logits, B×K, in eval mode, of the averaged parameters (where kept) and live batch-norm statistics."""
        self.model.eval()
        with torch.no_grad():
            logits_BK = functional_call(self.model, self.averaged, (image_BCHW,))
        self.model.train()
        return logits_BK

    def inference_weights(self) -> dict[str, Tensor]:
        """Return what `predict` uses, as one state dict for the model alone."""
        return {**self.model.state_dict(), **self.averaged}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Start from another run's `inference_weights`, averaged parameters included; all else stays as it is.

        Raises ValueError where they are of another network.
        """
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"the weights to start from do not fit this network ({first})") from error
        for name, value in self.averaged.items():
            value.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and strings only, so that `torch.load(weights_only=True)` reads them back."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "memory": self.memory.state_dict(),
            "optimizer": self.optimiser.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`; raises ValueError where the checkpoint is of another network or recipe."""
        try:
            self.model.load_state_dict(saved["model"])
            self.memory.load_state_dict(saved["memory"])
            self.optimiser.load_state_dict(saved["optimizer"])
            if saved["averaged"].keys() != self.averaged.keys():
                raise ValueError("one keeps averaged parameters, the other does not")
            for name, value in saved["averaged"].items():
                self.averaged[name].copy_(value)
            self.step = int(saved["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"the checkpoint does not fit this recipe ({first}): use another name or storage"
            ) from error
