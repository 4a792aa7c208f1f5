"""The demo: handwritten digits with 80 % label noise, plain cross-entropy against the full method."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import fsspec
from rich.console import Console

from pipeline.digits import Digits
from training import report
from training.engine.schedule import Schedule
from training.launch import guarded, run
from training.objectives.baselines.supervised import Supervised
from training.objectives.registry import METHODS
from training.recipe import Recipe, parse


def recipe(method: str) -> Recipe:
    """Train on handwritten digits, 80 % uniform noise, 5 trusted images a class: plain cross-entropy, then the method.

    python training/digits.py            about 3 minutes on 2 cores
    """
    return Recipe(
        name="digits",
        dataset=Digits(),
        objective=METHODS[method](),
        network="wrn-10-2",
        schedule=Schedule(lr=0.1, first_cycle=400, cycles=1),
        batch=100,
        probe_batch=50,  # the whole probe set
        group=50,
        workers=2,
        actors=2,
        evaluate_every=40,
    )


def main() -> None:
    """Train both, compare them, and write report.png and summary.json into the run's folder."""
    console, started = Console(), time.monotonic()
    chosen = parse(recipe)
    plain = replace(chosen, name=f"{chosen.name}-supervised", objective=Supervised())
    results = {"cross-entropy": run(plain, console), "full method": run(chosen, console)}
    baseline, method = results["cross-entropy"], results["full method"]
    report.table(results, console)
    report.draw(results, f"{method.folder}/report.png")
    summary = {
        "noise_rate": method.dataset.noise_rate,
        "top1": method.top1,
        "top1_supervised": baseline.top1,
        "seconds": round(time.monotonic() - started, 1),
        "seed": chosen.seed,
        "steps": chosen.schedule.steps,
    }
    with fsspec.open(f"{method.folder}/summary.json", "w") as file:
        json.dump(summary, file, indent=2)
    console.print(
        f"{method.folder}/report.png and summary.json written in {summary['seconds']:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    guarded(main)
