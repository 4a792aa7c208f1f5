"""One global batch cut over 1, 2 and 4 workers: time, traffic and parameters; then a model of the same on N GPUs.

    python -m benchmarks.scaling --out scaling.json

Workers are processes of one thread each on this machine, joined by gloo over loopback. A step is the training loop's:
real views of random images, made in the worker itself by the stream's own code, then `update` with the `reference`
objective. `data_seconds` is views and batch, `collective_seconds` the all-reduce calls, waiting for slower workers
included, `compute_seconds` the rest: means over the workers, medians over steps. `cpu_seconds` is the processor time of
all workers together. `reductions` and `bytes_reduced` count one worker's all-reduces in a step, `bytes_streamed` what
all workers are given. `max_abs_difference` is the largest of any parameter after the last step to the run on the first
number of workers. Where workers outnumber cores the times tell of taking turns, not of scaling, and the row says so.

The model carries the counts over to ResNet-50; its times are computed from figures that are assumed, not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from pipeline.dataset import Examples
from pipeline.plan import Plan, Purpose, key
from pipeline.stream import Group, make_block
from pipeline.views import CifarViews
from training.engine import networks
from training.engine.batch import normalised
from training.engine.collectives import Processes, buckets
from training.engine.optimiser import Sgd
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.ieg import reference
from training.objectives.interface import Alone, Batch, Workers

CLASSES, IMAGES, TRUSTED, LR = 10, 512, 100, 0.05
PATIENCE = timedelta(minutes=10)  # also for the workers that wait while fewer run
FORMATS = {"seconds": ".3f", "data_seconds": ".3f", "compute_seconds": ".3f", "collective_seconds": ".4f"}
FORMATS |= {"cpu_seconds": ".3f", "reductions": "d", "bytes_reduced": ",d", "bytes_streamed": ",d"}
FORMATS |= {"max_abs_difference": ".1e"}

# Assumed, none of it measured by us. One GPU of the A100 class trains ResNet-50 on some 800 images a second in TF32:
# 2,400 forward passes, of which a `reference` step takes about 22 for each noisy image (a backward counts as two).
ASSUMED_IMAGES_PER_SECOND = 100.0  # noisy images through one `reference` step, ResNet-50 at 224 px, on one GPU
ASSUMED_BATCH = 1024  # noisy images of the global batch
ASSUMED_LINKS = {"NVLink": (200e9, 20e-6), "100 Gb Ethernet": (10e9, 50e-6)}  # bytes/s each GPU gets, s a hop
ASSUMPTIONS = (
    "seconds = compute/N + 2(N−1)/N · bytes/bandwidth + latency · reductions · log2 N",
    f"assumed compute: {ASSUMED_BATCH} noisy images a step, {ASSUMED_IMAGES_PER_SECOND:g} a second on each GPU",
    *(
        f"assumed {link}: {rate / 1e9:g} GB/s, {hop * 1e6:g} µs, for all N alike"
        for link, (rate, hop) in ASSUMED_LINKS.items()
    ),
    "communication does not overlap compute; data are always ready; a GPU is no slower an image on a small share",
)
GPUS = (1, 2, 4, 8, 16, 32)

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Say what every number of workers does."""

    network: str
    size: int  # px
    batch: int  # noisy images of the global batch, and as many trusted ones
    groups: int
    warm_ups: int
    steps: int  # measured
    double: bool


# ---- measured --------------------------------------------------------------------------------------------------------


def batch_of(held: Sequence[Group], plan: Plan) -> Batch:
    """Return a worker's groups of one step."""

    def rows(column: str, start: int, stop: int | None) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([group[column][start:stop] for group in held]))

    size = plan.group
    return Batch(
        weak_BCHW=normalised(rows("image", 0, size)),
        strong_BCHW=normalised(rows("image", size, 2 * size)),
        label_B=rows("label", 0, size),
        row_B=rows("row", 0, size),
        probe_MCHW=normalised(rows("image", 2 * size, None)),
        probe_label_M=rows("label", 2 * size, None),
        group_keys=tuple(key(plan.seed, Purpose.MIXUP, int(group["group"][0])) for group in held),
        classes=CLASSES,
    )


