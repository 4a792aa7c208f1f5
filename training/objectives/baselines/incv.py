"""INCV, "Understanding and utilizing deep neural networks trained with noisy labels" (Chen et al. 2019).

Shapes: B noisy examples of this worker, U different ones of the global batch, N of the training set, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.baselines.co_teaching import smallest
from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers, require
from training.objectives.losses import forward_aside, plain_coefficients
from training.objectives.memory import SEED, fresh_copy, seen

MUCH = 0.6  # noise above which the selected ones train alone for longer (the authors' code)
REMOVED = 2.0  # the most examples that are removed for one that is selected (the authors' code)


class Selection(nn.Module):
    """Hold the second network g, each example's half, and what cross-validation has made of it so far."""

    second_N: Tensor  # whether f's training leaves it out, and g's has it
    selected_N: Tensor
    removed_N: Tensor
    agrees_N: Tensor  # whether the network that leaves it out predicted its label, when it was seen last in this round
    loss_N: Tensor  # of that prediction; −∞ where it was not seen in this round
    noise_rate: Tensor

    def __init__(self, model: nn.Module, examples: int) -> None:
        super().__init__()
        self.network = fresh_copy(model)
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(SEED))
        self.register_buffer("second_N", order % 2 == 1)
        for name in ("selected_N", "removed_N", "agrees_N"):
            self.register_buffer(name, torch.zeros(examples, dtype=torch.bool))
        self.register_buffer("loss_N", torch.full((examples,), -torch.inf, dtype=torch.float64))
        self.register_buffer("noise_rate", torch.full((), torch.nan, dtype=torch.float64))

    def close_round(self, classes: int, symmetric: bool) -> None:
        """Select what was predicted as labelled; remove, in each half, ε/(1−ε) as many of the largest losses.

        Where noise is not symmetric nothing is removed, and ε is that of a class taken for one other (the authors'
        code has K−1 there too).
        """
        candidate_N = ~(self.selected_N | self.removed_N)
        judged_N = candidate_N & self.loss_N.isfinite()
        chosen_N = judged_N & self.agrees_N
        if self.noise_rate.isnan():
            classes = classes if symmetric else 2
            self.noise_rate.copy_(noise_rate(chosen_N.sum().double() / judged_N.sum().clamp_min(1), classes))
        ratio = (self.noise_rate / (1 - self.noise_rate)).clamp_max(REMOVED) if symmetric else 0.0
        for half_N in (self.second_N, ~self.second_N):
            loss_N = self.loss_N.where(judged_N & half_N & ~chosen_N, -torch.inf)
            worst_N = loss_N.argsort(descending=True, stable=True)[: int(ratio * (chosen_N & half_N).sum())]
            self.removed_N[worst_N[loss_N[worst_N].isfinite()]] = True
        self.selected_N |= chosen_N
        self.agrees_N.zero_()
        self.loss_N.fill_(-torch.inf)


def noise_rate(agreement: Tensor, classes: int) -> Tensor:
    """Return ε of symmetric noise, by (1−ε)² + ε²/(K−1) = the share of predictions that agree with labels.

    At most 1 − 1/K. With K = 2, ε of noise by which each class is mistaken for one other.
    """
    worst = 1 - 1 / classes
    return worst * (1 - (1 - (1 - agreement) / worst).clamp_min(0).sqrt())


