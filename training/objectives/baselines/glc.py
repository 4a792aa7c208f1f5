"""GLC, "Using trusted data to train deep networks on labels corrupted by severe noise" (Hendrycks et al. 2018).

Shapes: B noisy examples, M probe examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import corrected_cross_entropy, forward_aside, one_hot, plain_coefficients
from training.objectives.memory import epoch_steps


class Confusion(nn.Module):
    """Hold Ĉ_ij, the mean of p(label j | x) over the trusted images of class i."""

    sum_KK: Tensor
    count_K: Tensor

    def __init__(self, examples: int, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.examples = examples
        self.register_buffer("sum_KK", torch.zeros(classes, classes, dtype=dtype))
        self.register_buffer("count_K", torch.zeros(classes, dtype=dtype))

    def look(self, prediction_MK: Tensor, label_M: Tensor, workers: Workers) -> None:
        """Count in a batch of trusted images."""
        class_MK = one_hot(label_M, prediction_MK)
        sum_KK, count_K = workers.mean([class_MK.T @ prediction_MK, class_MK.sum(0)])
        self.sum_KK += workers.size * sum_KK
        self.count_K += workers.size * count_K

    def estimate(self) -> Tensor:
        """Return Ĉ, K×K; a class that was not seen keeps its labels."""
        seen_K1 = self.count_K[:, None] > 0
        return torch.where(seen_K1, self.sum_KK / self.count_K[:, None], torch.eye(len(self.count_K)).to(self.sum_KK))


@dataclass(frozen=True)
class Glc(Objective):
    """Minimise cross-entropy with noisy labels, then, by Ĉ, −log (Ĉᵀp)_y, with cross-entropy on trusted images.

    Algorithm 1.

    The paper trains a second network, as long as the first, on the union of both sets, and predicts with a network at
    rest; here the one network goes on, and predictions are those of the last epoch of the warm-up, which should end at
    the end of a cycle, where the learning rate is 0. The ledger's trust is P(label is right | x, Ĉ).
    """

    warm_up: float = 0.2
    """Share of the run before the correction (the paper: a training of its own, CIFAR 75 epochs)."""
    trusted_weight: float = 1.0
    """How much a trusted image counts beside a noisy one, whenever it is drawn. In the paper each counts once an epoch:
    n/N · B/M for n trusted and N noisy ones."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True

    def __post_init__(self) -> None:
        require(self, ["warm_up"], 0, 1)
        require(self, ["trusted_weight"], 0)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return Ĉ."""
        return Confusion(examples, classes, next(model.parameters()).dtype)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory, end = moment.memory, self.warm_up * moment.steps
        assert isinstance(memory, Confusion)
        logits_BK, trust_B = model(batch.weak_BCHW), None
        if moment.step < end:
            if moment.step >= end - epoch_steps(memory.examples, batch, workers):
                with torch.no_grad():
                    prediction_MK = forward_aside(model, batch.probe_MCHW).softmax(1)
                memory.look(prediction_MK, batch.probe_label_M, workers)
            loss = F.cross_entropy(logits_BK, batch.label_B)
            parts = {"label": loss.detach()}
        else:
            noisy_B, trust_B = corrected_cross_entropy(logits_BK, memory.estimate(), batch.label_B)
            probe_M = F.cross_entropy(forward_aside(model, batch.probe_MCHW), batch.probe_label_M, reduction="none")
            weight = self.trusted_weight
            loss = (noisy_B.sum() + weight * probe_M.sum()) / (len(noisy_B) + weight * len(probe_M))
            parts = {"corrected": noisy_B.mean().detach(), "probe": probe_M.mean().detach()}
        return Outcome(
            loss,
            parts,
            plain_coefficients(logits_BK, batch.label_B, trust_B=trust_B),
            logits_BK.detach().softmax(1),
        )
