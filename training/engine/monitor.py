"""Watch a run for the two ways it goes wrong silently: a loss that is NaN or infinite, a collapse to one answer.

Shapes: B examples, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.objectives.interface import Outcome

WINDOW = 100  # steps; a run is judged once it has had that many
COLLAPSED = 0.2  # of the labels' entropy; measured: collapsed runs 0.03–0.12, healthy ones 0.37 and more (docs/log.md)


class NotFiniteError(RuntimeError):
    """Report a loss that became NaN or infinite."""


class Monitor:
    """Hold the last steps' losses and predictions where they were computed; look at them only when asked."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.unchecked: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self.recent: list[tuple[Tensor, Tensor]] = []  # (entropy of the answers, entropy of the labels) of a step
        self.warned = False

    def add(self, step: int, outcome: Outcome, label_B: Tensor) -> None:
        """Note one step, whose examples were labelled `label_B`."""
        answers, labels = (self._entropy(classes_B) for classes_B in (outcome.prediction_BK.argmax(1), label_B))
        self.recent = [*self.recent[1 - WINDOW :], (answers, labels)]
        self.unchecked.append((step, outcome.total.detach(), outcome.parts))

    def _entropy(self, class_B: Tensor) -> Tensor:
        count_K = torch.zeros(self.classes, device=class_B.device)
        count_K.scatter_add_(0, class_B, torch.ones_like(class_B, dtype=count_K.dtype))
        return torch.special.entr(count_K / len(class_B)).sum()

    def check_finite(self, last_good: str) -> None:
        """Raise NotFiniteError for the first step since the last check whose loss is NaN or infinite; one host sync."""
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked or bool(torch.isfinite(torch.stack([total for _, total, _ in unchecked])).all()):
            return
        step, total, parts = next(item for item in unchecked if not torch.isfinite(item[1]))
        terms = ", ".join(f"{name} {float(part):.4g}" for name, part in parts.items())
        raise NotFiniteError(
            f"the loss is {float(total)} at step {step} ({terms}); last good checkpoint: {last_good}. "
            "Lower schedule.lr or the loss weights, with a new --name"
        )

    def diversity(self) -> float:
        """Return the mean entropy of the last steps' answers over that of their labels.

        It is 0 where all images of a step get one answer.

        Answers are the most likely classes: calibrated predictions are rightly flat where most labels are wrong, so the
        predictions' own entropy cannot tell a network that learns slowly from one that has collapsed.
        """
        answers, labels = (torch.stack(entropies).mean() for entropies in zip(*self.recent, strict=True))
        return float(answers / labels.clamp_min(1e-6))

    def collapse_warning(self) -> str | None:
        """Return one line, once, where the network gives (nearly) one answer to every image."""
        if self.warned or len(self.recent) < WINDOW or (diversity := self.diversity()) >= COLLAPSED:
            return None
        self.warned = True
        return (
            f"the network gives nearly one answer to all images (diversity {diversity:.2f} of 1 over the last {WINDOW} "
            "steps): use --method winnow, or lower objective.p and objective.kl"
        )
