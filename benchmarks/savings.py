"""How far the coefficients of the savings of `benchmarks.step` are from exact ones while training, and the accuracy.

    python -m benchmarks.savings --data ../shared/data --seeds 0 1 2 --out benchmarks/results/savings.json
    python -m benchmarks.savings --steps 400 --look 11 201 399 --seeds 0 1 2 --out FILE             on digits

Real CIFAR-10 at 16 px with 80 % uniform noise, WRN-10-1, in one process without Ray; or the digits of the demo, as they
are trained there. The first run trains exactly, and at the steps of `--look` asks every variant for its ω* and λ* of
the same batch and state: `weight_rel_error` is ‖ω* − ω°‖/‖ω°‖, `kept_agreement` the share of examples of which both or
neither count (ω > 0), `trust_agreement` the share of equal λ. ω° and λ° are those of the exact engine in float64. Then
each variant trains by itself to the end of one cosine cycle; `top1` is on all test images. `--data` is as for
`benchmarks.label_noise`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.label_noise import small
from benchmarks.step import VARIANTS
from pipeline.dataset import Dataset
from pipeline.noise import Noise
from pipeline.plan import Plan
from pipeline.stream import Group, make_block
from training import digits
from training.engine.batch import assemble
from training.engine.evaluation import evaluate
from training.engine.schedule import Schedule
from training.engine.setup import new_state
from training.engine.state import TrainState
from training.engine.step import moment_of, update
from training.objectives.ieg import Ieg
from training.objectives.interface import Alone, Batch, Coefficients, Moment
from training.recipe import Recipe

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What is run."""

    out: str
    """JSON file of the results."""
    data: str = ""
    """Folder of CIFAR-10 in Parquet and its label arrays; empty: the digits of the demo, which need none."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of the variants of benchmarks.step train to the end."""
    look: tuple[int, ...] = (11, 151, 299)
    """Steps, from 0, at which all are asked; none: only train."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of split, noise, network and draws."""
    steps: int = 300
    """Steps of the one cosine cycle."""


@dataclass(frozen=True)
class Fidelity:
    """One variant at one step of the exact run."""

    variant: str
    seed: int
    step: int
    weight_rel_error: float
    kept_agreement: float
    trust_agreement: float


@dataclass(frozen=True)
class Accuracy:
    """One run to the end."""

    variant: str
    seed: int
    steps: int
    top1: float


def main() -> None:
    """Look, then train; write the rows as they come."""
    settings = tyro.cli(Settings)
    torch.set_num_threads(1)
    rows: dict[str, list] = {"fidelity": [], "accuracy": []}
    for seed in settings.seeds:
        recipe = recipe_of(settings, seed)
        dataset = recipe.dataset.load(settings.data, seed)
        for row in looks(recipe, dataset, settings.look) if settings.look else ():
            report(settings.out, rows, "fidelity", row)
        for name in settings.variants:
            run = replace(recipe, objective=VARIANTS[name])
            state = new_state(run, 10, len(dataset.train), 1, CPU)
            for step, batch in batches(run, dataset, settings.steps):
                advance(state, run, step, batch)
            measured = evaluate(state, dataset.tests, run.dataset.views, 0, Alone(), CPU)
            report(settings.out, rows, "accuracy", Accuracy(name, seed, settings.steps, measured["top1"]))


def recipe_of(settings: Settings, seed: int) -> Recipe:
    """What all variants train, with the objective in their place."""
    if settings.data:
        return small(settings.data, Noise("uniform", 0.8), "winnow", seed, settings.steps, "")
    schedule = Schedule(first_cycle=settings.steps, cycles=1)
    return replace(digits.recipe("winnow"), seed=seed, schedule=schedule)


def report(path: str, rows: dict[str, list], kind: str, row: Any) -> None:
    """Print a row, and write all so far."""
    print(*(f"{name} {value:.3f}" if isinstance(value, float) else value for name, value in asdict(row).items()))
    rows[kind].append(asdict(row))
    Path(path).write_text(json.dumps({"machine": f"CPU, {os.cpu_count()} cores", **rows}, indent=1) + "\n")


def batches(recipe: Recipe, dataset: Dataset, steps: int) -> Iterator[tuple[int, Batch]]:
    """The stream's batches, made here."""
    probe = recipe.probe_batch // recipe.groups
    plan = Plan(dataset.train.row_groups, recipe.seed, recipe.batch, recipe.group, probe, 0, steps, chunk=1)
    for step in range(steps):
        blocks = range(step * plan.groups, (step + 1) * plan.groups)  # of a group each
        held: list[Group] = [
            make_block(dataset.train, dataset.probe, recipe.dataset.views, plan, block) for block in blocks
        ]
        yield step, assemble(held, recipe, len(dataset.class_names), CPU)


def advance(state: TrainState, recipe: Recipe, step: int, batch: Batch) -> None:
    """One update."""
    lr = recipe.schedule.learning_rate(step)
    update(state, recipe.objective, batch, lr=lr, workers=Alone(), steps=recipe.schedule.steps)


def looks(recipe: Recipe, dataset: Dataset, at: tuple[int, ...]) -> Iterator[Fidelity]:
    """Train exactly until the last of the steps; at each of them compare every variant's coefficients."""
    variants = {name: objective for name, objective in VARIANTS.items() if isinstance(objective, Ieg)}
    state = new_state(recipe, 10, len(dataset.train), 1, CPU)
    for step, batch in batches(recipe, dataset, max(at) + 1):
        if step in at:
            moment = moment_of(state, recipe.schedule.learning_rate(step), recipe.schedule.steps)
            exact = in_float64(variants["exact"], state, batch, moment)
            for name, objective in variants.items():
                found = objective(copy.deepcopy(state.model), batch, moment, Alone()).coefficients
                yield Fidelity(name, recipe.seed, step, *distance(found, exact))
        advance(state, recipe, step, batch)


def in_float64(objective: Ieg, state: TrainState, batch: Batch, moment: Moment) -> Coefficients:
    """The exact coefficients without rounding."""
    images = {name: getattr(batch, name).double() for name in ("weak_BCHW", "strong_BCHW", "probe_MCHW")}
    model = copy.deepcopy(state.model).double()
    moment = replace(moment, descent=moment.descent.to(torch.float64))
    return objective(model, replace(batch, **images), moment, Alone()).coefficients


def distance(found: Coefficients, exact: Coefficients) -> tuple[float, float, float]:
    """(relative error of ω*, share of equal ω > 0, share of equal λ)."""
    error = (found.weight_B - exact.weight_B).norm() / exact.weight_B.norm()
    kept = (found.weight_B > 0) == (exact.weight_B > 0)
    trusts = (found.trust_B > 0.5) == (exact.trust_B > 0.5)
    return float(error), float(kept.double().mean()), float(trusts.double().mean())


if __name__ == "__main__":
    main()
