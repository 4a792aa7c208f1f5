"""What the ledger takes of training's time and memory. Needs no cluster.

    python -m benchmarks.ledger --out benchmarks/results/ledger.json

About 2 minutes of one core. **Time**: real steps of the smallest network, so that the ledger's share is as large as it
gets, on random images and in the training loop's order, with a checkpoint's flush after every few of them: medians.
`ledger_share` is what training waits for, over the time of everything: the calls of `add` with the gathering of what
they are given, and the flush, which encodes and writes all rows since the last. `writer_share` is the processor time of
the thread that encodes and writes: where all cores train, it takes that from them too. No views are made here, which
would lower both.

**Memory**: rows added as fast as they can be made, to local storage and to storage that refuses every part until the
ledger gives up. `peak_growth_bytes` is how far the process' peak of resident memory rose above what it was before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from pipeline import storage
from pipeline.dataset import InputError
from training.engine import networks
from training.engine.optimiser import Sgd
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.interface import Alone, Batch, Coefficients
from training.objectives.registry import METHODS
from training.runs import ledger
from training.runs.ledger import Ledger

NETWORK, SIZE, GROUP, LR, CHECKPOINTS = "wrn-10-1", 16, 25, 0.05, 4
FORMATS = {"step_seconds": ".4f", "add_seconds": ".6f", "flush_seconds": ".4f"}
FORMATS |= {"worst_flush_seconds": ".4f", "ledger_share": ".3%", "writer_share": ".3%"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Say what is trained."""

    method: str
    batch: int
    classes: int
    steps: int  # between checkpoints


SETTINGS = (
    Work("supervised", 100, 10, 100),
    Work("winnow", 100, 10, 15),
    Work("supervised", 1_000, 1_000, 6),
    Work("winnow", 1_000, 1_000, 2),
)
ADDED = 1_000  # rows at once
ROWS = (250_000, 500_000, 1_000_000, 2_000_000)  # at which memory is looked at


# ---- time ------------------------------------------------------------------------------------------------------------


def cost(work: Work, folder: str) -> Row:
    """Return the medians of a step, an `add` and a flush, and the shares that the ledger has."""
    weak, strong, probe = torch.randn(3, work.batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    row_B = torch.arange(work.batch)
    label_B = row_B % work.classes
    groups = work.batch // GROUP
    batch = Batch(weak, strong, label_B, row_B, probe, label_B, tuple(range(groups)), work.classes)
    held = [{name: row_B[:GROUP].numpy() for name in ("id", "epoch", "label")} for _ in range(groups)]

    objective, model = METHODS[work.method](), networks.build(NETWORK, 3, work.classes, seed=0)
    optimiser = Sgd(model, nn.Module(), momentum=0.9, weight_decay=5e-4)
    state = TrainState(model, optimiser, average=objective.average_parameters)
    rows = Ledger(folder, rank=0)
    steps, adds, flushes = [], [], []
    for step in range(CHECKPOINTS * work.steps):
        start = time.perf_counter()
        outcome = update(state, objective, batch, lr=LR, workers=Alone(), steps=CHECKPOINTS * work.steps)
        decided = time.perf_counter()
        known = {name: np.concatenate([group[name] for group in held]) for name in held[0]}
        rows.add(step, known, outcome.coefficients)
        added = time.perf_counter()
        steps.append(decided - start)
        adds.append(added - decided)
        if (step + 1) % work.steps == 0:
            rows.flush()
            flushes.append(time.perf_counter() - added)
    writing = rows.thread.submit(time.thread_time).result() / len(steps)
    rows.close()
    step_seconds, add, flush = (statistics.median(seconds) for seconds in (steps, adds, flushes))
    whole = step_seconds + add + flush / work.steps
    return {
        **vars(work),
        "step_seconds": step_seconds,
        "add_seconds": add,
        "flush_seconds": flush,
        "worst_flush_seconds": max(flushes),
        "ledger_share": 1 - step_seconds / whole,
        "writer_share": writing / whole,
    }


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak() -> int:
    """Return the bytes of memory that this process had at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fill(rows: Ledger, start: int, stop: int) -> int:
    """Add rows `start` to `stop`, no two alike, in steps of ADDED; returns `stop`, or where the ledger gave up."""
    rng = np.random.default_rng(start)
    for row in range(start, stop, ADDED):
        label, pseudo_label = rng.integers(1_000, size=(2, ADDED))
        known = {"id": rng.integers(1 << 62, size=ADDED), "epoch": np.zeros(ADDED, np.int64), "label": label}
        weight, trust, confidence, loss = torch.rand(4, ADDED)
        decided = Coefficients(weight, trust.round(), torch.from_numpy(pseudo_label), confidence, loss)
        try:
            rows.add(row // ADDED, known, decided)
        except InputError:
            return row
    return stop


def memory(folder: str, stops: Sequence[int]) -> Iterator[Row]:
    """Yield a row at each of these numbers of rows, and one for storage that refuses until the ledger gives up."""
    before, rows, begun = peak(), Ledger(folder, rank=0), time.perf_counter()
    for start, stop in pairwise((0, *stops)):
        fill(rows, start, stop)
        yield _row("local", stop, begun, before)
    rows.close()
    before, rows, begun = peak(), Ledger(folder, rank=0), time.perf_counter()
    with mock.patch.object(storage, "write", side_effect=OSError):
        stop = fill(rows, 0, 2 * ledger.MOST_PARTS * ledger.PART_ROWS)
    yield _row("refuses", stop, begun, before)


def _row(kind: str, rows: int, begun: float, before: int) -> Row:
    seconds = time.perf_counter() - begun
    return {"storage": kind, "rows": rows, "seconds": seconds, "peak_growth_bytes": peak() - before}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="What the ledger takes of time and memory.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one is steadier
    told: dict[str, Any] = {"machine": f"CPU, {os.cpu_count()} cores", "network": NETWORK, "size": SIZE}
    told |= {"threads": 1, "load": os.getloadavg()[0], "part_rows": ledger.PART_ROWS, "time": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        for row in memory(f"{folder}/memory", ROWS):  # first: training has a peak of its own
            told["memory"].append(row)
            print(f"{row['storage']:<9}{row['rows']:>10,} rows {row['peak_growth_bytes'] / 2**20:>6.0f} MB", flush=True)
        print(f"{'method':<12}{'batch':>6}" + "".join(f"{name:>{len(name) + 2}}" for name in FORMATS))
        for work in SETTINGS:
            told["time"].append(row := cost(work, f"{folder}/{work.method}-{work.batch}"))
            cells = [f"{format(row[name], form):>{len(name) + 2}}" for name, form in FORMATS.items()]
            print(f"{work.method:<12}{work.batch:>6}" + "".join(cells), flush=True)
            chosen.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