def train(work: Work, rank: int, workers: Workers) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Measure one worker's steps, and its parameters after the last."""
    rng = np.random.default_rng(0)
    count = IMAGES + TRUSTED
    images = rng.integers(0, 256, (count, work.size, work.size, 3), np.uint8)
    labels = np.arange(count) % CLASSES
    examples = Examples(np.arange(IMAGES), labels[:IMAGES], images[:IMAGES])
    probe = Examples(np.arange(IMAGES, count), labels[IMAGES:], images[IMAGES:])
    group, steps = work.batch // work.groups, work.warm_ups + work.steps
    plan = Plan(examples.row_groups, 0, work.batch, group, group, start=0, stop=steps, chunk=1)
    model = networks.build(work.network, 3, CLASSES, seed=0)
    optimiser = Sgd(model, nn.Module(), momentum=0.9, weight_decay=5e-4)
    state = TrainState(model, optimiser, average=True)
    rows = []
    for step in range(steps):
        before = {**vars(workers.traffic)} if isinstance(workers, Processes) else {}
        start, cpu = time.perf_counter(), time.process_time()
        places = range(rank, work.groups, workers.size)
        held = [make_block(examples, probe, CifarViews(), plan, step * work.groups + place) for place in places]
        batch = batch_of(held, plan)
        ready = time.perf_counter()
        update(state, reference(), batch, lr=LR, workers=workers)
        end = time.perf_counter()
        after = vars(workers.traffic) if isinstance(workers, Processes) else {}
        traffic = {name: after[name] - before[name] for name in after}
        collective = traffic.get("seconds", 0.0)
        rows.append(
            {
                "seconds": end - start,
                "data_seconds": ready - start,
                "compute_seconds": end - ready - collective,
                "collective_seconds": collective,
                "cpu_seconds": time.process_time() - cpu,
                "reductions": traffic.get("reductions", 0),
                "bytes_reduced": traffic.get("bytes", 0),
                "bytes_streamed": sum(column.nbytes for group in held for column in group.values()),
            }
        )
    return rows[work.warm_ups :], {name: value.detach() for name, value in model.named_parameters()}


def worker(rank: int, work: Work, numbers: Sequence[int], port: int, folder: str) -> None:
    """Take part as a process in every run of more than `rank` workers, one run after the other."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if work.double:
        torch.set_default_dtype(torch.float64)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=PATIENCE)
    for number in numbers:
        if rank < number:
            own = dist.PrefixStore(f"{number} workers", store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=number, timeout=PATIENCE)
            found = train(work, rank, Processes(own) if number > 1 else Alone())
            torch.save(found, Path(folder) / f"{number}_{rank}.pt")
            dist.destroy_process_group()


def measure(work: Work, numbers: Sequence[int], cores: int) -> list[Row]:
    """Return one row for each number of workers."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (work, numbers, store.port, folder), nprocs=max(numbers))
        runs = {n: [torch.load(Path(folder) / f"{n}_{rank}.pt") for rank in range(n)] for n in numbers}
    _, first = runs[numbers[0]][0]
    told = []
    for number, found in runs.items():
        steps = list(zip(*(rows for rows, _ in found), strict=True))
        row: Row = {"workers": number, "oversubscribed": number > cores}
        for name in ("seconds", "data_seconds", "compute_seconds", "collective_seconds"):
            row[name] = statistics.median(statistics.mean(own[name] for own in step) for step in steps)
        row["cpu_seconds"] = statistics.median(sum(own["cpu_seconds"] for own in step) for step in steps)
        row |= {name: steps[0][0][name] for name in ("reductions", "bytes_reduced")}
        row["bytes_streamed"] = sum(own["bytes_streamed"] for own in steps[0])
        gaps = [(last[name] - first[name]).abs().max() for _, last in found for name in first]
        told.append(row | {"max_abs_difference": float(max(gaps))})
    return told


# ---- modelled --------------------------------------------------------------------------------------------------------


