"""ELR, "Early-learning regularization prevents memorization of noisy labels" (Liu et al. 2020).

Shapes: B noisy examples of this worker, U different ones of the global batch, N of the training set, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Coefficients, Moment, Objective, Outcome, Workers, require
from training.objectives.memory import seen

EDGE = 1e-4  # predictions are kept this far from 0 and 1 (the authors' code)


class Averages(nn.Module):
    """Hold t: of each training example the average of past predictions; N·K numbers on every worker."""

    average_NK: Tensor

    def __init__(self, examples: int, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("average_NK", torch.zeros(examples, classes, dtype=dtype))


@dataclass(frozen=True)
class Elr(Objective):
    """Minimise cross-entropy + λ·mean log(1 − ⟨p, t⟩), with t ← β·t + (1−β)·p before it.

    Temporal ensembling alone; not ELR+, which adds a second network, weight averaging and mixup. The ledger's pseudo
    label is that of t.
    """

    beta: float = 0.7
    """β, how long the past counts (the paper: CIFAR-10 0.7, CIFAR-100 0.9)."""
    strength: float = 3.0
    """λ of the regularisation (the paper: CIFAR-10 3, asymmetric noise 1, CIFAR-100 7)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""

    def __post_init__(self) -> None:
        require(self, ["beta"], 0, 1)
        require(self, ["strength"], 0)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return t."""
        return Averages(examples, classes, next(model.parameters()).dtype)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory = moment.memory
        assert isinstance(memory, Averages)
        logits_BK = model(batch.weak_BCHW)
        p_BK = logits_BK.softmax(1).clamp(EDGE, 1 - EDGE)
        rows_U, (p_UK,) = seen(batch.row_B, [p_BK / p_BK.sum(1, keepdim=True)], workers)
        memory.average_NK[rows_U] = self.beta * memory.average_NK[rows_U] + (1 - self.beta) * p_UK
        t_BK = memory.average_NK[batch.row_B]

        loss_B = F.cross_entropy(logits_BK, batch.label_B, reduction="none")
        label, regularisation = loss_B.mean(), torch.log1p(-(t_BK * p_BK).sum(1)).mean()
        confidence_B, pseudo_label_B = (t_BK / t_BK.sum(1, keepdim=True)).max(1)
        ones_B = torch.ones_like(confidence_B)
        return Outcome(
            label + self.strength * regularisation,
            {"label": label.detach(), "regularisation": regularisation.detach()},
            Coefficients(ones_B, ones_B, pseudo_label_B, confidence_B, loss_B.detach()),
            logits_BK.detach().softmax(1),
        )
