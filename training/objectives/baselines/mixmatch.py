"""MixMatch, "A holistic approach to semi-supervised learning" (Berthelot et al. 2019), and the paper's MixMatch-KL.

Shapes: B noisy examples, M probe examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from training.objectives.interface import Batch, Coefficients, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import cross_entropy, forward_aside, kl_divergence, mixed_pass, sharpen


@dataclass(frozen=True)
class MixMatch(Objective):
    """Learn from trusted images as the labelled set, and from noisy ones without their labels (§5.4, Table 8).

    L = L_X + λ_U·L_U (+ k·L_KL). The two augmentations of an unlabelled image are its weak and strong views, where
    MixMatch has two weak ones; rows mix within groups. L_KL is §4.2's, without gradient into the weak view as in the
    authors' code; Table 8 does not tell its weight.
    """

    lambda_u: float = 75.0
    """λ_U, the weight of L_U (MixMatch: CIFAR-10 75, CIFAR-100 150)."""
    alpha: float = 0.75
    """Of mixup's Beta(α, α) (MixMatch: 0.75)."""
    temperature: float = 0.5
    """T of the guessed labels' sharpening (MixMatch: 0.5)."""
    warm_up: int = 16_384
    """Steps over which λ_U, and here k, grow from 0 (the authors' code: 2²⁰ images, in batches of 64)."""
    kl: float = 0.0
    """k, the weight of the consistency of both views, L_KL; 0 is MixMatch itself."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters (as MixMatch does)."""
    staged = True

    def __post_init__(self) -> None:
        require(self, ["lambda_u", "kl", "warm_up"], 0)
        require(self, ["alpha", "temperature"], 1e-3)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        with torch.set_grad_enabled(self.kl > 0):
            weak_BK, strong_BK = model(batch.weak_BCHW), forward_aside(model, batch.strong_BCHW)
        weak_BK = weak_BK.detach()
        guess_BK = sharpen((weak_BK.softmax(1) + strong_BK.detach().softmax(1)) / 2, self.temperature)
        mixed = mixed_pass(model, batch, guess_BK, alpha=self.alpha, fold=True)
        parts = {
            "labelled": cross_entropy(mixed.probe_target, mixed.probe_logits).mean(),
            "unlabelled": F.mse_loss(mixed.noisy_logits.softmax(1), mixed.noisy_target),
        }
        pace = min(moment.step / self.warm_up, 1) if self.warm_up else 1
        total = parts["labelled"] + pace * self.lambda_u * parts["unlabelled"]
        if self.kl > 0:
            parts["consistency"] = kl_divergence(weak_BK, strong_BK).mean()
            total = total + pace * self.kl * parts["consistency"]

        loss_B = F.cross_entropy(weak_BK, batch.label_B, reduction="none")
        confidence_B, pseudo_label_B = guess_BK.max(1)
        return Outcome(
            total,
            {name: part.detach() for name, part in parts.items()},
            Coefficients(torch.ones_like(loss_B), torch.zeros_like(loss_B), pseudo_label_B, confidence_B, loss_B),
            weak_BK.softmax(1),
        )


def mixmatch_kl() -> MixMatch:
    """Return MixMatch with the consistency loss, at the weight that the full method gives it on CIFAR."""
    return MixMatch(kl=20.0)