def seconds_on(gpus: int, compute: float, traffic: tuple[int, int], bandwidth: float, latency: float) -> float:
    """Return the seconds of a step on `gpus`, from those of one, and from a step's (all-reduces, bytes): see
    ASSUMPTIONS.
    """
    reductions, size = traffic
    return compute / gpus + 2 * (gpus - 1) / gpus * size / bandwidth + latency * reductions * math.log2(gpus)


def carried_over(row: Row, network: str, dtype: torch.dtype) -> Row:
    """Return what a measured row's all-reduces are with ResNet-50 in float32: those of all parameters grow.

    No figure is assumed: both networks are counted, without making them.
    """
    with torch.device("meta"):
        here = [value.to(dtype) for value in networks.build(network, 3, CLASSES, seed=0).parameters()]
        there = list(networks.build("resnet50", 3, 1000, seed=0).parameters())
    size = sum(value.nbytes for value in here)
    copies, rest = divmod(row["bytes_reduced"], size)
    small = row["reductions"] - copies * len(list(buckets(here)))
    return {
        "network": "resnet50",
        "parameters": sum(value.numel() for value in there),
        "reductions_of_all_parameters": copies,
        "small_reductions": small,
        "small_bytes": rest * 4 // dtype.itemsize,
        "reductions": copies * len(list(buckets(there))) + small,
        "bytes_reduced": copies * sum(value.nbytes for value in there) + rest * 4 // dtype.itemsize,
    }


def modelled(counts: Row) -> list[Row]:
    """Return one row for each link and number of GPUs."""
    compute = ASSUMED_BATCH / ASSUMED_IMAGES_PER_SECOND
    traffic = counts["reductions"], counts["bytes_reduced"]
    rows = []
    for link, (bandwidth, latency) in ASSUMED_LINKS.items():
        for gpus in GPUS:
            seconds = seconds_on(gpus, compute, traffic, bandwidth, latency)
            row = {"link": link, "gpus": gpus, "modelled_seconds": seconds, "speed_up": compute / seconds}
            rows.append(row | {"efficiency": compute / seconds / gpus})
    return rows


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="One global batch on 1, 2 and 4 workers, and a model of N GPUs.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--network", default="wrn-10-1:group", help="with batch norm workers do not train as one")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, default=64, help="noisy and trusted images each, on all workers")
    parser.add_argument("--groups", type=int, default=4, help="of the batch; every number of workers divides it")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--double", action="store_true", help="float64, where workers agree to its rounding")
    chosen = parser.parse_args(arguments)
    if chosen.batch % chosen.groups or any(chosen.groups % number for number in chosen.workers):
        parser.error("the workers must divide the groups, and the groups the batch")
    work = Work(
        chosen.network, chosen.size, chosen.batch, chosen.groups, chosen.warm_ups, chosen.steps, chosen.double
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    load = round(os.getloadavg()[0], 1)  # what else runs here: `cpu_seconds` suffers least from it
    told: Row = {
        "cores": cores,
        "load": load,
        "torch": torch.__version__,
        "backend": "gloo over loopback",
        **vars(work),
    }
    print(*(f"{name} {value}" for name, value in told.items()), sep=", ")
    told["rows"] = measure(work, chosen.workers, cores)
    print("workers" + "".join(f"{name:>{len(name) + 2}}" for name in FORMATS))
    for row in told["rows"]:
        cells = "".join(f"{format(row[name], form):>{len(name) + 2}}" for name, form in FORMATS.items())
        remark = f"  more workers than the {cores} cores: not scaling" if row["oversubscribed"] else ""
        print(f"{row['workers']:>7}{cells}{remark}")
    together = [row for row in told["rows"] if row["workers"] > 1]
    if together:
        dtype = torch.float64 if work.double else torch.float32
        counts = carried_over(together[0], work.network, dtype)
        told["model"] = {"assumptions": ASSUMPTIONS, **counts, "rows": modelled(counts)}
        print(*("", "Modelled, not measured:", *ASSUMPTIONS), sep="\n")
        print(*(f"{name} {value:,}" if isinstance(value, int) else value for name, value in counts.items()), sep=", ")
        for row in told["model"]["rows"]:
            print("{link:<16}{gpus:>3} GPUs{modelled_seconds:>9.3f} s{efficiency:>7.1%} efficient".format(**row))
    chosen.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
