"""What optimisers share, and SGD: its update, and the lookahead by which a meta step asks where the next would go.

Another optimiser is another file: an `Optimiser` such as `Sgd`, and a `Descent` of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.objectives.interface import Descent
from training.objectives.private_torch import foreach_add, foreach_add_


def everything(module: nn.Module) -> frozenset[str]:
    """Name all parameters: what weight decay acts on for WRN (docs/method.md, "Optimisation")."""
    return frozenset(name for name, _ in module.named_parameters())


def kernels(module: nn.Module) -> frozenset[str]:
    """Name the weights of convolutions and linear layers: what weight decay acts on for ResNet-29."""
    return frozenset(name for name, value in module.named_parameters() if value.dim() > 1)


class Optimiser(Protocol):
    """Update the parameters of a model and of its objective's memory."""

    def descent(self) -> Descent:
        """Return the next update as a meta step sees it, before the gradients of this step are there."""
        ...

    def update(self, lr: float) -> None:
        """Move all parameters by their gradients."""
        ...

    def zero_grad(self) -> None:
        """Forget all gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data: tensors, numbers and strings."""
        ...

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`; raises ValueError where it is of other parameters or groups."""
        ...


@dataclass(frozen=True)
class DecayedDescent(Descent):
    """See weight decay as every optimiser here has it: on some of the parameters."""

    weight_decay: float = 0.0
    decayed: frozenset[str] = frozenset()  # names of the parameters that weight decay acts on

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | float:
        """Return ½·decay·Σθ² of the values that weight decay acts on."""
        return self.weight_decay / 2 * sum(value.square().sum() for value in self._decayed(values).values())

    def add_penalty(self, gradients: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients with that of `penalty` at these values."""
        decayed = self._decayed(values)
        if not decayed:
            return dict(gradients)
        # Not in place: two parameters can have one and the same gradient.
        sums = foreach_add([gradients[name] for name in decayed], list(decayed.values()), alpha=self.weight_decay)
        return {**gradients, **dict(zip(decayed, sums, strict=True))}

    def _decayed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in values.items() if name in self.decayed}


@dataclass(frozen=True)
class SgdDescent(DecayedDescent):
    """Describe the next update of SGD with momentum and coupled weight decay, without doing it."""

    momentum: float = 0.9
    velocity: Mapping[str, Tensor] = field(default_factory=dict)  # by parameter name; absent before step 1

    def look_ahead(
        self, values: Mapping[str, Tensor], gradients: Sequence[Tensor], rate: float, *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return θ − rate·(μ·m + gradient + weight decay), the optimiser's own next step (step 4)."""
        ahead = super().look_ahead(values, gradients, rate)
        _add(ahead, self._decayed(values), -rate * self.weight_decay)
        if momentum:
            _add(ahead, self.velocity, -rate * self.momentum)
        return ahead

    def to(self, dtype: torch.dtype) -> SgdDescent:
        """Return the same in another precision."""
        return replace(self, velocity={name: value.to(dtype) for name, value in self.velocity.items()})


@dataclass(frozen=True)
class WrappedDescent(Descent):
    """See what stands around another optimiser's next update; here it changes nothing."""

    inner: Descent

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | float:
        """Return what weight decay adds to a loss at these values."""
        return self.inner.penalty(values)

    def add_penalty(self, gradients: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients with that of `penalty` at these values."""
        return self.inner.add_penalty(gradients, values)

    def to(self, dtype: torch.dtype) -> Descent:
        """Return the same in another precision."""
        return replace(self, inner=self.inner.to(dtype))


class Wrapped:
    """Stand around another optimiser; here it changes nothing."""

    def __init__(self, inner: Optimiser) -> None:
        """Wrap `inner`."""
        self.inner = inner

    def descent(self) -> Descent:
        """Return the next update as a meta step sees it."""
        return self.inner.descent()

    def update(self, lr: float) -> None:
        """Move all parameters by their gradients."""
        self.inner.update(lr)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.inner.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimiser's state as plain data."""
        return self.inner.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`; raises ValueError where it is of other parameters or groups."""
        self.inner.load_state_dict(saved)


class TorchOptimiser(ABC):
    """Update by an optimiser of torch's, which holds the state."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def descent(self) -> Descent:
        """Return the next update as a meta step sees it."""

    def update(self, lr: float) -> None:
        """Move all parameters by their gradients, at the learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return self.optimizer.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`; raises ValueError where it is of other parameters or groups."""
        self.optimizer.load_state_dict(saved)


class Sgd(TorchOptimiser):
    """Update by SGD with momentum and coupled weight decay a model's parameters and those of its objective's memory."""

    def __init__(
        self,
        model: nn.Module,
        memory: nn.Module,
        *,
        momentum: float,
        weight_decay: float,
        decays: Callable[[nn.Module], frozenset[str]] = everything,
    ) -> None:
        """Begin without velocity; `decays` names the parameters of a module that weight decay acts on."""
        self.model, self.momentum, self.weight_decay, self.decayed = model, momentum, weight_decay, decays(model)
        self.optimizer = torch.optim.SGD(by_decay(model, memory, weight_decay, decays), lr=0.0, momentum=momentum)

    def descent(self) -> SgdDescent:
        """Return the next update as a meta step sees it."""
        velocity = {}
        for name, value in self.model.named_parameters():
            buffer = self.optimizer.state.get(value, {}).get("momentum_buffer")
            if buffer is not None:
                velocity[name] = buffer
        return SgdDescent(
            weight_decay=self.weight_decay, decayed=self.decayed, momentum=self.momentum, velocity=velocity
        )


def by_decay(
    model: nn.Module, memory: nn.Module, weight_decay: float, decays: Callable[[nn.Module], frozenset[str]]
) -> list[dict[str, Any]]:
    """Return the groups of parameters as torch's optimisers take them: those that weight decay acts on, then others."""
    held = [(dict(module.named_parameters()), decays(module)) for module in (model, memory)]
    decay = [value for values, names in held for name, value in values.items() if name in names]
    other = [value for values, names in held for name, value in values.items() if name not in names]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _add(values: Mapping[str, Tensor], others: Mapping[str, Tensor], factor: float) -> None:
    # values += factor·others, where there is another; in a few kernels, however many tensors.
    both = [name for name in values if name in others]
    if both:
        foreach_add_([values[name] for name in both], [others[name] for name in both], alpha=factor)
