"""LC, "Making deep neural networks robust to label noise: a loss correction approach" (Patrini et al. 2017), forward.

Shapes: B noisy examples, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import corrected_cross_entropy, plain_coefficients
from training.objectives.memory import seen


class Transition(nn.Module):
    """Hold what the network predicted for every example, and T̂ from it; N·K numbers on every worker."""

    prediction_NK: Tensor
    transition_KK: Tensor

    def __init__(self, examples: int, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("prediction_NK", torch.zeros(examples, classes, dtype=dtype))
        self.register_buffer("transition_KK", torch.eye(classes, dtype=dtype))

    def estimate(self, percentile: float) -> None:
        """Set T̂_ij = p(label j | x̄_i), x̄_i the example at a percentile of p(label i), 100 the likeliest (eq. 12 f.)."""
        rank = max(math.ceil(percentile / 100 * len(self.prediction_NK)), 1)
        self.transition_KK.copy_(self.prediction_NK[self.prediction_NK.kthvalue(rank, dim=0).indices])


@dataclass(frozen=True)
class Forward(Objective):
    """Minimise cross-entropy, estimate T̂ by the network's own predictions, then minimise −log (T̂ᵀp)_y (theorem 2).

    The paper trains a second network, as long as the first, and predicts with a network at rest; here the one network
    goes on, and predictions are those of the last epoch of the warm-up, which should end where a cycle does, at a rate
    of 0. The ledger's trust is P(label is right | x, T̂).
    """

    warm_up: float = 0.2
    """Share of the run before the correction (the paper: a training of its own, CIFAR-10 120 epochs)."""
    percentile: float = 97.0
    """Of the probability of label i over all examples, where x̄_i is (the authors' code: 97, but on CIFAR-100 100)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True

    def __post_init__(self) -> None:
        require(self, ["warm_up"], 0, 1)
        require(self, ["percentile"], 0, 100)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return T̂."""
        return Transition(examples, classes, next(model.parameters()).dtype)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory, end = moment.memory, self.warm_up * moment.steps
        assert isinstance(memory, Transition)
        logits_BK = model(batch.weak_BCHW)
        if moment.step < end:
            rows_U, (prediction_UK,) = seen(batch.row_B, [logits_BK.softmax(1)], workers)
            memory.prediction_NK[rows_U] = prediction_UK
            name, loss_B, trust_B = "label", F.cross_entropy(logits_BK, batch.label_B, reduction="none"), None
        else:
            if moment.step - 1 < end:  # the first step after it
                memory.estimate(self.percentile)
            name = "corrected"
            loss_B, trust_B = corrected_cross_entropy(logits_BK, memory.transition_KK, batch.label_B)
        loss = loss_B.mean()
        return Outcome(
            loss,
            {name: loss.detach()},
            plain_coefficients(logits_BK, batch.label_B, trust_B=trust_B),
            logits_BK.detach().softmax(1),
        )
