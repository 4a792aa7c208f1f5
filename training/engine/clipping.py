"""Gradients no longer than a norm, before any optimiser takes them; and the lookahead through that.

A gradient g over all parameters becomes c·g, with c = min(1, r/(|g| + 10⁻⁶)) as torch has it. Where c < 1 it moves with
g by c·I − (c/(|g| + 10⁻⁶))·g·gᵀ/|g|: a term of rank one, which pulls a direction back exactly too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.engine.optimiser import Optimiser, Wrapped, WrappedDescent

SMALL = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class ClippedDescent(WrappedDescent):
    """Describe the next update of an optimiser whose gradients are clipped, without doing it.

    The norm is that of the gradients that are given: of the parameters that the lookahead moves.
    """

    norm: float

    def look_ahead(
        self, values: Mapping[str, Tensor], gradients: Sequence[Tensor], rate: float, *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return where the next update goes along the clipped gradients."""
        factor, _ = self._factor(gradients)
        return self.inner.look_ahead(values, [factor * one for one in gradients], rate, momentum=momentum)

    def pull_back(
        self, direction: Mapping[str, Tensor], gradients: Sequence[Tensor], *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return Cᵀ·Dᵀ·direction, D of the inner optimiser at the clipped gradients and C of the clipping."""
        factor, length = self._factor(gradients)
        pulled = self.inner.pull_back(direction, [factor * one for one in gradients], momentum=momentum)
        along = sum(
            ((one * pulled[name]).sum() for name, one in zip(direction, gradients, strict=True)), torch.zeros(())
        )
        # Where nothing is clipped the factor is the constant 1.
        share = torch.where(factor < 1, factor * along / (length * (length + SMALL)), 0)
        return {name: factor * pulled[name] - share * one for name, one in zip(direction, gradients, strict=True)}

    def _factor(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        length = torch.stack([one.square().sum() for one in gradients]).sum().sqrt()
        return (self.norm / (length + SMALL)).clamp(max=1.0), length


class Clipped(Wrapped):
    """Clip the gradients of all parameters together to a norm, then let another optimiser update."""

    def __init__(self, inner: Optimiser, trained: Sequence[nn.Parameter], norm: float) -> None:
        """Wrap `inner`, which updates the parameters `trained`."""
        super().__init__(inner)
        self.trained, self.norm = trained, norm

    def descent(self) -> ClippedDescent:
        """Return the next update as a meta step sees it."""
        return ClippedDescent(self.inner.descent(), self.norm)

    def update(self, lr: float) -> None:
        """Move all parameters by their clipped gradients."""
        torch.nn.utils.clip_grad_norm_(self.trained, self.norm)
        self.inner.update(lr)