@dataclass(frozen=True)
class Incv(Objective):
    """Select examples by cross-validation, round by round; then let two networks teach each other on them.

    Algorithms 2 and 3. In a round f learns from the selected S and one half of the candidates C, g from S and the other
    half; what the network that left an example out predicts as labelled joins S, the largest losses leave C. Then
    co-teaching on S, and later on as many examples of S and C together. Networks go on from round to round, where the
    paper starts anew, so halves are drawn once; the last prediction in a round judges. Of a batch only what the stage
    uses counts.
    """

    warm_up: float = 0.5
    """Share of the run for cross-validation (the paper: 4 rounds of 50 epochs, then 200)."""
    rounds: int = 4
    """Rounds of cross-validation; each should be an epoch at least."""
    symmetric: bool = True
    """Whether a wrong label may be of any class, as under uniform noise; else of one (the authors' code: sym, asym)."""
    pace: float = 0.05
    """T_k as a share of the rest: until then co-teaching keeps less and less (authors' code: 10 epochs of 200)."""
    selected_only: float = 0.2
    """Share of the rest without C, twice that at an ε above 0.6 or where noise is not symmetric (authors' code: 40 and
    80 of 200 epochs)."""
    average_parameters: bool = True
    """Evaluate an exponential moving average of the parameters, so that methods are compared alike."""
    staged = True

    def __post_init__(self) -> None:
        require(self, ["warm_up"], 0.01, 0.99)
        require(self, ["rounds"], 1)
        require(self, ["pace", "selected_only"], 0, 1)

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return g, and what became of every example."""
        return Selection(model, examples)

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        memory, row_B = moment.memory, batch.row_B
        assert isinstance(memory, Selection)
        if moment.step and self._round(moment, moment.step) > self._round(moment, moment.step - 1):
            memory.close_round(batch.classes, self.symmetric)
        f_BK, g_BK = model(batch.weak_BCHW), forward_aside(memory.network, batch.weak_BCHW)
        f_B, g_B = (F.cross_entropy(logits_BK, batch.label_B, reduction="none") for logits_BK in (f_BK, g_BK))
        second_B, selected_B = memory.second_N[row_B], memory.selected_N[row_B]
        candidate_B = ~(selected_B | memory.removed_N[row_B])

        if moment.progress < self.warm_up:
            right_B = torch.where(second_B, f_BK.argmax(1), g_BK.argmax(1)) == batch.label_B
            rows_U, (right_U, loss_U) = seen(row_B, [right_B.to(f_B), torch.where(second_B, f_B, g_B)], workers)
            memory.agrees_N[rows_U], memory.loss_N[rows_U] = right_U > 0.5, loss_U.double()
            weight_B = equal_weights((selected_B | (candidate_B & ~second_B)).to(f_B), workers)
            weight_of_g_B = equal_weights((selected_B | (candidate_B & second_B)).to(f_B), workers)
        else:
            done = (moment.progress - self.warm_up) / (1 - self.warm_up)
            others = batch.classes - 1 if self.symmetric else 1
            squared, agreeing = memory.noise_rate.square(), others * (1 - memory.noise_rate).square()
            wrong = float(squared / (squared + agreeing))  # of S: what both networks get wrong alike
            alone = self.selected_only * (2 if float(memory.noise_rate) > MUCH or not self.symmetric else 1)
            among_B = selected_B if done < alone else selected_B | candidate_B
            pace = min(done / self.pace, 1) if self.pace else 1
            count = round(int(workers.gather(selected_B).sum()) * (1 - wrong * pace))
            good_for_f_B, good_for_g_B = (
                among_B & smallest(loss_B.masked_fill(~among_B, torch.inf), max(count, 1), workers)
                for loss_B in (g_B, f_B)
            )
            weight_B, weight_of_g_B = (
                equal_weights(each_B.to(f_B), workers) for each_B in (good_for_f_B, good_for_g_B)
            )
        loss, loss_of_g = (weight_B * f_B).mean(), (weight_of_g_B * g_B).mean()
        return Outcome(
            loss + loss_of_g,
            {"kept": loss.detach(), "kept_by_peer": loss_of_g.detach()},
            plain_coefficients(f_BK, batch.label_B, weight_B=weight_B),
            f_BK.detach().softmax(1),
        )

    def _round(self, moment: Moment, step: int) -> int:
        # The round that a step belongs to, from 0; `rounds` from the end of the warm-up on.
        return min(int(self.rounds * step / (self.warm_up * moment.steps)), self.rounds)


def equal_weights(used_B: Tensor, workers: Workers) -> Tensor:
    """Return equal weights for what is used (1, the rest 0), relative to 1/B of the global batch; all 0 for none."""
    return used_B / workers.mean([used_B.mean()])[0].clamp_min(1e-12)
