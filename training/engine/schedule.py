"""Cosine learning rate with warm restarts (SGDR, Loshchilov & Hutter 2017) and a warm-up, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Set the learning rate of every step: in each cycle it falls to 0 along a half cosine.

    Cycle i lasts `first_cycle`·`t_mul`^i steps and starts at `lr`·`m_mul`^i. Cycle lengths are real numbers, as in the
    authors' code: 500 steps and 11 cycles end at step 85,498 (docs/method.md, "Optimisation").
    """

    lr: float = 0.1
    """Learning rate at the start of the first cycle (paper: 0.1)."""
    first_cycle: int = 500
    """Steps of the first cycle (paper: one epoch; 500 in the runs that made Table 1)."""
    cycles: int = 11
    """Cycles to train for: results are read at a cycle's end, so this decides the number of steps."""
    t_mul: float = 1.5
    """Each cycle's length relative to the one before (paper: 1.5)."""
    m_mul: float = 0.9
    """Each cycle's starting learning rate relative to the one before (paper: 0.9)."""
    drops: tuple[int, ...] = ()
    """Steps at which the rate falls to a tenth, staying the same between, instead of along cosines (figure 2's other
    curves: 40000 50000)."""
    warm_up: int = 0
    """Steps at the start at lower rates, which pretrained networks and AdamW want; they are part of the first cycle."""
    warm_up_kind: Literal["linear", "constant"] = "linear"
    """Whether rates rise in a line to the schedule's own, or are a tenth of it until then."""

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and 0 < self.m_mul < math.inf):
            raise ValueError(f"schedule.lr is {self.lr} and m_mul {self.m_mul}: both must be above 0")
        if self.first_cycle < 1 or self.cycles < 1:
            raise ValueError(
                f"schedule.first_cycle is {self.first_cycle} and cycles {self.cycles}: both must be 1 or more"
            )
        if self.warm_up < 0:
            raise ValueError(f"schedule.warm_up is {self.warm_up}: it must be 0 or more")
        if not self.t_mul >= 1:
            raise ValueError(f"schedule.t_mul is {self.t_mul}: it must be 1 or more")

    def start(self, cycle: int) -> float:
        """Return where a cycle starts, in steps; rounding errors of the power do not count as a part of a step."""
        if self.t_mul == 1:
            return float(self.first_cycle * cycle)
        return round(self.first_cycle * (self.t_mul**cycle - 1) / (self.t_mul - 1), 6)

    @property
    def ends(self) -> list[int]:
        """Return the number of steps done at the end of each cycle."""
        return [math.ceil(self.start(cycle)) for cycle in range(1, self.cycles + 1)]

    @property
    def steps(self) -> int:
        """Return the steps of the whole run: the end of the last cycle."""
        return self.ends[-1]

    def filling(self, steps: int) -> Schedule:
        """Return whole cycles that fill `steps`, but for rounding, the first as near as can be to this schedule's."""

        def first_of(cycles: int) -> int:
            return max(int(steps / replace(self, first_cycle=1).start(cycles)), 1)

        cycles = 1
        while first_of(cycles) > self.first_cycle:
            cycles += 1
        nearest = min((max(cycles - 1, 1), cycles), key=lambda count: abs(math.log(first_of(count) / self.first_cycle)))
        return replace(self, first_cycle=first_of(nearest), cycles=nearest)

    def cycle(self, step: int) -> int:
        """Return the cycle that step `step` (from 0) belongs to, from 0."""
        cycle = 0
        while self.start(cycle + 1) <= step:
            cycle += 1
        return cycle

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`, from 0."""
        if step >= self.warm_up:
            return self._full_rate(step)
        return self._full_rate(step) * (0.1 if self.warm_up_kind == "constant" else (step + 1) / (self.warm_up + 1))

    def _full_rate(self, step: int) -> float:
        cycle = self.cycle(step)
        if self.drops:
            return self.lr * self.m_mul**cycle * 0.1 ** sum(drop <= step for drop in self.drops)
        begin, end = self.start(cycle), self.start(cycle + 1)
        done = (step - begin) / (end - begin)
        return self.lr * self.m_mul**cycle * (1 + math.cos(math.pi * done)) / 2
