"""L2R, "Learning to reweight examples for robust deep learning" (Ren et al., ICML 2018).

Shapes: B noisy examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers
from training.objectives.losses import cross_entropy, normalised_weights, one_hot, plain_coefficients
from training.objectives.meta import Engine, MetaProblem, meta_gradient
from training.objectives.tangents import Recorded


@dataclass(frozen=True)
class Reweight(Objective):
    """Minimise Σ ω*·CE(y, a), ω* from the meta gradient at ω0 = 0: no lookahead, momentum or pseudo labels."""

    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    engine: Engine = "forward"
    """How the meta gradient is computed: exactly by forward mode, or by second order (slower, and larger)."""

    @property
    def forward_mode(self) -> bool:
        """See `Objective`."""
        return True

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        with Recorded(keeps=self.engine == "forward") as recorded:
            logits_BK = model(batch.weak_BCHW)
        given_BK = one_hot(batch.label_B, logits_BK)
        problem = MetaProblem(
            model, batch, moment, workers, logits_BK, given_BK, given_BK,
            lambda0=1.0, alpha=moment.lr, lookahead="l2r", probe_decay=False, recorded=recorded,
        )  # fmt: skip
        omega_gradient_B, _ = meta_gradient(self.engine, problem)
        weight_B = normalised_weights(-omega_gradient_B, workers)
        loss = (weight_B * cross_entropy(given_BK, logits_BK)).mean()
        return Outcome(
            loss,
            {"weighted": loss.detach()},
            plain_coefficients(logits_BK, batch.label_B, weight_B),
            logits_BK.detach().softmax(1),
        )
