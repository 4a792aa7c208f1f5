"""CleanNet, "Transfer learning for scalable image classifier training with label noise" (Lee et al. 2018).

Shapes: B noisy examples, M probe examples, K classes, m reference features of a class, D numbers each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import one_hot, plain_coefficients
from training.objectives.memory import FeatureBank, classifier, initialised, with_features

EMBEDDING, MARGIN = 128, 0.1  # numbers of an embedding; the similarity below which an image is no member of a class


class Relevance(nn.Module):
    """Tell how relevant an image is to a class: the cosine of its embedding and the class's, of reference features."""

    def __init__(self, bank: FeatureBank, dtype: torch.dtype) -> None:
        super().__init__()
        self.bank, features = bank, bank.feature_KmD.shape[2]

        def layers(*sizes: int) -> nn.Sequential:
            linear = [nn.Linear(a, b, dtype=dtype) for a, b in pairwise(sizes)]
            return nn.Sequential(*(layer for each in linear for layer in (each, nn.Tanh())))

        self.query, self.decoder = layers(features, 256, EMBEDDING), layers(EMBEDDING, 256, features)
        self.reference, self.attention = layers(features, 512, 256), layers(256, 256)
        self.context, self.of_class = nn.Linear(256, 1, bias=False, dtype=dtype), layers(256, EMBEDDING)

    def forward(self, feature_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cosine of each image and each class, B×K; squared error of features decoded from an embedding, B)."""
        v_BD, reference_KmD = _log(feature_BD), _log(self.bank.feature_KmD)
        embedding_BE = self.query(v_BD)
        hidden_KmH = self.reference(reference_KmD)
        score_Km = self.context(self.attention(hidden_KmH))[..., 0].masked_fill(~self.bank.filled(), -1e4)
        class_KE = self.of_class((score_Km.softmax(1)[..., None] * hidden_KmH).sum(1))
        return F.normalize(embedding_BE) @ F.normalize(class_KE).T, (self.decoder(embedding_BE) - v_BD).square().sum(1)


def _log(feature: Tensor) -> Tensor:
    # log(1 + v) as in the authors' code, whose features are never negative.
    return feature.sign() * feature.abs().log1p()


@dataclass(frozen=True)
class CleanNet(Objective):
    """Minimise cross-entropy, each example weighted by max(0, its relevance to the class of its label).

    CleanNet learns along: 1 − cos for a trusted image and its class, max(0, cos − ρ) for it and the other classes; for
    a noisy image and its label, at weight γ, the first of these where cos ≥ ρ; and a reconstruction, at weight β. The
    paper is told which of some noisy labels are right and which wrong; here all other classes of a trusted image are
    wrong, together as one label. References are the last features of a class instead of k-means centres, and both
    networks learn at once instead of in turn.
    """

    warm_up: float = 0.25
    """Share of the run with equal weights (the paper trains a first classifier to its end)."""
    references: int = 32
    """m, the reference features of a class (the authors' code: 32)."""
    negative: float = 5.0
    """Weight of wrong classes (the authors' code: 5)."""
    reconstruction: float = 0.1
    """β (the authors' code: 0.1)."""
    unverified: float = 0.1
    """γ (the authors' code: 0.1)."""
    rate: float = 0.1
    """Learning rate of CleanNet over that of the model (the authors' code: 0.01)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True
    own_weights = True

    def __post_init__(self) -> None:
        require(self, ["warm_up"], 0, 1)
        require(self, ["references"], 1)
        require(self, ["negative", "reconstruction", "unverified", "rate"], 0)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return CleanNet and its reference features."""
        features, dtype = classifier(model, classes).in_features, next(model.parameters()).dtype
        with initialised():
            return Relevance(FeatureBank(classes, self.references, features, dtype), dtype)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory = moment.memory
        assert isinstance(memory, Relevance)
        logits_BK, feature_BD = with_features(model, batch.weak_BCHW, batch.classes)
        with torch.no_grad():
            _, feature_MD = with_features(model, batch.probe_MCHW, batch.classes, aside=True)
        memory.bank.add(batch, feature_BD, workers)
        cosine_BK, error_B = memory(feature_BD)
        cosine_MK, error_M = memory(feature_MD)

        own_MK = one_hot(batch.probe_label_M, cosine_MK)
        wrong_M = ((1 - own_MK) * (cosine_MK - MARGIN).clamp_min(0)).sum(1) / (batch.classes - 1)
        verified_M = (own_MK * (1 - cosine_MK)).sum(1) + self.negative * wrong_M
        cosine_B = (one_hot(batch.label_B, cosine_BK) * cosine_BK).sum(1)
        unverified_B = torch.where(cosine_B >= MARGIN, 1 - cosine_B, 0 * cosine_B)  # below ρ the loss is 0
        relevance = torch.cat([verified_M, self.unverified * unverified_B]).mean()
        reconstruction = torch.cat([error_M, error_B]).mean()

        warm = moment.progress < self.warm_up
        weight_B = torch.ones_like(cosine_B) if warm else cosine_B.detach().clamp_min(0)
        loss_B = F.cross_entropy(logits_BK, batch.label_B, reduction="none")
        loss = (weight_B * loss_B).mean()
        return Outcome(
            loss + self.rate * (relevance + self.reconstruction * reconstruction),
            {"weighted": loss.detach(), "relevance": relevance.detach(), "reconstruction": reconstruction.detach()},
            plain_coefficients(logits_BK, batch.label_B, weight_B=weight_B),
            logits_BK.detach().softmax(1),
        )
