"""GCE, "Generalized cross entropy loss for training deep neural networks with noisy labels" (Zhang & Sabuncu 2018).

Shapes: B noisy examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import plain_coefficients


@dataclass(frozen=True)
class Gce(Objective):
    """Minimise L_q = (1 − p_y^q)/q: its gradient is cross-entropy's times p_y^q, the ledger's weight.

    Not the paper's truncated L_q, which also prunes examples from a third of the training on.
    """

    q: float = 0.7
    """Between cross-entropy (towards 0) and the mean absolute error (1); the paper's experiments 0.7."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    own_weights = True

    def __post_init__(self) -> None:
        require(self, ["q"], 1e-3, 1)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        logits_BK = model(batch.weak_BCHW)
        log_p_B = -F.cross_entropy(logits_BK, batch.label_B, reduction="none")
        loss = (-torch.expm1(self.q * log_p_B) / self.q).mean()
        return Outcome(
            loss,
            {"generalised": loss.detach()},
            plain_coefficients(logits_BK, batch.label_B, weight_B=(self.q * log_p_B).exp()),
            logits_BK.detach().softmax(1),
        )
