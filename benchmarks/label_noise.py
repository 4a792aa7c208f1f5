"""Real CIFAR-10 at a size that 2 cores can do: supervised, `reference` and `winnow` under human and uniform noise.

    python -m benchmarks.label_noise --data ../shared/data --out benchmarks/results/label_noise.json

About 40 minutes on 2 cores for 12 runs of 20 epochs, each through the whole stack (Ray Data, one CPU actor, Ray Train,
one worker).
`--data` holds cifar10_train.parquet, cifar10_test.parquet and cifar10_labels.npz.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from pipeline.cifar import Cifar
from pipeline.noise import Noise
from training.engine.schedule import Schedule
from training.launch import guarded, run
from training.objectives.registry import METHODS
from training.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """Say what is run: every noise × method × seed."""

    data: str
    """Folder of CIFAR-10 in Parquet and its label arrays."""
    out: str
    """JSON file of the results, one row a run."""
    methods: tuple[str, ...] = ("supervised", "reference", "winnow")
    """Names of --method."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of split, noise, network and draws."""
    steps: int = 800
    """Steps of the one cosine cycle."""


@dataclass(frozen=True)
class Row:
    """Hold one run."""

    noise: str
    noise_rate: float  # share of training labels really wrong
    method: str
    seed: int
    steps: int
    top1: float  # on all 10,000 test images, at the end of the cycle
    seconds: float


def small(data: str, noise: Noise, method: str, seed: int, steps: int, storage: str) -> Recipe:
    """Return a run on 4,000 images at 16 px, 100 trusted, WRN-10-1 (0.08 M parameters), B = M = 100, one cycle."""
    return Recipe(
        name=f"{noise.kind}-{method}-{seed}",
        dataset=Cifar(noise=noise, size=16, limit=4_000),
        objective=METHODS[method](),
        data=data,
        storage=storage,
        network="wrn-10-1",
        schedule=Schedule(first_cycle=steps, cycles=1),
        group=100,
        actors=1,
        seed=seed,
    )


def main() -> None:
    """Run them all, write the rows as they come, print the table."""
    settings, console = tyro.cli(Settings), Console()
    noises = {
        "human": Noise("labels", source=f"{settings.data}/cifar10_labels.npz:cifar10n_worse_label"),
        "uniform 0.8": Noise("uniform", 0.8),
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as storage:
        for seed in settings.seeds:
            for name, noise in noises.items():
                for method in settings.methods:
                    started = time.monotonic()
                    result = run(small(settings.data, noise, method, seed, settings.steps, storage), console)
                    rate, seconds = result.dataset.noise_rate, round(time.monotonic() - started, 1)
                    assert rate is not None
                    rows.append(Row(name, rate, method, seed, settings.steps, result.top1, seconds))
                    write(settings.out, rows)
    console.print(table(rows))


def write(path: str, rows: list[Row], **about: Any) -> None:
    """Write the rows so far, with the machine they ran on, and what else is to be known `about` them."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    told = {"machine": f"CPU, {os.cpu_count()} cores", **about, "rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(told, indent=1) + "\n")


def table(rows: list[Row], title: str = "CIFAR-10 test accuracy (%)") -> Table:
    """Return mean ± standard deviation over seeds, a row a noise and a column a method."""
    methods = list(dict.fromkeys(row.method for row in rows))
    shown = Table("noise", "labels wrong", *methods, title=title)
    for noise in dict.fromkeys(row.noise for row in rows):
        here = [row for row in rows if row.noise == noise]
        cells = []
        for method in methods:
            top1 = [100 * row.top1 for row in here if row.method == method]
            cells.append(f"{np.mean(top1):.1f} ± {np.std(top1):.1f}" if top1 else "")
        shown.add_row(noise, f"{100 * np.mean([row.noise_rate for row in here]):.1f} %", *cells)
    return shown


if __name__ == "__main__":
    guarded(main)
