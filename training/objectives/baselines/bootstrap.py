"""Bootstrapping, "Training deep neural networks on noisy labels with bootstrapping" (Reed et al. 2015), soft and hard.

Shapes: B noisy examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import cross_entropy, one_hot, plain_coefficients


@dataclass(frozen=True)
class Bootstrap(Objective):
    """Minimise −Σ_k (β·y_k + (1−β)·z_k) log q_k: z is the prediction q (soft), or its most likely class (hard).

    The gradient goes through a soft z as well: so it pulls towards sure predictions.
    """

    hard: bool
    """Whether z is the most likely class instead of the whole prediction."""
    beta: float
    """β, the trust in the given label (the paper: soft 0.95, hard 0.8)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""

    def __post_init__(self) -> None:
        require(self, ["beta"], 0, 1)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        logits_BK = model(batch.weak_BCHW)
        answer_BK = one_hot(logits_BK.argmax(1), logits_BK) if self.hard else logits_BK.softmax(1)
        target_BK = self.beta * one_hot(batch.label_B, logits_BK) + (1 - self.beta) * answer_BK
        loss_B = cross_entropy(target_BK, logits_BK)
        loss = loss_B.mean()
        return Outcome(
            loss,
            {"bootstrapped": loss.detach()},
            plain_coefficients(logits_BK, batch.label_B, trust_B=loss_B.new_full(loss_B.shape, self.beta)),
            logits_BK.detach().softmax(1),
        )


def soft() -> Bootstrap:
    """Return soft bootstrapping, β as in the paper."""
    return Bootstrap(hard=False, beta=0.95)


def hard() -> Bootstrap:
    """Return hard bootstrapping, β as in the paper."""
    return Bootstrap(hard=True, beta=0.8)
