"""M-correction, "Unsupervised label noise modeling and loss correction" (Arazo et al. 2019): M-DYR-H.

Shapes: B noisy examples in n groups of G, U different ones in the global batch, N in the training set, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import cross_entropy, forward_aside, mix, mixing_draws, one_hot, plain_coefficients
from training.objectives.memory import epoch_steps, seen

ITERATIONS = 10  # of expectation and maximisation
EDGE = 1e-3  # losses, scaled to 0…1, are kept this far from both ends


class BetaMixture(nn.Module):
    """Hold two beta distributions of the losses, scaled to 0…1: of right labels, then of wrong ones (§3.1)."""

    loss_N: Tensor
    range_2: Tensor
    share_2: Tensor
    alpha_2: Tensor
    beta_2: Tensor
    peak: Tensor

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.register_buffer("loss_N", torch.full((examples,), torch.nan, dtype=torch.float64))  # the last seen
        self.register_buffer("range_2", torch.tensor([0.0, 1.0], dtype=torch.float64))  # losses that scale to 0 and 1
        for name in ("share_2", "alpha_2", "beta_2"):
            self.register_buffer(name, torch.ones(2, dtype=torch.float64))
        self.register_buffer(
            "peak", torch.ones((), dtype=torch.float64)
        )  # scaled loss that is most surely of a wrong one

    def fit(self) -> None:
        """Fit to the losses between their 5th and 95th percentile, by moments weighted with the posteriors."""
        loss_N = self.loss_N[~self.loss_N.isnan()]
        self.range_2.copy_(loss_N.quantile(loss_N.new_tensor([0.05, 0.95])))
        x_N = self._scaled(loss_N[(loss_N >= self.range_2[0]) & (loss_N <= self.range_2[1])])
        for values_2, start in ((self.share_2, [0.5, 0.5]), (self.alpha_2, [1.0, 2.0]), (self.beta_2, [2.0, 1.0])):
            values_2.copy_(torch.tensor(start))
        for _ in range(ITERATIONS):
            posterior_N2 = self._posterior(x_N)
            total_2 = posterior_N2.sum(0)
            mean_2 = (posterior_N2 * x_N[:, None]).sum(0) / total_2
            variance_2 = (posterior_N2 * (x_N[:, None] - mean_2).square()).sum(0) / total_2
            self.alpha_2.copy_(mean_2 * (mean_2 * (1 - mean_2) / variance_2.clamp_min(1e-12) - 1))
            self.beta_2.copy_(self.alpha_2 * (1 - mean_2) / mean_2)
            self.share_2.copy_(total_2 / len(x_N))
        grid = torch.linspace(EDGE, 1 - EDGE, 100).to(x_N)
        self.peak.copy_(grid[self._posterior(grid)[:, 1].argmax()])

    def wrong(self, loss_B: Tensor) -> Tensor:
        """Return P(wrong label | loss), B; where it would fall with growing loss, it stays (the authors' code)."""
        return self._posterior(self._scaled(loss_B.double()).minimum(self.peak))[:, 1].to(loss_B)

    def _scaled(self, loss_B: Tensor) -> Tensor:
        low, high = self.range_2
        return ((loss_B - low) / (high - low + 1e-6)).clamp(EDGE, 1 - EDGE)

    def _posterior(self, x_B: Tensor) -> Tensor:
        x_B1, alpha_2, beta_2 = x_B[:, None], self.alpha_2, self.beta_2
        density_B2 = (alpha_2 - 1) * x_B1.log() + (beta_2 - 1) * (-x_B1).log1p()
        constant_2 = torch.lgamma(alpha_2 + beta_2) - torch.lgamma(alpha_2) - torch.lgamma(beta_2)
        return (self.share_2.log() + density_B2 + constant_2).softmax(1)


@dataclass(frozen=True)
class MCorrection(Objective):
    """Mix examples up, later with targets (1−w)·y + w·z: w = P(wrong | loss) by the mixture, z the likeliest class.

    §3.2 and §3.3.

    From then on with η·Σ_c 1/K·log(1/(K·h̄_c)), h̄ the mean prediction, against one class for all. The mixture is fitted
    once an epoch to the losses seen in training, where the paper predicts for the whole set with a network at rest;
    each pair has a mixing factor of its own, within groups. The ledger's trust is 1 − w.
    """

    warm_up: float = 0.35
    """Share of the run with plain mixup (the authors' code: 105 of 300 epochs)."""
    alpha: float = 32.0
    """Of mixup's Beta(α, α) (the paper: 32)."""
    regularisation: float = 1.0
    """η (the authors' commands: 1)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True

    def __post_init__(self) -> None:
        require(self, ["warm_up"], 0, 1)
        require(self, ["alpha"], 1e-3)
        require(self, ["regularisation"], 0)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return the mixture, with the last loss of each example."""
        return BetaMixture(examples)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory = moment.memory
        assert isinstance(memory, BetaMixture)
        with torch.no_grad():
            logits_BK = model(batch.weak_BCHW)
            loss_B = F.cross_entropy(logits_BK, batch.label_B, reduction="none")
        if moment.step and moment.step % epoch_steps(len(memory.loss_N), batch, workers) == 0:
            memory.fit()
        rows_U, (loss_U,) = seen(batch.row_B, [loss_B], workers)
        memory.loss_N[rows_U] = loss_U.double()

        corrects = moment.progress >= self.warm_up
        wrong_B = memory.wrong(loss_B) if corrects else torch.zeros_like(loss_B)
        given_BK, answer_BK = one_hot(batch.label_B, logits_BK), one_hot(logits_BK.argmax(1), logits_BK)
        target_BK = (1 - wrong_B[:, None]) * given_BK + wrong_B[:, None] * answer_BK

        n = len(batch.group_keys)
        image_nGCHW, target_nGK = batch.weak_BCHW.unflatten(0, (n, -1)), target_BK.unflatten(0, (n, -1))
        draws = mixing_draws(
            batch.group_keys,
            image_nGCHW.shape[1],
            fold=False,
            dtype=loss_B.dtype,
            device=loss_B.device,
            alpha=self.alpha,
        )
        mixed_BK = forward_aside(model, mix(image_nGCHW, *draws).flatten(0, 1))
        parts = {"mixed": cross_entropy(mix(target_nGK, *draws).flatten(0, 1), mixed_BK).mean()}
        total = parts["mixed"]
        if corrects:
            (mean_K,) = workers.mean([mixed_BK.softmax(1).mean(0)])
            parts["one_class"] = -(batch.classes * mean_K).log().mean()
            total = total + self.regularisation * parts["one_class"]
        return Outcome(
            total,
            {name: part.detach() for name, part in parts.items()},
            plain_coefficients(logits_BK, batch.label_B, trust_B=1 - wrong_B),
            logits_BK.softmax(1),
        )
