"""Co-teaching, "Robust training of deep neural networks with extremely noisy labels" (Han et al. 2018).

Shapes: B noisy examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import forward_aside, plain_coefficients
from training.objectives.memory import fresh_copy


def smallest(loss_B: Tensor, count: int, workers: Workers) -> Tensor:
    """Tell which examples are among the `count` smallest losses of the global batch, or tie with the last, B."""
    return loss_B <= workers.gather(loss_B).sort().values[count - 1]


@dataclass(frozen=True)
class CoTeaching(Objective):
    """Train each of two networks on the share R(t) of the batch on which the other has the smallest losses.

    R(t) = 1 − τ·min(t/T_k, 1) (algorithm 1). f is the model, g a second network in the objective's memory; the paper
    reports f and g alike, here f is evaluated. The ledger's weight is that of f: 1/R(t), or 0 for what g leaves out.
    """

    noise_rate: float = 0.4
    """τ, the share of labels that are wrong, which this method has to be told (the paper: the true one)."""
    warm_up: float = 0.05
    """T_k as a share of the run: until then less and less is kept (the paper: 10 epochs of 200; in a shorter run those
    are a larger share)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True

    def __post_init__(self) -> None:
        require(self, ["noise_rate", "warm_up"], 0, 1)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return g, with weights of its own."""
        return fresh_copy(model)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        peer, total = moment.memory, len(batch.label_B) * workers.size
        logits_BK = model(batch.weak_BCHW)
        f_B = F.cross_entropy(logits_BK, batch.label_B, reduction="none")
        g_B = F.cross_entropy(forward_aside(peer, batch.weak_BCHW), batch.label_B, reduction="none")

        pace = min(moment.progress / self.warm_up, 1) if self.warm_up else 1
        kept = max(round((1 - self.noise_rate * pace) * total), 1)
        with torch.no_grad():
            weight_B = smallest(g_B, kept, workers).to(f_B) * total / kept
            weight_of_g_B = smallest(f_B, kept, workers).to(f_B) * total / kept
        loss, loss_of_g = (weight_B * f_B).mean(), (weight_of_g_B * g_B).mean()
        return Outcome(
            loss + loss_of_g,
            {"kept": loss.detach(), "kept_by_peer": loss_of_g.detach()},
            plain_coefficients(logits_BK, batch.label_B, weight_B=weight_B),
            logits_BK.detach().softmax(1),
        )
