"""Whether a meta step through the last block or layer alone costs accuracy, and which meta step tells labels best.

    python -m benchmarks.scopes --data ../shared/data --seeds 0 1 2 --out benchmarks/results/scopes.json

The five noises of the small scale (`benchmarks.tables`; docs/results.md), `winnow`, in one process without Ray,
half a minute a run. `accuracy` is of one run for each scope. `judgement` is of the run with the exact scope: at every
8th step from the 20th on each scope is asked for its ω* and λ* of the same batch and state. `weight_auroc` is how well
ω* tells right labels from wrong ones (0.5: not at all), `trust_right` and `trust_wrong` the mean λ* of either.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro
from sklearn.metrics import roc_auc_score

from benchmarks.paper import Cell, cells
from benchmarks.savings import CPU, advance, batches, report
from benchmarks.tables import Settings as Tables
from benchmarks.tables import recipe_of
from pipeline.dataset import Dataset, Examples
from training.engine.evaluation import evaluate
from training.engine.setup import new_state
from training.engine.state import TrainState
from training.engine.step import moment_of
from training.objectives.ieg import Ieg
from training.objectives.interface import Alone, Batch
from training.objectives.meta import MetaScope
from training.recipe import Recipe

SCOPES: tuple[MetaScope, ...] = ("all", "last_block", "last_layer")
FIRST, EVERY = 20, 8  # steps at which all are asked


@dataclass(frozen=True)
class Settings:
    """What is run."""

    out: str
    """JSON file of the results."""
    data: str
    """Folder of CIFAR-10 in Parquet and its label arrays, as for benchmarks.tables."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of split, noise, network and draws."""


@dataclass(frozen=True)
class Accuracy:
    """One run to the end."""

    noise: str
    seed: int
    scope: MetaScope
    top1: float


@dataclass(frozen=True)
class Judgement:
    """One scope's coefficients in the states of one exact run."""

    noise: str
    seed: int
    scope: MetaScope
    weight_auroc: float
    trust_right: float
    trust_wrong: float


def main() -> None:
    """Train every noise with every scope; write the rows as they come."""
    settings = tyro.cli(Settings)
    torch.set_num_threads(1)
    told: dict[str, list] = {"accuracy": [], "judgement": []}
    of_noises = [cell for cell in cells() if cell.table == "A" and cell.method == "winnow"]
    for seed in settings.seeds:
        for cell in of_noises:
            for scope in SCOPES:
                recipe = scoped(recipe_of(cell, Tables(data=settings.data, scale="small"), seed), scope)
                accuracy, judgements = train(recipe, cell, scope)
                report(settings.out, told, "accuracy", accuracy)
                for row in judgements:
                    report(settings.out, told, "judgement", row)


def scoped(recipe: Recipe, scope: MetaScope) -> Recipe:
    """The recipe with another meta scope."""
    assert isinstance(recipe.objective, Ieg)
    return replace(recipe, objective=replace(recipe.objective, meta_scope=scope))


def train(recipe: Recipe, cell: Cell, scope: MetaScope) -> tuple[Accuracy, list[Judgement]]:
    """A run; with the exact scope also what the others would have decided on its way."""
    dataset: Dataset = recipe.dataset.load(recipe.data, recipe.seed)
    state = new_state(recipe, len(dataset.class_names), len(dataset.train), 1, CPU)
    asked: dict[MetaScope, list[np.ndarray]] = {each: [] for each in SCOPES}
    for step, batch in batches(recipe, dataset, recipe.schedule.steps):
        if scope == "all" and step >= FIRST and step % EVERY == 0:
            for each, seen in asked.items():
                seen.append(decided(recipe, each, state, batch, dataset))
        advance(state, recipe, step, batch)
    top1 = evaluate(state, dataset.tests, recipe.dataset.views, 0, Alone(), CPU)["top1"]
    rows = [judgement(cell, recipe.seed, each, np.concatenate(seen, 1)) for each, seen in asked.items() if seen]
    return Accuracy(cell.noise, recipe.seed, scope, top1), rows


def decided(recipe: Recipe, scope: MetaScope, state: TrainState, batch: Batch, dataset: Dataset) -> np.ndarray:
    """Whether each label is right, ω* and λ*, 3×B; the state stays as it is."""
    moment = moment_of(state, recipe.schedule.learning_rate(state.step), recipe.schedule.steps)
    found = scoped(recipe, scope).objective(copy.deepcopy(state.model), batch, moment, Alone()).coefficients
    assert isinstance(dataset.train, Examples)
    assert dataset.train.true_label_N is not None
    right_B = batch.label_B.numpy() == dataset.train.true_label_N[batch.row_B.numpy()]
    return np.stack([right_B, found.weight_B.numpy(), found.trust_B.numpy()])


def judgement(cell: Cell, seed: int, scope: MetaScope, seen_3N: np.ndarray) -> Judgement:
    """What the coefficients of many steps say of the labels."""
    right_N, weight_N, trust_N = seen_3N[0] > 0, seen_3N[1], seen_3N[2]
    means = (float(trust_N[right_N].mean()), float(trust_N[~right_N].mean()))
    return Judgement(cell.noise, seed, scope, float(roc_auc_score(right_N, weight_N)), *means)


if __name__ == "__main__":
    main()
