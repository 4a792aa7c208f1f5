"""What labels say of true classes: how annotators confuse these, learned from labels and a judge's answers together.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 20  # of expectation maximisation
TEMPERATURES = [2**half for half in (1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0)]  # the first: too sure answers
KEPT = 0.6  # share of right labels to begin with


@dataclass(frozen=True)
class Confusion:
    """Say how probable each label is for each true class, and how sure a judge's answers are to be taken."""

    label_KK: Tensor  # P(label j | class i) in row i
    temperature: float

    def posterior(self, logits_NK: Tensor, label_N: Tensor) -> Tensor:
        """Return how probable each class is for a judge that has given `logits_NK` and is told the label, N×K."""
        return self.joint(logits_NK, label_N).softmax(1)

    def joint(self, logits_NK: Tensor, label_N: Tensor) -> Tensor:
        """Return log P(class, label), N×K."""
        return (logits_NK / self.temperature).log_softmax(1) + self.label_KK.T[label_N].log()


def learned(logits_NK: Tensor, label_N: Tensor) -> Confusion:
    """Return the confusion, and the temperature, that make the labels most probable.

    The judge must not have been trained on these labels. For each temperature the confusion comes by expectation
    maximisation (Dawid & Skene 1979, the judge's answers in place of the classes' frequencies); one label more of each
    class, spread over all, keeps rows of few examples from certainty.
    """
    found = [_fitted(logits_NK, label_N, temperature) for temperature in TEMPERATURES]
    return max(found, key=lambda confused: float(confused.joint(logits_NK, label_N).logsumexp(1).mean()))


def _fitted(logits_NK: Tensor, label_N: Tensor, temperature: float) -> Confusion:
    classes = logits_NK.shape[1]
    label_KK = logits_NK.new_full((classes, classes), (1 - KEPT) / (classes - 1)).fill_diagonal_(KEPT)
    for _ in range(STEPS):
        class_NK = Confusion(label_KK, temperature).posterior(logits_NK, label_N)
        count_KK = torch.full_like(label_KK, 1 / classes).index_add_(0, label_N, class_NK)  # by label and class
        label_KK = (count_KK / count_KK.sum(0)).T
    return Confusion(label_KK, temperature)
