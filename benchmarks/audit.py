"""Whose labels are wrong, and what is right: the audit of a run against cleanlab, on real human label errors.

    python -m benchmarks.audit --data ../shared/data --out benchmarks/results/audit.json

CIFAR-10N's worst labels on 4,000 CIFAR-10 images at 16 px, 100 trusted images, WRN-10-1 (benchmarks.label_noise's
setting). One side trains once with `winnow` through the whole stack and audits the run. The other trains cross-entropy
on all folds but one, and on the trusted images with their right labels, and gives cleanlab the probabilities of the
fold left out: 5 folds, as cleanlab does by itself. Both spend the same number of floating-point operations, counted by
PyTorch over a step of each.

    auroc             of the quality, for wrong against right labels
    precision_at_n    share of wrong labels among the n of least quality, n being the number of wrong labels there are
    corrected_right   share of all wrong labels that get the right label where the n corrections are made that a method
                      is surest of: for the audit by confidence in the label proposed less probability of the given one,
                      for cleanlab by the quality of the row, of which normalized_margin is made for it
    suspects          share of labels that the method itself calls wrong: the audit's suspects, or find_label_issues
    suspects_wrong    share of these that are
    right_before      share of right labels as given
    right_after       and where all suspects get the label proposed

The true labels serve these figures alone; the audit's formulas were chosen on seed 1. 6 minutes a seed on 2 cores.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.label_noise import small
from pipeline.dataset import Dataset, Examples
from pipeline.noise import Noise
from training.audit import audit
from training.engine.batch import normalised
from training.engine.setup import new_state
from training.engine.state import TrainState
from training.engine.step import update
from training.launch import guarded, run
from training.objectives.interface import Alone, Batch
from training.objectives.registry import METHODS
from training.recipe import Recipe

RANKINGS = ("self_confidence", "normalized_margin")  # cleanlab's default, and its other score for single labels


@dataclass(frozen=True)
class Settings:
    """Say what is run."""

    data: str
    """Folder of CIFAR-10 in Parquet and its label arrays."""
    out: str
    """JSON file of the results."""
    seeds: tuple[int, ...] = (0, 2)
    """Seeds of split, network, folds and draws."""
    steps: int = 800
    """Steps of the `winnow` run, one cosine cycle."""
    folds: int = 5
    """Of the cross-validation."""


@dataclass(frozen=True)
class Row:
    """Hold one method on one seed."""

    method: str
    seed: int
    auroc: float
    precision_at_n: float
    corrected_right: float
    suspects: float
    suspects_wrong: float
    right_before: float
    right_after: float
    trainings: int
    steps: int  # of all trainings
    teraflops: float  # of all trainings
    seconds: float


@dataclass(frozen=True)
class Opinion:
    """Hold what a method says of N labels."""

    quality_N: np.ndarray  # the higher, the better the label
    sure_N: np.ndarray  # the higher, the surer the method is that `proposed_N` is better
    proposed_N: np.ndarray
    suspect_N: np.ndarray


def measured(opinion: Opinion, train: Examples) -> dict[str, Any]:
    """Return the figures that need the truth."""
    assert train.true_label_N is not None
    wrong_N = train.label_N != train.true_label_N
    right_N = opinion.proposed_N == train.true_label_N
    least = np.argsort(opinion.quality_N, kind="stable")[: wrong_N.sum()]
    surest = np.argsort(-opinion.sure_N, kind="stable")[: wrong_N.sum()]
    after_N = np.where(opinion.suspect_N, right_N, ~wrong_N)
    return {
        "auroc": float(roc_auc_score(wrong_N, -opinion.quality_N)),
        "precision_at_n": float(wrong_N[least].mean()),
        "corrected_right": float((wrong_N & right_N)[surest].mean()),
        "suspects": float(opinion.suspect_N.mean()),
        "suspects_wrong": float(wrong_N[opinion.suspect_N].mean()),
        "right_before": float(1 - wrong_N.mean()),
        "right_after": float(after_N.mean()),
    }


def of_audit(recipe: Recipe, console: Console) -> Opinion:
    """Return the opinion of a `winnow` run's audit, examples in the order of their ids."""
    folder = run(recipe, console).folder
    audit.audit(audit.Options(folder, recipe.data), console)
    table = pq.read_table(f"{folder}/{audit.LABELS}").sort_by("id")
    column = {name: table[name].to_numpy() for name in table.column_names}
    surplus_N = column["confidence"] - column["probability"]
    sure_N = np.where(column["proposed"] == column["label"], -1, surplus_N)
    return Opinion(column["quality"], sure_N, column["proposed"], column["suspect"])


def of_cleanlab(train: Examples, probability_NK: np.ndarray, ranking: str) -> Opinion:
    """Return the opinion of cleanlab with these out-of-sample probabilities."""
    quality_N = get_label_quality_scores(train.label_N, probability_NK, method=ranking)
    suspect_N = find_label_issues(train.label_N, probability_NK, n_jobs=1)
    return Opinion(quality_N, -quality_N, probability_NK.argmax(1), suspect_N)


