"""Whether a long run grows: memory of every process, object store and GPU over tens of thousands of small steps.

    python -m benchmarks.endurance --steps 20000 --out benchmarks/results/endurance.json

Digits on a small network through the whole stack: Ray Data, a CPU actor, Ray Train with one worker process, `winnow`,
the ledger, and a checkpoint every `--every` steps. At each, memory is read in MB: of processes by role, what is neither
file nor object store (that, mapped by whoever reads it, has a line of its own); of a GPU all that is in use. The
slopes, MB in 1,000 steps, are least squares over the last three quarters of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
import tyro
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from pipeline.digits import Digits
from training.engine.schedule import Schedule
from training.launch import guarded, run
from training.objectives.registry import METHODS
from training.recipe import Recipe
from training.runs import checkpoint

ROLES = {  # by what is part of a process's title
    "ray::RayTrainWorker": "worker",
    "MapWorker": "data actor",
    "ray::SplitCoordinator": "stream",
    "ray::TrainController": "controller",
    "raylet": "raylet",
    "gcs_server": "gcs",
}
WARM_UP = 0.25  # of the run, before slopes are taken
Sample = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """Say how long a run is."""

    out: str
    """JSON file of the samples and slopes."""
    steps: int = 20_000
    """Steps of the run."""
    every: int = 500
    """Steps between samples, each of them a checkpoint."""


def main() -> None:
    """Run, sample, print the slopes."""
    settings = tyro.cli(Settings)
    # Ray remembers its last 100,000 tasks, at 3.4 KB each; fewer, so that this is over before slopes are taken.
    os.environ["RAY_task_events_max_num_task_in_gcs"] = "500"  # noqa: SIM112 – Ray's name
    with tempfile.TemporaryDirectory() as storage:
        recipe = tiny(settings, storage)
        samples: list[Sample] = []
        finished = threading.Event()
        sampler = threading.Thread(target=watch, args=(f"{storage}/{recipe.name}", samples, finished))
        sampler.start()
        try:
            run(recipe)
        finally:
            finished.set()
            sampler.join()
    found = slopes(samples, settings.steps)
    told = {"machine": f"{os.cpu_count()} cores", "steps": settings.steps, "slopes": found, "samples": samples}
    Path(settings.out).write_text(json.dumps(told, indent=1) + "\n")
    for name, slope in found.items():
        most = max(sample.get(name, 0.0) for sample in samples)
        print(f"{name:<13}{most:>9.1f} MB at most, {slope:+.3f} MB in 1,000 steps")


def tiny(settings: Settings, storage: str) -> Recipe:
    """Return a step of some tens of milliseconds that does all that a step does."""
    return Recipe(
        name="endurance",
        dataset=Digits(probe_per_class=2),
        objective=METHODS["winnow"](),
        storage=storage,
        network="wrn-10-1",
        schedule=Schedule(lr=0.05, first_cycle=settings.steps, cycles=1),
        batch=16,
        probe_batch=16,
        group=16,
        actors=1,
        checkpoint_steps=settings.every,
        checkpoint_minutes=0,
    )


def watch(folder: str, samples: list[Sample], finished: threading.Event) -> None:
    """Take a sample at every new checkpoint in the folder."""
    started = time.monotonic()
    while not finished.wait(0.2):
        commits = checkpoint.commits(folder)
        if commits and (not samples or commits[-1].step > samples[-1]["step"]):
            samples.append({"step": commits[-1].step, "seconds": round(time.monotonic() - started, 1), **memory()})


def memory() -> Sample:
    """Return MB in use, by role."""

    def own(process: Any) -> float:
        held = process.memory_info()
        return held.rss - held.shared

    used = {"driver": own(psutil.Process())}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            title = " ".join(process.cmdline()) or process.name()
            role = next((role for part, role in ROLES.items() if part in title.split(" -")[0]), "others")
            used[role] = used.get(role, 0) + own(process)
    address = ray.get_runtime_context().gcs_address
    used["object store"] = get_memory_info_reply(get_state_from_address(address)).store_stats.object_store_bytes_used
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used["GPU"] = total - free
    return {name: size / 1e6 for name, size in used.items()}


def slopes(samples: list[Sample], steps: int) -> dict[str, float]:
    """Return MB in 1,000 steps of everything that most samples after the warm-up have."""
    # The last sample finds workers that are leaving.
    late = [sample for sample in samples if WARM_UP * steps <= sample["step"] < steps]
    found = {}
    for name in dict.fromkeys(name for sample in late for name in sample if name not in ("step", "seconds")):
        held = np.array([(sample["step"] / 1_000, sample[name]) for sample in late if name in sample])
        if 2 * len(held) > len(late):
            found[name] = float(np.polyfit(held[:, 0], held[:, 1], 1)[0])
    return found


if __name__ == "__main__":
    guarded(main)
