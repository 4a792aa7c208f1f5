"""How far each layer moves: rates that fall from the last layer to the first, and layers that do not move at first.

Both wrap an optimiser and its lookahead. With s the factor of a layer's rate, 0 where it is frozen, its parameters move
with its gradients by −rate·s·D instead of −rate·D.

Shapes: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.engine.optimiser import Optimiser, TorchOptimiser, Wrapped, WrappedDescent
from training.engine.passes.stand_in import unwrapped
from training.engine.pretrained import last_layer
from training.objectives.interface import Descent
from training.objectives.private_torch import BatchNorm


def scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return each parameter's factor of the rate, by name: decay to the power of the layers that stand behind it.

    What counts as a layer timm says of each of its networks (its own `param_groups_layer_decay`; Clark et al. 2020,
    Bao et al. 2022). Raises ValueError for a network that is not of timm.
    """
    from timm.optim import param_groups_layer_decay  # several seconds to import

    network = unwrapped(model)
    if not hasattr(network, "group_matcher"):
        raise ValueError("layer_decay wants a network of timm, which knows its layers: leave it at 1")
    groups = param_groups_layer_decay(network, layer_decay=decay)
    of_value = {value: group["lr_scale"] for group in groups for value in group["params"]}
    return {name: of_value[value] for name, value in model.named_parameters()}


@dataclass(frozen=True)
class ScaledDescent(WrappedDescent):
    """Describe the next update of an optimiser whose rate differs from layer to layer, without doing it."""

    scales: Mapping[str, float]  # by parameter name

    def look_ahead(
        self, values: Mapping[str, Tensor], gradients: Sequence[Tensor], rate: float, *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return where the next update goes, each layer at its own rate."""
        gradient_of = dict(zip(values, gradients, strict=True))
        ahead: dict[str, Tensor] = {}
        for scale in dict.fromkeys(self.scales[name] for name in values):
            some = {name: value for name, value in values.items() if self.scales[name] == scale}
            ahead |= self.inner.look_ahead(some, [gradient_of[n] for n in some], rate * scale, momentum=momentum)
        return {name: ahead[name] for name in values}

    def pull_back(
        self, direction: Mapping[str, Tensor], gradients: Sequence[Tensor], *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return S·Dᵀ·direction, D of the inner optimiser and S diagonal."""
        pulled = self.inner.pull_back(direction, gradients, momentum=momentum)
        return {name: self.scales[name] * value for name, value in pulled.items()}


class Scaled(Wrapped):
    """Let an optimiser update each layer at its own multiple of the rate."""

    def __init__(self, inner: TorchOptimiser, model: nn.Module, factors: Mapping[str, float]) -> None:
        """Wrap `inner`; `factors` are by the names of the model's parameters, all others have 1."""
        super().__init__(inner)
        self.factors = factors
        of_value = {value: factors[name] for name, value in model.named_parameters()}
        inner.optimizer.param_groups = [
            {**group, "params": [v for v in group["params"] if of_value.get(v, 1.0) == factor], "lr_scale": factor}
            for group in inner.optimizer.param_groups
            for factor in dict.fromkeys(of_value.get(value, 1.0) for value in group["params"])
        ]

    def descent(self) -> ScaledDescent:
        """Return the next update as a meta step sees it."""
        return ScaledDescent(self.inner.descent(), self.factors)


@dataclass(frozen=True)
class FrozenDescent(WrappedDescent):
    """Describe the next update of an optimiser that moves some parameters only, without doing it."""

    frozen: frozenset[str]

    def look_ahead(
        self, values: Mapping[str, Tensor], gradients: Sequence[Tensor], rate: float, *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return where the next update goes; what is frozen stays."""
        moving = {name: value for name, value in values.items() if name not in self.frozen}
        return {**values, **self.inner.look_ahead(moving, self._of(moving, values, gradients), rate, momentum=momentum)}

    def pull_back(
        self, direction: Mapping[str, Tensor], gradients: Sequence[Tensor], *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return Dᵀ·direction, 0 where parameters are frozen."""
        moving = {name: value for name, value in direction.items() if name not in self.frozen}
        pulled = self.inner.pull_back(moving, self._of(moving, direction, gradients), momentum=momentum)
        return {name: pulled.get(name, torch.zeros_like(value)) for name, value in direction.items()}

    @staticmethod
    def _of(moving: Mapping[str, Tensor], all_of: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        return [gradient for name, gradient in zip(all_of, gradients, strict=True) if name in moving]


class Frozen(Wrapped):
    """Keep all of a network but its last layer as it is, for some steps; then let the optimiser have all.

    Batch norm is in eval mode as long, and its statistics stay: those of small batches give other features.
    """

    def __init__(self, inner: Optimiser, model: nn.Module, classes: int, steps: int) -> None:
        """Wrap `inner`, whatever optimiser it is, for `steps` updates; 0: for all."""
        super().__init__(inner)
        network = unwrapped(model)
        head = last_layer(network, classes)
        self.backbone = {name: value for name, value in model.named_parameters() if name not in head}
        self.norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
        self.steps, self.done = steps, 0

    @property
    def active(self) -> bool:
        """Tell whether the next update is one of those that move the last layer alone."""
        return not self.steps or self.done < self.steps

    def descent(self) -> Descent:
        """Return the next update as a meta step sees it."""
        descent = self.inner.descent()
        return FrozenDescent(descent, frozenset(self.backbone)) if self.active else descent

    def zero_grad(self) -> None:
        """Forget all gradients, as every step does before its passes, and set batch norm to the mode of this one."""
        for module in self.norms:
            module.train(not self.active)
        self.inner.zero_grad()

    def update(self, lr: float) -> None:
        """Move what is not frozen by its gradients."""
        if self.active:
            for value in self.backbone.values():
                value.grad = None
        self.inner.update(lr)
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimiser's state and the number of updates done, as plain data."""
        return {"inner": self.inner.state_dict(), "done": self.done}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`; raises ValueError where it is of other parameters or groups."""
        self.inner.load_state_dict(saved["inner"])
        self.done = int(saved["done"])
