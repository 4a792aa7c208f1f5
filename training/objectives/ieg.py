"""The full method of "Distilling Effective Supervision from Severe Label Noise" (CVPR 2020), and its presets.

Shapes: B noisy examples, M probe examples in n groups of R, N training examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Alone, Batch, Coefficients, Moment, Objective, Outcome, Workers
from training.objectives.losses import (
    cross_entropy,
    forward_aside,
    is_affine,
    kl_divergence,
    logit_norm,
    mixed_pass,
    normalised_weights,
    one_hot,
    pool_draws,
    settled,
    sharpen,
)
from training.objectives.meta import Engine, Lookahead, MetaProblem, MetaScope, meta_gradient
from training.objectives.tangents import Recorded


@dataclass(frozen=True)
class Ieg(Objective):
    """Learn weights ω and label trust λ by a meta step; mix with the trusted images; keep both views consistent.

    The defaults are the `reference` preset. Steps and symbols: docs/method.md, "One training step".
    """

    p: float = 5.0
    """Weight of the mixup loss on noisy examples, L_β^u (CIFAR 5, WebVision 4, Food-101N and Clothing1M 1)."""
    kl: float = 20.0
    """Weight k of the consistency loss L_KL (CIFAR 20, WebVision mini 8, full 4, Food-101N 14, Clothing1M 3.5)."""
    threshold: float = 1.0
    """T: in mixup, examples whose ω* (summing to 1 over the batch) is at least T keep their label; 1 or more: none."""
    lambda0: float = 0.9
    """λ0, the initial trust in the given label, 0 to 1 (§4.3)."""
    temperature: float = 0.5
    """τ of the pseudo labels' sharpening (eq. 3)."""
    label_weight: float = 0.5
    """c, the weight of L_ω* + L_λ* (the authors' code ½, the paper 1)."""
    engine: Engine = "forward"
    """How the meta gradient is computed: exactly by forward mode, or by second order (slower, and larger)."""
    meta_scope: MetaScope = "all"
    """The meta step looks at all parameters (exact), or at those of the last block or layer alone (cheaper)."""
    scope: Literal["global", "replica"] = "global"
    """Coefficients and logit norm over all workers, independent of their number, or per worker (the authors' code)."""
    lookahead: Lookahead = "momentum"
    """The step the meta gradient looks past: with the optimiser's momentum, plain "sgd", or "l2r" (ω0 = 0: none)."""
    lookahead_lr: float | None = 0.1
    """Step size α of the lookahead; None follows the scheduled learning rate (the paper)."""
    probe_decay: bool = True
    """Weight decay inside the meta loss (the authors' code)."""
    weights: Literal["gradient", "step"] = "gradient"
    """ω* from max(−∂L/∂ω, 0) (the authors' code) or from max(ω0 − ∂L/∂ω, 0) (the paper); normalised either way."""
    logit_norm: bool = True
    """Divide logits by their root mean square in pseudo labels and mixup losses (the authors' code)."""
    kl_into_weak: bool = False
    """Let the consistency loss's gradient flow into the weak view too (the paper)."""
    fold_beta: bool = True
    """Mixup factor max(β, 1−β), so that the first of each pair dominates (the authors' code)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters (the authors' code)."""
    relabel: bool = True
    """λ: choose between label and pseudo label (Table 9); off: every label is believed and L_λ* is left out."""
    paced: bool = False
    """Judge answers relative to the average answer, believe a pseudo label as far as it is sure and the given label for
    the rest, and move p from 1 and k from 0 to their full values with the mean of that (the `winnow` preset)."""
    mixup: Literal["on", "unmixed", "off"] = "on"
    """L_β on mixed pairs, on the same rows without mixing (M-9, M-10), or left out (M-6)."""

    def __post_init__(self) -> None:
        for name in ("p", "kl", "threshold", "label_weight"):
            if not getattr(self, name) >= 0:  # NaN too
                raise ValueError(f"objective.{name} is {getattr(self, name)}: it must be 0 or more")
        if not 0 <= self.lambda0 <= 1:
            raise ValueError(f"objective.lambda0 is {self.lambda0}: it must be between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"objective.temperature is {self.temperature}: it must be above 0")
        if self.lookahead_lr is not None and not self.lookahead_lr > 0:
            raise ValueError(f"objective.lookahead_lr is {self.lookahead_lr}: it must be above 0, or None")
        if self.lookahead == "l2r" and self.relabel:
            raise ValueError(
                "objective.lookahead l2r has ω0 = 0, which hides λ: set objective.relabel to False with it"
            )

    @property
    def steady(self) -> bool:
        """See `Objective`."""
        return self.lookahead_lr is not None

    @property
    def forward_mode(self) -> bool:
        """See `Objective`."""
        return self.meta_scope == "all"

    def draws(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return mixup's partners and factors."""
        return pool_draws(batch, fold=self.fold_beta) if self.mixup == "on" else ()

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        if self.scope == "replica":
            workers = Alone()
        moves_all = self.engine == "forward" and self.meta_scope == "all"
        with Recorded(keeps=moves_all) as recorded:
            weak_BK = model(batch.weak_BCHW)
        strong_BK = self._strong_logits(model, batch, weak_BK)
        given_BK = one_hot(batch.label_B, weak_BK)
        sharp_BK, pseudo_BK, pace = self._pseudo_labels(weak_BK.detach(), strong_BK.detach(), given_BK, workers)
        confidence_B, pseudo_label_B = sharp_BK.max(1)

        total, parts = weak_BK.new_zeros(()), {}
        if self.kl > 0:
            anchor_BK = weak_BK if self.kl_into_weak else weak_BK.detach()
            parts["consistency"] = kl_divergence(anchor_BK, strong_BK).mean()
            total = self.kl * pace * parts["consistency"]
            if recorded.calls and not self.kl_into_weak:
                total = settled(total, model)  # the activations of the strong views make room for the record

        trust0 = self.lambda0 if self.relabel else 1.0
        problem = MetaProblem(
            model, batch, moment, workers, weak_BK, given_BK, pseudo_BK, trust0,
            self.lookahead_lr or moment.lr, self.lookahead, self.probe_decay, scope=self.meta_scope,
            recorded=recorded,
        )  # fmt: skip
        weight_B, trust_B = self._coefficients(problem)
        del problem, recorded  # they hold activations

        log_BK = F.log_softmax(weak_BK, 1)
        target_BK = trust0 * given_BK + (1 - trust0) * pseudo_BK
        parts["weighted"] = -(weight_B * (target_BK * log_BK).sum(1)).mean()
        total = total + self.label_weight * parts["weighted"]
        if self.relabel:
            chosen_BK = trust_B[:, None] * given_BK + (1 - trust_B[:, None]) * pseudo_BK
            parts["relabelled"] = -(chosen_BK * log_BK).sum(1).mean()
            total = total + self.label_weight * parts["relabelled"]
        if self.mixup != "off":
            total = settled(total, model)  # the joint pass is the largest: let it be alone in memory
            label_BK = self._mixup_labels(weight_B, given_BK, pseudo_BK, workers)
            views = (weak_BK, strong_BK)
            parts["mixed_probe"], parts["mixed_noisy"] = self._mixup_losses(model, batch, label_BK, workers, views)
            total = total + parts["mixed_probe"] + min(self.p, 1.0) * max(self.p, 1.0) ** pace * parts["mixed_noisy"]

        log_BK = log_BK.detach()
        loss_B = F.nll_loss(log_BK, batch.label_B, reduction="none")
        return Outcome(
            total,
            {name: part.detach() for name, part in parts.items()},
            Coefficients(weight_B, trust_B, pseudo_label_B, confidence_B, loss_B),
            log_BK.exp(),
        )

    def _strong_logits(self, model: nn.Module, batch: Batch, weak_BK: Tensor) -> Tensor:
        """Return logits of the strong views, B×K, or those of the weak ones where none are needed."""
        if not self.relabel and self.mixup == "off" and not self.kl:
            return weak_BK
        with torch.set_grad_enabled(self.kl > 0 or is_affine(model)):  # whose logits are mixed
            return forward_aside(model, batch.strong_BCHW)

    def _pseudo_labels(
        self, weak_BK: Tensor, strong_BK: Tensor, given_BK: Tensor, workers: Workers
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sharpened guesses and the pseudo labels made of them, B×K each, and the pace of p and k, 0 to 1.

        Paced, a pseudo label is believed as far as its guess is sure, and the given label for the rest.
        """
        guess_BK = self._guesses(weak_BK, strong_BK, workers)
        sharp_BK = sharpen(guess_BK, self.temperature)
        if not self.paced:
            return sharp_BK, sharp_BK, weak_BK.new_ones(())
        # 0 where a guess says no more than the average one, 1 where it is certain.
        classes = given_BK.shape[1]
        credence_B = (guess_BK.amax(1) - 1 / classes) / (1 - 1 / classes)
        pseudo_BK = credence_B[:, None] * sharp_BK + (1 - credence_B[:, None]) * given_BK
        return sharp_BK, pseudo_BK, workers.mean([credence_B.mean()])[0]

    def _mixup_labels(self, weight_B: Tensor, given_BK: Tensor, pseudo_BK: Tensor, workers: Workers) -> Tensor:
        """Return the targets of noisy examples in mixup, B×K (step 5)."""
        if self.threshold >= 1:
            return pseudo_BK
        # T is compared with ω* as it sums to 1; `weight_B` is relative to 1/B.
        keeps_B = weight_B >= self.threshold * len(weight_B) * workers.size
        return torch.where(keeps_B[:, None], given_BK, pseudo_BK)

    def _guesses(self, weak_BK: Tensor, strong_BK: Tensor, workers: Workers) -> Tensor:
        """Return the mean answer to both views, B×K, before sharpening (step 3, eq. 3).

        Paced, it is divided by the average answer over the global batch: what is said of every image alike cannot make
        a pseudo label, however confident it is, and no class can crowd out the others. A batch much smaller than K sees
        too few classes for that and makes all guesses modest (docs/log.md).
        """
        views = logit_norm([weak_BK, strong_BK], workers) if self.logit_norm else [weak_BK, strong_BK]
        guess_BK = (views[0].softmax(1) + views[1].softmax(1)) / 2
        if self.paced:
            guess_BK = guess_BK / workers.mean([guess_BK.mean(0)])[0].clamp_min(1e-12)
            guess_BK = guess_BK / guess_BK.sum(1, keepdim=True)
        return guess_BK

    def _coefficients(self, problem: MetaProblem) -> tuple[Tensor, Tensor]:
        """Return (ω* relative to 1/B, λ*), B each (step 4, eqs. 2 and 6)."""
        omega_gradient_B, lambda_gradient_B = meta_gradient(self.engine, problem)
        initial = problem.omega0 if self.weights == "step" else 0.0
        weight_B = normalised_weights(initial - omega_gradient_B, problem.workers)
        trust_B = (lambda_gradient_B < 0).to(weight_B.dtype) if self.relabel else torch.ones_like(weight_B)
        return weight_B, trust_B

    def _mixup_losses(
        self, model: nn.Module, batch: Batch, label_BK: Tensor, workers: Workers, views: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return (L_β^p, L_β^u) (step 5, eq. 9)."""
        mixed = mixed_pass(model, batch, label_BK, fold=self.fold_beta, mixes=self.mixup == "on", views=views)
        logits = [mixed.probe_logits, mixed.noisy_logits]
        if self.logit_norm:
            logits = logit_norm(logits, workers)
        return (
            cross_entropy(mixed.probe_target, logits[0]).mean(),
            cross_entropy(mixed.noisy_target, logits[1]).mean(),
        )


def reference() -> Ieg:
    """Return what made the published numbers: the authors' code."""
    return Ieg()


def paper() -> Ieg:
    """Return the equations as printed."""
    return Ieg(
        label_weight=1.0,
        lookahead_lr=None,
        probe_decay=False,
        weights="step",
        logit_norm=False,
        kl_into_weak=True,
        fold_beta=False,
        average_parameters=False,
    )


def winnow() -> Ieg:
    """Return ours: the same method, made safe for any budget, as pseudo labels and consistency earn their weight."""
    return Ieg(paced=True, logit_norm=False)


def ablation(number: int, base: Ieg) -> Ieg:
    """Return one of M-1 … M-10 of Table 9: 1–5 build the method up, 6–8 take a piece away, 9–10 do not mix.

    Read as docs/method.md does, "Ablations". The policy augmentation column (off in 1, 2, 7) and the probe size (1 a
    class in 10) belong to the data set.
    Raises ValueError for other numbers.
    """
    without_mixup = replace(base, mixup="off", kl=0.0)
    variants = {
        1: replace(
            without_mixup, relabel=False, lookahead="l2r", weights="gradient", probe_decay=False, label_weight=1.0
        ),
        2: without_mixup,
        3: without_mixup,
        4: replace(base, kl=0.0),
        5: base,
        6: replace(base, mixup="off"),
        7: base,
        8: replace(base, relabel=False),
        9: replace(base, mixup="unmixed"),
        10: replace(base, mixup="unmixed"),
    }
    if number not in variants:
        raise ValueError(f"there is no ablation M-{number}: Table 9 has M-1 to M-10")
    return variants[number]
