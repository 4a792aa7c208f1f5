"""MentorNet PD, "Learning data-driven curriculum for … neural networks on corrupted labels" (Jiang et al. 2018).

Shapes: B noisy examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import plain_coefficients

DECAY = 0.5  # of the moving average of the losses' percentile (the authors' code)
BURN_IN, LAST = 0.18, 0.9  # shares of the run: until the first all weights are 1, from the second on they are linear
DROPPED_EARLY, DROPPED = 0.5, 0.05  # share of examples left out at random, before and after BURN_IN (the authors' code)


class Percentile(nn.Module):
    """Hold the moving average of the percentile of a batch's losses."""

    average: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros((), dtype=dtype))


@dataclass(frozen=True)
class MentorNet(Objective):
    """Minimise mean v_i·ℓ_i by the predefined curriculum: all, then losses below ℓ_pt, then linear in ℓ − ℓ_pt.

    The closed form that MentorNet PD is a network trained to imitate, instead of that network. MentorNet DD, learned
    from other data with known noise, is not here. ℓ_pt is the moving average of the batch's p-percentile.
    """

    percentile: float = 0.75
    """p, the share of losses below ℓ_pt (the authors' commands: 0.75 at noise 0.2 and 0.4, 0.5 at 0.8)."""
    softness: float = 1.0
    """λ2: in the last tenth of the run v = 1 − (ℓ − ℓ_pt)/λ2, between 0 and 1."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True
    own_weights = True

    def __post_init__(self) -> None:
        require(self, ["percentile"], 0, 1)
        require(self, ["softness"], 1e-6)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return ℓ_pt."""
        return Percentile(next(model.parameters()).dtype)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory = moment.memory
        assert isinstance(memory, Percentile)
        logits_BK = model(batch.weak_BCHW)
        loss_B = F.cross_entropy(logits_BK, batch.label_B, reduction="none")
        memory.average.lerp_(workers.gather(loss_B).quantile(self.percentile), 1 - DECAY)
        beyond_B = loss_B.detach() - memory.average
        if moment.progress < BURN_IN:
            weight_B = torch.ones_like(beyond_B)
        elif moment.progress < LAST:
            weight_B = (beyond_B <= 0).to(beyond_B)
        else:
            weight_B = (1 - beyond_B / self.softness).clamp(0, 1)
        kept_B = kept(batch, DROPPED_EARLY if moment.progress < BURN_IN else DROPPED)
        weight_B = weight_B * kept_B.to(weight_B, non_blocking=True)
        loss = (weight_B * loss_B).mean()
        return Outcome(
            loss,
            {"weighted": loss.detach()},
            plain_coefficients(logits_BK, batch.label_B, weight_B=weight_B),
            logits_BK.detach().softmax(1),
        )


def kept(batch: Batch, dropped: float) -> Tensor:
    """Tell which examples a random draw leaves in, B; the share `dropped` is left out on average."""
    rows = len(batch.label_B) // len(batch.group_keys)
    draws = [np.random.Generator(np.random.Philox(key=key)).random(rows) for key in batch.group_keys]
    return torch.from_numpy(np.concatenate(draws) >= dropped)