def cross_validated(recipe: Recipe, dataset: Dataset, folds: int, steps: int) -> np.ndarray:
    """Return each training example's probabilities, N×K, by a network trained for `steps` steps on other folds."""
    train, probe = dataset.train, dataset.probe
    assert isinstance(train, Examples)
    rng = np.random.default_rng(recipe.seed)
    fold_N = rng.permutation(np.arange(len(train)) % folds)
    schedule = replace(recipe.schedule, first_cycle=steps)
    probability_NK = np.empty((len(train), len(dataset.class_names)))
    for fold in range(folds):
        rows = np.flatnonzero(fold_N != fold)
        image_NHWC = np.concatenate([train.image_N[rows], probe.image_N])
        label_N = np.concatenate([train.label_N[rows], probe.label_N])
        state = new_state(recipe, len(dataset.class_names), len(train), 1, torch.device("cpu"))
        order = np.concatenate([rng.permutation(len(label_N)) for _ in range(-(-steps * recipe.batch // len(label_N)))])
        for step in range(steps):
            chosen = order[step * recipe.batch : (step + 1) * recipe.batch]
            weak_BHWC = np.stack([recipe.dataset.views.weak(image, rng) for image in image_NHWC[chosen]])
            batch = noisy_batch(weak_BHWC, label_N[chosen], len(dataset.class_names))
            update(state, recipe.objective, batch, lr=schedule.learning_rate(step), workers=Alone())
        held = np.flatnonzero(fold_N == fold)
        probability_NK[held] = predicted(state, train.image_N[held])
    return probability_NK


def noisy_batch(weak_BHWC: np.ndarray, label_B: np.ndarray, classes: int) -> Batch:
    """Return a batch for cross-entropy, which looks at the weak views alone."""
    weak_BCHW = normalised(torch.from_numpy(weak_BHWC))
    label = torch.from_numpy(label_B)
    return Batch(weak_BCHW, weak_BCHW, label, torch.arange(len(label)), weak_BCHW, label, (0,), classes)


def predicted(state: TrainState, image_NHWC: np.ndarray) -> np.ndarray:
    """Return probabilities, N×K, in float64, whose rows add up to 1."""
    parts = [state.predict(normalised(part)) for part in torch.from_numpy(image_NHWC).split(500)]
    return torch.cat(parts).double().softmax(1).numpy()


def flops_of_a_step(recipe: Recipe, classes: int) -> int:
    """Return the floating-point operations of one step of the recipe's objective, counted by PyTorch."""
    state = new_state(recipe, classes, recipe.batch, 1, torch.device("cpu"))
    size = recipe.dataset.views.test(np.zeros((16, 16, 3), np.uint8)).shape[0]
    image = np.zeros((recipe.batch, size, size, 3), np.uint8)
    batch = noisy_batch(image, np.arange(recipe.batch) % classes, classes)
    with FlopCounterMode(display=False) as counter:
        update(state, recipe.objective, batch, lr=0.1, workers=Alone())
    return counter.get_total_flops()


def spent(trainings: int, steps: int, flops: int, seconds: float) -> dict[str, Any]:
    """Return what a method cost: `steps` of all its trainings, of `flops` each."""
    return {"trainings": trainings, "steps": steps, "teraflops": round(flops * steps / 1e12, 2), "seconds": seconds}


def compare(settings: Settings, seed: int, console: Console) -> list[Row]:
    """Run both sides on one seed."""
    noise = Noise("labels", source=f"{settings.data}/cifar10_labels.npz:cifar10n_worse_label")
    with tempfile.TemporaryDirectory() as storage:
        recipe = small(settings.data, noise, "winnow", seed, settings.steps, storage)
        plain = replace(recipe, objective=METHODS["supervised"]())
        dataset = recipe.dataset.load(recipe.data, seed)
        assert isinstance(dataset.train, Examples)
        classes = len(dataset.class_names)
        flops, plain_flops = flops_of_a_step(recipe, classes), flops_of_a_step(plain, classes)
        started = time.monotonic()
        opinion = of_audit(recipe, console)
        seconds = round(time.monotonic() - started, 1)
    rows = [Row("winnow", seed, **measured(opinion, dataset.train), **spent(1, settings.steps, flops, seconds))]
    steps = round(flops * settings.steps / (plain_flops * settings.folds))
    started = time.monotonic()
    probability_NK = cross_validated(plain, dataset, settings.folds, steps)
    seconds = round(time.monotonic() - started, 1)
    cost = spent(settings.folds, settings.folds * steps, plain_flops, seconds)
    for ranking in RANKINGS:
        opinion = of_cleanlab(dataset.train, probability_NK, ranking)
        rows.append(Row(f"cleanlab, {ranking}", seed, **measured(opinion, dataset.train), **cost))
    return rows


def main() -> None:
    """Run all seeds, write the rows as they come, print the table."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in settings.seeds:
        rows += compare(settings, seed, console)
        told = {"machine": f"CPU, {os.cpu_count()} cores", "rows": [asdict(row) for row in rows]}
        Path(settings.out).write_text(json.dumps(told, indent=1) + "\n")
    shown = Table("method", "seed", "AUROC", "precision at n", "corrected right", "labels right after", "TFLOP")
    for row in rows:
        figures = (row.auroc, row.precision_at_n, row.corrected_right, row.right_after)
        shown.add_row(row.method, str(row.seed), *(f"{figure:.3f}" for figure in figures), f"{row.teraflops:.1f}")
    console.print(shown)


if __name__ == "__main__":
    guarded(main)
