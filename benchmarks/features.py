"""How fast heads train on stored features, and judge labels by them: a million rows on this machine.

    python -m benchmarks.features --out benchmarks/results/features.json

Made-up features whose classes overlap, 40 % of the labels wrong, are written as `pipeline.embed` writes them. Then, in
a process each: ten epochs of the whole method by `training/custom.py`'s variant `features`, and an audit by five
heads. Memory is the most that all processes of it held at once, shared pages counted once (proportional set size),
looked at twice a second. A step of the method stands beside one of plain softmax regression in torch on the same
batches: medians of rounds that alternate.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console

from pipeline import features, storage
from pipeline.features import Made
from pipeline.index import FEATURES, NAME, Index, Shard
from pipeline.shards import SHARD_ROWS
from pipeline.stream import groups_here
from training import custom
from training.audit import audit
from training.engine.batch import assemble
from training.engine.schedule import Schedule
from training.engine.setup import new_state
from training.engine.step import update
from training.launch import guarded, on_features, planned, run
from training.objectives.interface import Alone
from training.recipe import Recipe

CLASSES, TRUSTED, TEST = 10, 500, 5_000
NOISE = 0.4
ROUNDS, STEPS = 7, 40  # of the comparison of steps, after a warm-up of one round


@dataclass(frozen=True)
class Settings:
    """Say what is measured."""

    out: str
    """JSON file of the results."""
    rows: int = 1_000_000
    """Training rows."""
    width: int = 768
    """Numbers of an embedding."""
    epochs: int = 10
    """Of the run."""


def table(how: Made, split: str, id_N: np.ndarray, label_N: np.ndarray, looks_NLD: np.ndarray) -> pa.Table:
    """Return a file of features, N×L×D, as `pipeline.embed` makes it."""
    columns = {
        "id": id_N,
        "key": [str(id_) for id_ in id_N],
        "label": label_N.astype(np.int32),
        "split": [split] * len(id_N),
        "trusted": np.full(len(id_N), split != "train"),
    }
    return pa.table({**columns, **features.unstacked(looks_NLD, how)}).cast(how.schema)


def write_index(folder: str, how: Made, names: tuple[str, ...], shards: list[Shard]) -> None:
    """Write what names the files in `folder`."""
    made = Index("custom", "0", names, tuple(shards), 0, {FEATURES: asdict(how)}, features.ROW_GROUP)
    storage.write(*storage.connect(f"{folder}/{NAME}"), made.as_json().encode())


def write(folder: str, rows: int, width: int) -> None:
    """Write the features and their index into `folder`."""
    how = Made("made_up", "0" * 64, 224, 0.875, "bicubic", width, 0, 0)
    rng, shards, first = np.random.default_rng(0), [], 0
    centre_KD = rng.standard_normal((CLASSES, width), np.float32) / 8
    for split, count in {"probe": TRUSTED, "test": TEST, "train": rows}.items():
        files = -(-count // SHARD_ROWS)
        for number in range(files):
            size = min(SHARD_ROWS, count - number * SHARD_ROWS)
            true_N = rng.integers(0, CLASSES, size)
            wrong_N = (split == "train") & (rng.random(size) < NOISE)
            label_N = np.where(wrong_N, (true_N + rng.integers(1, CLASSES, size)) % CLASSES, true_N)
            value_ND = centre_KD[true_N] + rng.standard_normal((size, width), np.float32)
            held = table(how, split, first + np.arange(size), label_N, value_ND[:, None])
            shard = features.write_shard(f"{folder}/{split}-{number:05d}-of-{files:05d}.parquet", held, CLASSES)
            assert shard
            shards.append(shard)
            first += size
    write_index(folder, how, tuple(f"class {k}" for k in range(CLASSES)), shards)


def recipe(folder: str, settings: Settings) -> Recipe:
    """Return the run that is measured."""
    made = custom.features("winnow", settings.rows)
    steps = -(-settings.epochs * settings.rows // made.batch)
    return replace(made, data=folder, storage=folder, schedule=Schedule(lr=0.1, first_cycle=steps, cycles=1))


def train(folder: str, settings: Settings) -> dict[str, Any]:
    """Train, and tell the accuracy."""
    return {"top1": run(recipe(folder, settings), Console(file=io.StringIO())).top1}


def judge(folder: str, settings: Settings) -> dict[str, Any]:
    """Audit, and tell the share of labels that are wrong by estimate."""
    findings = audit.audit(audit.Options(features=folder), Console(file=io.StringIO()))
    return {"wrong": float(findings.wrong_K.sum() / findings.count_K.sum())}


def measured(work: Callable[[str, Settings], dict[str, Any]], folder: str, settings: Settings) -> dict[str, Any]:
    """Return what `work` tells, run in a process of its own, with its seconds and the most memory, MB."""
    started, most = time.monotonic(), 0
    with get_context("spawn").Pool(1) as pool:
        worker = psutil.Process(pool.apply(os.getpid))
        told = pool.apply_async(work, (folder, settings))
        while not told.ready():
            most = max(most, _held(worker))
            told.wait(0.5)
        return {**told.get(), "seconds": round(time.monotonic() - started, 1), "most_mb": most >> 20}


def _held(process: psutil.Process) -> int:
    held = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            held += each.memory_full_info().pss
    return held


def steps(folder: str, settings: Settings) -> dict[str, Any]:
    """Return the median times of a step, ms, and their ratio: of the method, and of softmax regression."""
    torch.set_num_threads(1)
    made = on_features(recipe(folder, settings))
    dataset = made.dataset.load(folder, 0)
    plan = planned(made, dataset, STEPS)
    held = plan.by_step(groups_here(dataset.train, dataset.probe, made.dataset.views, plan, 0, 1), 1)
    batches = [assemble(groups, made, CLASSES, torch.device("cpu")) for groups in held]
    state = new_state(made, CLASSES, len(dataset.train), 1, torch.device("cpu"))
    plain = torch.nn.Linear(settings.width, CLASSES)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    times: dict[str, list[float]] = {"method": [], "softmax": []}
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        for batch in batches:
            update(state, made.objective, batch, lr=0.1, workers=Alone(), steps=STEPS)
        times["method"].append((time.perf_counter() - started) / STEPS)
        started = time.perf_counter()
        for batch in batches:
            sgd.zero_grad()
            F.cross_entropy(plain(batch.weak_BCHW.flatten(1)), batch.label_B).backward()
            sgd.step()
        times["softmax"].append((time.perf_counter() - started) / STEPS)
    median = {name: float(np.median(each[1:])) * 1e3 for name, each in times.items()}
    return {**{f"{name}_ms": round(each, 3) for name, each in median.items()}, "batch": made.batch} | {
        "ratio": round(median["method"] / median["softmax"], 2)
    }


def main() -> None:
    """Measure, print and write."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    told: dict[str, Any] = {"machine": f"CPU, {os.cpu_count()} cores", "rows": settings.rows, "width": settings.width}
    with tempfile.TemporaryDirectory() as folder:
        write(folder, settings.rows, settings.width)
        for name, work in {"step": steps, "train": train, "audit": judge}.items():
            told[name] = measured(work, folder, settings)
            console.print(name, told[name])
            Path(settings.out).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
