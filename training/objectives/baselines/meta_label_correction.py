"""MLC, "Meta label correction for noisy label learning" (Zheng et al. 2021).

Shapes: B noisy examples, R probe examples that the model learns from, K classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Coefficients, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import cross_entropy, forward_aside, one_hot, split_probe
from training.objectives.memory import classifier, initialised, with_features
from training.objectives.meta import MetaProblem, logit_slope, unit
from training.objectives.tangents import Recorded

EMBEDDING, HIDDEN = 64, 128


class LabelCorrection(nn.Module):
    """Compute g(h, y; α): a noisy label and the image's features in, a distribution over the classes out."""

    def __init__(self, features: int, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, EMBEDDING, dtype=dtype)
        self.layers = nn.Sequential(
            nn.Linear(features + EMBEDDING, HIDDEN, dtype=dtype),
            nn.Tanh(),
            nn.Linear(HIDDEN, HIDDEN, dtype=dtype),
            nn.Tanh(),
            nn.Linear(HIDDEN, classes, dtype=dtype),
        )
        nn.init.xavier_uniform_(self.embedding.weight)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, feature_BD: Tensor, label_B: Tensor) -> Tensor:
        """Return corrected labels, B×K."""
        return self.layers(torch.cat([feature_BD, self.embedding(label_B)], 1)).softmax(1)


@dataclass(frozen=True)
class MetaLabelCorrection(Objective):
    """Minimise cross-entropy with labels of a second network, which descends the trusted loss after a lookahead.

    θ' is affine in the corrected labels P, so that with t = J_θΦ·∇L^p(θ') ∂L^p/∂P_ik ∝ α·(t_ik − q_i·t_i): no
    second-order graph, and no approximation of the Hessian, which the paper makes for more than one step. As in the
    authors' code, half of a batch's trusted images judge, and the model learns from the others beside the noisy ones.
    The corrector is trained by the run's own SGD, for which ∂L^p/∂P is divided by its root mean square; the authors'
    code uses Adam at 3e-5 beside 3e-4 for the model.
    """

    rate: float = 0.1
    """Learning rate of the corrector over that of the model (the authors' code: 0.1)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""

    def __post_init__(self) -> None:
        require(self, ["rate"], 0)

    @property
    def forward_mode(self) -> bool:
        """See `Objective`."""
        return True

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return g."""
        with initialised():
            return LabelCorrection(classifier(model, classes).in_features, classes, next(model.parameters()).dtype)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory = moment.memory
        assert isinstance(memory, LabelCorrection)
        with Recorded(keeps=True) as recorded:
            logits_BK, feature_BD = with_features(model, batch.weak_BCHW, batch.classes)
        corrected_BK = memory(feature_BD, batch.label_B)
        target_BK = corrected_BK.detach()
        judges, taught = split_probe(batch, 0.5)
        losses = [cross_entropy(target_BK, logits_BK)]
        if len(taught.probe_label_M):
            taught_RK = forward_aside(model, taught.probe_MCHW)
            losses.append(F.cross_entropy(taught_RK, taught.probe_label_M, reduction="none"))
        loss = torch.cat(losses).mean()

        given_BK = one_hot(batch.label_B, logits_BK)
        problem = MetaProblem(
            model, judges, moment, workers, logits_BK, given_BK, target_BK, lambda0=0.0, alpha=moment.lr,
            lookahead="momentum", probe_decay=False, inner_loss=loss, recorded=recorded,
        )  # fmt: skip
        slope_BK = logit_slope(problem)
        with torch.no_grad():
            gradient_BK = slope_BK - (logits_BK.softmax(1) * slope_BK).sum(1, keepdim=True)
        descent = (unit(gradient_BK, workers) * corrected_BK).sum(1).mean()  # as in MW-Net: a gradient, no value

        confidence_B, pseudo_label_B = target_BK.max(1)
        return Outcome(
            loss + self.rate * (descent - descent.detach()),
            {"corrected": loss.detach()},
            Coefficients(
                torch.ones_like(confidence_B),
                (given_BK * target_BK).sum(1),
                pseudo_label_B,
                confidence_B,
                cross_entropy(given_BK, logits_BK).detach(),
            ),
            logits_BK.detach().softmax(1),
        )
