"""MW-Net, "Meta-Weight-Net: learning an explicit mapping for sample weighting" (Shu et al. 2019).

Shapes: B noisy examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Descent, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import one_hot, plain_coefficients
from training.objectives.memory import initialised
from training.objectives.meta import Engine, MetaProblem, meta_gradient, unit
from training.objectives.tangents import Recorded

HIDDEN = 100


class WeightNet(nn.Module):
    """Compute V(ℓ; Θ): a loss in, a weight between 0 and 1 out, by one hidden layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(1, HIDDEN, dtype=dtype), nn.Linear(HIDDEN, 1, dtype=dtype)

    def forward(self, loss_B: Tensor) -> Tensor:
        """Return weights, B."""
        return self.output(F.relu(self.hidden(loss_B[:, None]))).sigmoid()[:, 0]


@dataclass(frozen=True)
class MetaWeightNet(Objective):
    """Minimise mean V(ℓ_i; Θ)·ℓ_i, while Θ descends the trusted loss after a step θ − α·∇mean V(ℓ_i; Θ)·ℓ_i.

    ∂L^p/∂Θ = mean_i ∂L^p/∂ω_i·∂V(ℓ_i)/∂Θ, with ∂L^p/∂ω from `meta_gradient`: no second-order graph. θ and Θ step
    together, so θ is weighted by the Θ before this step, not after it. Θ is trained by the run's own SGD, for which
    ∂L^p/∂ω is divided by its root mean square; the authors' code uses Adam at 1e-3.
    """

    rate: float = 0.03
    """Learning rate of Θ over that of the model (ours)."""
    engine: Engine = "forward"
    """How the meta gradient is computed: exactly by forward mode, or by second order (slower, and larger)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    own_weights = True

    def __post_init__(self) -> None:
        require(self, ["rate"], 0)

    @property
    def forward_mode(self) -> bool:
        """See `Objective`."""
        return True

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return V."""
        with initialised():
            return WeightNet(next(model.parameters()).dtype)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory = moment.memory
        assert isinstance(memory, WeightNet)
        with Recorded(keeps=self.engine == "forward") as recorded:
            logits_BK = model(batch.weak_BCHW)
        given_BK = one_hot(batch.label_B, logits_BK)
        loss_B = F.cross_entropy(logits_BK, batch.label_B, reduction="none")
        weight_B = memory(loss_B.detach())

        plain = replace(moment, descent=Descent())  # neither momentum nor weight decay
        problem = MetaProblem(
            model, batch, plain, workers, logits_BK, given_BK, given_BK, lambda0=1.0, alpha=moment.lr,
            lookahead="sgd", probe_decay=False, weight_B=weight_B.detach(), recorded=recorded,
        )  # fmt: skip
        gradient_B, _ = meta_gradient(self.engine, problem)
        descent = (unit(gradient_B, workers) * weight_B).mean()  # its gradient in Θ is ∂L^p/∂Θ; its value means nothing

        loss = (weight_B.detach() * loss_B).mean()
        return Outcome(
            loss + self.rate * (descent - descent.detach()),
            {"weighted": loss.detach()},
            plain_coefficients(logits_BK, batch.label_B, weight_B=weight_B),
            logits_BK.detach().softmax(1),
        )
