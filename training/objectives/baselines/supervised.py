"""Plain cross-entropy on the noisy labels: the baseline every robust method is measured against.

Shapes: B noisy examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers
from training.objectives.losses import plain_coefficients


@dataclass(frozen=True)
class Supervised(Objective):
    """Minimise cross-entropy with the given labels on the weak views; trusted examples are not used."""

    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""

    @property
    def steady(self) -> bool:
        """See `Objective`."""
        return True

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        logits_BK = model(batch.weak_BCHW)
        loss = F.cross_entropy(logits_BK, batch.label_B)
        return Outcome(
            loss,
            {"label": loss.detach()},
            plain_coefficients(logits_BK, batch.label_B),
            logits_BK.detach().softmax(1),
        )
