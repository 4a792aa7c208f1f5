"""AdamW (Loshchilov & Hutter 2019) as torch has it, and its next update as a meta step sees it: exactly.

With g the gradient, m and s the running means of g and g² before this step t, and all operations by element:

    m' = β₁m + (1−β₁)g    s' = β₂s + (1−β₂)g²    u(g) = m̂ / (√ŝ + ε),  m̂ = m'/(1−β₁ᵗ),  ŝ = s'/(1−β₂ᵗ)
    θ' = θ − α·(u(g) + w·θ)

so that θ' moves with g by −α·D, where D is diagonal, and holds the second moment's own dependence on g:

    D = (1−β₁)/(1−β₁ᵗ) / (√ŝ + ε)  −  m̂/(√ŝ + ε)² · (1−β₂)/(1−β₂ᵗ) · g/√ŝ

In the first step u is the sign of g, and D = ε/(|g| + ε)²: next to nothing but where |g| is of the size of ε. There it
is at most 1/ε, which is what bounds it in all steps, up to 1/(1−β₁ᵗ).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from training.engine.optimiser import DecayedDescent, TorchOptimiser, by_decay, everything


@dataclass(frozen=True)
class AdamWDescent(DecayedDescent):
    """Describe the next update of AdamW, without doing it."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # By parameter name, absent before step 1: running means of gradients and of their squares, and updates done.
    mean: Mapping[str, Tensor] = field(default_factory=dict)
    square: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Mapping[str, Tensor] = field(default_factory=dict)

    def look_ahead(
        self, values: Mapping[str, Tensor], gradients: Sequence[Tensor], rate: float, *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return θ − rate·(u(g) + weight decay), the optimiser's own next step; without momentum, β₁ is 0 in it."""
        ahead = {}
        for (name, value), gradient in zip(values.items(), gradients, strict=True):
            mean, _, root, _ = self._moments(name, gradient, momentum=momentum)
            decay = rate * self.weight_decay if name in self.decayed else 0.0
            ahead[name] = value * (1 - decay) - rate * mean / (root + self.eps)
        return ahead

    def pull_back(
        self, direction: Mapping[str, Tensor], gradients: Sequence[Tensor], *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return D·direction: D is diagonal."""
        pulled = {}
        for (name, value), gradient in zip(direction.items(), gradients, strict=True):
            mean, mean_slope, root, square_slope = self._moments(name, gradient, momentum=momentum)
            # d√ŝ/dg; where ŝ is 0, so is g, and m̂ with it: the term is none.
            root_slope = torch.where(root > 0, square_slope * gradient / torch.where(root > 0, root, 1), 0)
            pulled[name] = (mean_slope - mean * root_slope / (root + self.eps)) / (root + self.eps) * value
        return pulled

    def to(self, dtype: torch.dtype) -> AdamWDescent:
        """Return the same in another precision."""
        mean, square = ({name: one.to(dtype) for name, one in held.items()} for held in (self.mean, self.square))
        return replace(self, mean=mean, square=square)

    def _moments(self, name: str, gradient: Tensor, *, momentum: bool) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
        # m̂, dm̂/dg, √ŝ and ½·dŝ/dg divided by g. Counts of steps may be tensors on the device: a CUDA graph reads them.
        step = self.steps[name].double() + 1 if name in self.steps else torch.ones((), dtype=torch.float64)
        correction2 = 1 - self.beta2**step
        square = (1 - self.beta2) * gradient.square()
        if name in self.square:
            square = square + self.beta2 * self.square[name]
        square = square / correction2
        # The root's slope at 0 is infinite, and is multiplied by 0: autograd would make NaN of it.
        root = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
        if not momentum:
            return gradient, 1.0, root, (1 - self.beta2) / correction2
        correction1 = 1 - self.beta1**step
        mean = (1 - self.beta1) * gradient
        if name in self.mean:
            mean = mean + self.beta1 * self.mean[name]
        return mean / correction1, (1 - self.beta1) / correction1, root, (1 - self.beta2) / correction2


class AdamW(TorchOptimiser):
    """Update by AdamW, with decoupled weight decay, a model's parameters and those of its objective's memory."""

    def __init__(
        self,
        model: nn.Module,
        memory: nn.Module,
        *,
        momentum: float,
        weight_decay: float,
        decays: Callable[[nn.Module], frozenset[str]] = everything,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        """Begin without moments; `momentum` is β₁, and `decays` names the parameters that weight decay acts on."""
        self.model, self.weight_decay, self.decayed = model, weight_decay, decays(model)
        self.beta1, self.beta2, self.eps = momentum, beta2, eps
        groups = by_decay(model, memory, weight_decay, decays)
        on_gpu = any(value.is_cuda for value in model.parameters())  # then counts of steps are there too
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(momentum, beta2), eps=eps, capturable=on_gpu)

    def descent(self) -> AdamWDescent:
        """Return the next update as a meta step sees it."""
        held = {
            name: self.optimizer.state[value]
            for name, value in self.model.named_parameters()
            if value in self.optimizer.state
        }
        mean, square, steps = ({n: s[key] for n, s in held.items()} for key in ("exp_avg", "exp_avg_sq", "step"))
        return AdamWDescent(self.weight_decay, self.decayed, self.beta1, self.beta2, self.eps, mean, square, steps)
