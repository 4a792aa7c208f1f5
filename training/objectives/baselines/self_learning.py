"""SMP, "Deep self-learning from noisy labels" (Han, Luo & Wang 2019).

Shapes: B noisy examples, K classes, m features of a class, D numbers each, p prototypes of a class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Coefficients, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import cross_entropy, one_hot
from training.objectives.memory import FeatureBank, classifier, epoch_steps, with_features

NEAR = (
    0.4  # share of the similarities within a class above S_c, where two features count as near (the paper: "top 40%")
)
APART = 0.95  # a prototype is less similar than this to every denser feature (the paper)


def prototypes(feature_mD: Tensor, count: int) -> Tensor:
    """Return the `count` densest features that are not too similar to denser ones, p×D, of unit length."""
    unit_mD = F.normalize(feature_mD)
    similarity_mm = unit_mD @ unit_mD.T
    near = similarity_mm.flatten().sort().values[-int(NEAR * similarity_mm.numel()) - 1]
    density_m = (similarity_mm - near).sign().sum(1)
    denser_mm = density_m[None] > density_m[:, None]
    nearest_m = similarity_mm.masked_fill(~denser_mm, -torch.inf).amax(1)
    nearest_m = torch.where(denser_mm.any(1), nearest_m, similarity_mm.amin(1))
    ranked_m = density_m - 2 * len(density_m) * (nearest_m > APART)  # those after all others
    return unit_mD[ranked_m.argsort(descending=True, stable=True)[:count]]


class Prototypes(nn.Module):
    """Hold the last features of every class, and the mean of its prototypes, chosen of them once an epoch."""

    mean_KD: Tensor

    def __init__(self, examples: int, bank: FeatureBank) -> None:
        super().__init__()
        self.examples, self.bank = examples, bank
        self.register_buffer("mean_KD", torch.zeros_like(bank.feature_KmD[:, 0]))

    def choose(self, count: int) -> None:
        """Choose `count` prototypes of each class anew."""
        for mean_D, feature_mD, filled_m in zip(self.mean_KD, self.bank.feature_KmD, self.bank.filled(), strict=True):
            if filled_m.any():
                mean_D.copy_(prototypes(feature_mD[filled_m], count).mean(0))

    def corrected(self, feature_BD: Tensor) -> Tensor:
        """Return labels ŷ, B: the class to whose prototypes a feature is most similar on average.

        Features and prototypes have unit length, so the average of the cosines is one product with the mean.
        """
        similarity_BK = F.normalize(feature_BD) @ self.mean_KD.T
        return similarity_BK.masked_fill(~self.mean_KD.any(1), -torch.inf).argmax(1)


@dataclass(frozen=True)
class SelfLearning(Objective):
    """Minimise (1−α)·CE(y) + α·CE(ŷ), where ŷ is the class whose prototypes are most similar to the image's features.

    Prototypes are chosen once an epoch of the features seen in training, where the paper draws m images a class and
    runs a network at rest over them; and ŷ is found anew for each view, instead of once an epoch. The ledger's pseudo
    label is ŷ; its confidence is the network's probability of ŷ.
    """

    warm_up: float = 0.25
    """Share of the run before labels are corrected (the paper does not tell)."""
    alpha: float = 0.5
    """α, the weight of corrected labels (the paper: 0.5)."""
    samples: int = 320
    """m, the features of a class that prototypes are chosen of (the paper: 1,280); K·m·D numbers are kept."""
    count: int = 8
    """p, the prototypes of a class (the paper: 8)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True

    def __post_init__(self) -> None:
        require(self, ["warm_up", "alpha"], 0, 1)
        require(self, ["samples", "count"], 1)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return features and prototypes."""
        features, dtype = classifier(model, classes).in_features, next(model.parameters()).dtype
        kept = min(self.samples, max(examples // classes, 1))  # with equal classes each image once
        return Prototypes(examples, FeatureBank(classes, kept, features, dtype))

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory = moment.memory
        assert isinstance(memory, Prototypes)
        logits_BK, feature_BD = with_features(model, batch.weak_BCHW, batch.classes)
        epoch = epoch_steps(memory.examples, batch, workers)
        if moment.step and moment.step % epoch == 0:
            memory.choose(self.count)
        memory.bank.add(batch, feature_BD, workers)

        corrects = moment.step >= max(self.warm_up * moment.steps, epoch)
        corrected_B = memory.corrected(feature_BD) if corrects else logits_BK.argmax(1)
        alpha = self.alpha if corrects else 0.0
        given_BK, corrected_BK = one_hot(batch.label_B, logits_BK), one_hot(corrected_B, logits_BK)
        loss = cross_entropy((1 - alpha) * given_BK + alpha * corrected_BK, logits_BK).mean()
        prediction_BK = logits_BK.detach().softmax(1)
        ones_B = torch.ones_like(prediction_BK[:, 0])
        return Outcome(
            loss,
            {"label": loss.detach()},
            Coefficients(
                ones_B,
                (1 - alpha) * ones_B,
                corrected_B,
                prediction_BK.gather(1, corrected_B[:, None])[:, 0],
                cross_entropy(given_BK, logits_BK).detach(),
            ),
            prediction_BK,
        )
