"""Watches a run for the two ways it goes wrong silently: a loss that is no number, and a collapse to one answer.

Shapes: B examples, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.objectives.interface import Outcome

WINDOW = 100  # steps; a run is judged once it has had that many
COLLAPSED = (
    0.03  # share of log K; healthy short runs measured 0.06 and more, collapsed ones 0.01 and less (docs/log.md)
)


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite."""


class Monitor:
    """Holds the last steps' losses and predictions where they were computed; looks at them only when asked."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.unchecked: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self.recent: list[tuple[Tensor, Tensor]] = []  # (mean prediction K, mean entropy) of a step
        self.warned = False

    def add(self, step: int, outcome: Outcome) -> None:
        """Note one step."""
        prediction_BK = outcome.prediction_BK
        entropy = torch.special.entr(prediction_BK).sum(1).mean()
        self.recent = [*self.recent[1 - WINDOW :], (prediction_BK.mean(0), entropy)]
        self.unchecked.append((step, outcome.total.detach(), outcome.parts))

    def check_finite(self, last_good: str) -> None:
        """Raise NotFiniteError for the first step since the last check whose loss is no number; one host sync."""
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked or bool(torch.isfinite(torch.stack([total for _, total, _ in unchecked])).all()):
            return
        step, total, parts = next(item for item in unchecked if not torch.isfinite(item[1]))
        terms = ", ".join(f"{name} {float(part):.4g}" for name, part in parts.items())
        raise NotFiniteError(
            f"the loss is {float(total)} at step {step} ({terms}); last good checkpoint: {last_good}. "
            "Lower schedule.lr, or the loss weights, and run again"
        )

    def information(self) -> float:
        """How much the predictions of the last steps tell images apart, as a share of log K.

        Entropy of the mean prediction minus mean entropy of the predictions: 0 for any constant answer, confident or
        not; 1 for confident and balanced answers.
        """
        mean_K = torch.stack([mean for mean, _ in self.recent]).mean(0)
        mean_entropy = torch.stack([entropy for _, entropy in self.recent]).mean()
        return float(torch.special.entr(mean_K).sum() - mean_entropy) / math.log(self.classes)

    def collapse_warning(self) -> str | None:
        """One line, once, where the network gives (nearly) one answer to every image."""
        if self.warned or len(self.recent) < WINDOW or self.information() >= COLLAPSED:
            return None
        self.warned = True
        return (
            f"the network gives nearly the same answer to every image (information {self.information():.3f} of 1 over "
            f"the last {WINDOW} steps): use --method winnow, or lower objective.p and objective.kl"
        )
