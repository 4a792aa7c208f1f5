"""Whether what a sweep finds on features is a start for the run on pixels: p, k and λ0, ranked by both.

    python -m benchmarks.carry_over --data ../shared/data --cache ../embedded --out benchmarks/results/carry_over.json

Points spread over the ranges of the objective (scrambled Sobol) train `winnow` twice on CIFAR-10N's worst labels as
benchmarks.heads has them, seed 0: as a head on features, 600 steps, and as WRN-10-1 on the pixels, 400 steps. Both are
read on test images. Printed are the rank correlation of the two accuracies, and what the pixels' run gets with the
features' best point, beside its own best and the mean of all. Half an hour of one core.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from scipy.stats import qmc, spearmanr

from benchmarks import heads
from benchmarks.label_noise import small
from pipeline.noise import Noise
from training import custom
from training.launch import guarded, on_features, run
from training.objectives.ieg import Ieg, winnow

STEPS = 400  # on pixels
LOW, HIGH = (0.0, 0.0, 0.3), (4.5, 4.5, 0.95)  # log2 of p and of k, λ0


@dataclass(frozen=True)
class Settings:
    """Say what is run."""

    data: str
    """Folder of CIFAR-10 in Parquet and its label arrays."""
    cache: str
    """Folder of embeddings, as benchmarks.heads keeps them."""
    out: str
    """JSON file of the results, one row a point; what is there already is not run again."""
    points: int = 8
    """How many."""
    seed: int = 0
    """Of split, features, network and draws."""


def points(count: int) -> list[Ieg]:
    """Return objectives spread over the ranges."""
    drawn_N3 = qmc.scale(qmc.Sobol(3, seed=0).random(count), LOW, HIGH)
    return [
        replace(winnow(), p=round(2**p, 2), kl=round(2**k, 2), lambda0=round(trust, 2))
        for p, k, trust in drawn_N3.tolist()
    ]


def main() -> None:
    """Run what is missing, write the rows as they come, print what they come to."""
    settings, console, quiet = tyro.cli(Settings, description=__doc__), Console(), Console(file=io.StringIO())
    torch.set_num_threads(1)
    out = Path(settings.out)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    made = heads.sample(settings.data, heads.HUMAN, settings.seed)
    how, looks_NLD = heads.embedded(made, heads.Settings(settings.data, settings.cache, ""))
    noise = Noise("labels", source=f"{settings.data}/{heads.WORST}")
    with tempfile.TemporaryDirectory() as folder:
        heads.store(made, how, looks_NLD, folder)
        head = replace(
            custom.features("winnow", len(made.of("train"))), data=folder, storage=folder, seed=settings.seed
        )
        pixels = replace(small(settings.data, noise, "winnow", settings.seed, STEPS, folder), workers=0)
        for number, objective in enumerate(points(settings.points)[len(rows) :], len(rows)):
            of_features = run(on_features(replace(head, name=f"head-{number}", objective=objective)), quiet).top1
            of_pixels = run(replace(pixels, name=f"pixels-{number}", objective=objective), quiet).top1
            point = {"p": objective.p, "k": objective.kl, "lambda0": objective.lambda0}
            rows.append({**point, "features": of_features, "pixels": of_pixels})
            console.print(rows[-1])
            told = {"machine": f"CPU, {os.cpu_count()} cores", "seed": settings.seed, "steps": STEPS, "rows": rows}
            out.write_text(json.dumps(told, indent=1) + "\n")
    of_features_N, of_pixels_N = (np.array([row[name] for row in rows]) for name in ("features", "pixels"))
    console.print(f"rank correlation {spearmanr(of_features_N, of_pixels_N).statistic:.2f}")
    chosen = of_pixels_N[of_features_N.argmax()]
    console.print(
        f"pixels with the features' best point {chosen:.1%}, their own best {of_pixels_N.max():.1%}, "
        f"mean {of_pixels_N.mean():.1%}"
    )


if __name__ == "__main__":
    guarded(main)
