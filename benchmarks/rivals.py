"""What the authors of a rival method set by the data, or by the length of a run, said for each cell of the tables."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.paper import Cell
from pipeline.cifar import Cifar
from training.engine.schedule import Schedule
from training.objectives.baselines.co_teaching import CoTeaching
from training.objectives.baselines.elr import Elr
from training.objectives.baselines.forward import Forward
from training.objectives.baselines.glc import Glc
from training.objectives.baselines.incv import Incv
from training.objectives.baselines.m_correction import MCorrection
from training.objectives.baselines.mentornet import MentorNet
from training.recipe import Recipe

CIFAR_IMAGES = 50_000
SLOW_START = 10  # epochs in which co-teaching comes to leave out as many as are wrong, in its paper and in INCV's code


def as_its_authors_do(recipe: Recipe, cell: Cell) -> Recipe:
    """Return a cell's recipe, of any scale, with what its method's authors would set there; others as they are."""
    objective, schedule = recipe.objective, recipe.schedule
    images = (recipe.dataset.limit or CIFAR_IMAGES) if isinstance(recipe.dataset, Cifar) else 0
    uniform, rate = cell.noise.startswith("uniform"), told_rate(cell)

    def share_of(epochs: int, steps: int, unknown: float) -> float:
        return min(epochs * images / recipe.batch / steps, 1.0) if images else unknown

    match objective:
        case CoTeaching():
            slow_start = share_of(SLOW_START, schedule.steps, objective.warm_up)
            return replace(recipe, objective=replace(objective, noise_rate=rate, warm_up=slow_start))
        case MentorNet():
            return replace(recipe, objective=replace(objective, percentile=0.75 if rate < 0.6 else 0.5))
        case Incv():
            rest = round((1 - objective.warm_up) * schedule.steps)
            pace = share_of(SLOW_START, rest, objective.pace)
            return replace(recipe, objective=replace(objective, symmetric=uniform, pace=pace))
        case Elr() if cell.noise.startswith("asymmetric"):
            return replace(recipe, objective=replace(objective, strength=1.0, beta=0.9))
        case Forward() | Glc():
            # A training of its own, down to a rate of 0, comes before the correction.
            schedule = halves(schedule) if schedule.cycles == 1 else schedule
            wanted = objective.warm_up * schedule.steps
            objective = replace(
                objective, warm_up=min(schedule.ends, key=lambda end: abs(end - wanted)) / schedule.steps
            )
            if isinstance(objective, Glc) and isinstance(recipe.dataset, Cifar):
                trusted = cell.trusted * recipe.dataset.classes
                objective = replace(objective, trusted_weight=trusted / images * recipe.batch / recipe.probe_batch)
            return replace(recipe, objective=objective, schedule=schedule)
        case MCorrection():
            # Its correction begins just after the rate has fallen to a tenth, at 100 and again at 250 of 300 epochs.
            drops = (schedule.steps // 3, schedule.steps * 5 // 6)
            return replace(recipe, schedule=Schedule(schedule.lr, schedule.steps, cycles=1, drops=drops))
    return recipe


def halves(schedule: Schedule) -> Schedule:
    """Return two equal cycles in place of one."""
    return replace(schedule, first_cycle=schedule.steps // 2, cycles=2, t_mul=1.0, m_mul=1.0)


def told_rate(cell: Cell) -> float:
    """Return the share of wrong labels that a method is told which asks for it."""
    kind, _, rate = cell.noise.partition(":")
    if kind == "uniform":
        return float(rate) * (0.9 if cell.dataset == "cifar10" else 0.99)
    if kind == "asymmetric":
        return float(rate) / 2
    return {"human": 0.4, "semantic": 0.3, "open_set": 0.6, "": 0.2}[kind]
