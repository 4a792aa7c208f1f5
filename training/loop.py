"""One training worker: its groups in, updates, and at every evaluation a report, a ledger file and a checkpoint out.

Shapes: B noisy examples of this worker, M probe examples, N test examples, K classes, G noisy examples of a group.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from pipeline import stream
from pipeline.dataset import Split
from pipeline.plan import Plan, Purpose, key
from pipeline.stream import Group
from pipeline.views import Views
from training import networks
from training.ledger import Ledger, forget
from training.monitor import Monitor, NotFiniteError
from training.objectives.interface import Alone, Batch, Outcome, Workers
from training.recipe import Recipe, as_json
from training.state import TrainState, kernels
from training.step import Processes, average_statistics, normalised, update
from training.tracking import Tracker

CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device
TELL_EVERY = 1.0  # seconds between progress messages
TEST_BATCH = 128
TEST_THREADS = 4  # that read and decode evaluation images

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What every worker is told. Evaluation sets travel as object-store references: read without a copy."""

    recipe: Recipe
    plan: Plan
    tests: dict[str, ray.ObjectRef]
    channels: int
    class_names: tuple[str, ...]
    folder: str  # the run's own, a local path or URL
    progress: Any  # a queue that the launching process reads


def train(config: dict[str, Job]) -> list[dict[str, float]]:
    """Train to the plan's end; rank 0 returns the run's history, one row an evaluation."""
    with contextlib.ExitStack() as closing:
        return _train(config["job"], closing)


def _train(job: Job, closing: contextlib.ExitStack) -> list[dict[str, float]]:
    recipe, context = job.recipe, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    workers: Workers = Processes() if world > 1 else Alone()
    device = ray.train.torch.get_device()
    tests: dict[str, Split] = {name: ray.get(ref) for name, ref in job.tests.items()}

    state = new_state(recipe, job.channels, len(job.class_names), device)
    history = resume(state)
    ledger, monitor = Ledger(job.folder, rank), Monitor(len(job.class_names))
    tracker = None
    if rank == 0:
        forget(job.folder, state.step)  # others write no file before rank 0 joins their first step
        tracker = Tracker(recipe, job.folder)
        closing.callback(tracker.close)
    evaluations = recipe.evaluations
    last_good = f"step {state.step}" if state.step else "none"
    told_at, told_step = time.monotonic(), state.step

    groups = stream.groups(ray.train.get_dataset_shard("train"), job.plan)
    for step, held in enumerate(job.plan.by_step(groups, world), start=job.plan.start):
        if step < state.step:  # the worker group restarted from a checkpoint later than the plan's start
            continue
        expected = [step * recipe.groups + lane for lane in range(rank, recipe.groups, world)]
        if (received := [int(group["group"][0]) for group in held]) != expected:
            raise RuntimeError(f"the stream is out of plan order at step {step}: groups {received}, not {expected}")
        batch = assemble(held, recipe, len(job.class_names), device)
        lr = recipe.schedule.learning_rate(step)
        outcome = update(state, recipe.objective, batch, lr=lr, workers=workers)
        known = {
            column: np.concatenate([group[column][: recipe.group] for group in held])
            for column in ("id", "epoch", "label")
        }
        ledger.add(step, known, outcome.coefficients)
        monitor.add(step, outcome, batch.label_B)

        evaluate = state.step in evaluations
        if state.step % CHECK_EVERY == 0 or evaluate:
            monitor.check_finite(last_good)
        now = time.monotonic()
        if tracker and (now - told_at > TELL_EVERY or evaluate):
            row = figures(step, lr, outcome, recipe, speed=(state.step - told_step) * recipe.batch / (now - told_at))
            job.progress.put_nowait({**row, "warning": monitor.collapse_warning()})
            told_at, told_step = now, state.step
        if evaluate:
            average_statistics(state, workers)
            if not state.finite():
                raise NotFiniteError(f"parameters are no numbers after step {step}; last good checkpoint: {last_good}")
            measured = evaluation(state, tests, recipe, rank, workers, device)
            ledger.flush()
            if tracker:
                history.append({**row, **measured})
                tracker.log(history[-1])
                job.progress.put_nowait(history[-1])
                if state.step == recipe.schedule.steps:
                    export(state, job)  # before the last checkpoint: a run whose checkpoints say so is whole
            save(state, history, rank, measured["top1"])
            last_good = f"step {state.step}"
            told_at = time.monotonic()  # evaluating is no part of the training speed
    return history


def figures(step: int, lr: float, outcome: Outcome, recipe: Recipe, speed: float) -> dict[str, float]:
    """What a progress line and a row of the history have in common; `speed` in noisy images a second, all workers."""
    return {
        "step": step + 1,
        "cycle": recipe.schedule.cycle(step) + 1,
        "lr": lr,
        "loss": float(outcome.total.detach()),
        **{name: float(part) for name, part in outcome.parts.items()},
        "images_per_second": speed,
    }


def new_state(recipe: Recipe, channels: int, classes: int, device: torch.device) -> TrainState:
    """The state before step 0, the same on every worker."""
    model = networks.build(recipe.network, channels, classes, recipe.seed).to(device)
    everything = frozenset(name for name, _ in model.named_parameters())
    return TrainState(
        model,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decayed=everything if recipe.decay == "all" else kernels(model),
        average=recipe.objective.average_parameters,
    )


def assemble(held: list[Group], recipe: Recipe, classes: int, device: torch.device) -> Batch:
    """A worker's groups of one step on the device: noisy examples first, then each group's own trusted ones."""
    weak, strong, trusted = slice(recipe.group), slice(recipe.group, 2 * recipe.group), slice(2 * recipe.group, None)

    def on_device(column: str, rows: slice) -> Tensor:
        array = np.concatenate([group[column][rows] for group in held])
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Batch(
        weak_BCHW=normalised(on_device("image", weak)),
        strong_BCHW=normalised(on_device("image", strong)),
        label_B=on_device("label", weak),
        probe_MCHW=normalised(on_device("image", trusted)),
        probe_label_M=on_device("label", trusted),
        group_keys=tuple(key(recipe.seed, Purpose.MIXUP, int(group["group"][0])) for group in held),
        classes=classes,
    )


def evaluation(
    state: TrainState, tests: dict[str, Split], recipe: Recipe, rank: int, workers: Workers, device: torch.device
) -> dict[str, float]:
    """Accuracies on every evaluation set: top1 and top5 of the first, NAME_top1 and NAME_top5 of the others."""
    measured: dict[str, float] = {}
    for name, test in tests.items():
        prefix = f"{name}_" if measured else ""
        top1, top5 = accuracy(state, test, recipe.dataset.views, rank, workers, device)
        measured |= {f"{prefix}top1": top1, f"{prefix}top5": top5}
    return measured


def accuracy(
    state: TrainState, test: Split, views: Views, rank: int, workers: Workers, device: torch.device
) -> tuple[float, float]:
    """(top-1, top-5) over the whole test set, every example counted once: worker r takes batches r, r + N, …"""
    starts = range(rank * TEST_BATCH, len(test), workers.size * TEST_BATCH)

    def batch(start: int) -> tuple[np.ndarray, np.ndarray]:
        held = test.take(np.arange(start, min(start + TEST_BATCH, len(test))))
        return np.stack([views.test(held.image(row)) for row in range(len(held))]), held.label_N

    right = torch.zeros(2, dtype=torch.float64, device=device)
    for image_NHWC, label_N in ahead(batch, starts):
        logits_NK = state.predict(normalised(torch.from_numpy(image_NHWC).to(device)))
        best_N5 = logits_NK.topk(min(5, logits_NK.shape[1]), 1).indices
        hit_N5 = best_N5 == torch.from_numpy(label_N).to(device)[:, None]
        right += torch.stack([hit_N5[:, 0].sum(), hit_N5.any(1).sum()])
    total = workers.mean([right])[0] * workers.size / len(test)
    return float(total[0]), float(total[1])


def ahead(work: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """`work` of each item, in order, done by threads a few items ahead of who asks."""
    with ThreadPoolExecutor(TEST_THREADS) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > TEST_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def save(state: TrainState, history: list[dict[str, float]], rank: int, top1: float) -> None:
    """Report to Ray Train, with a checkpoint from rank 0; a barrier for all workers."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save({**state.state_dict(), "history": history}, Path(folder) / "state.pt")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": state.step, "top1": top1}, checkpoint, checkpoint_dir_name=f"step_{state.step:08d}")


def resume(state: TrainState) -> list[dict[str, float]]:
    """Continue from Ray Train's latest checkpoint, if there is one; returns the history until then."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")
    state.load_state_dict(saved)
    return saved["history"]


def export(state: TrainState, job: Job) -> None:
    """Write the evaluated weights as model.safetensors, with class names and recipe in the metadata."""
    from safetensors.torch import save as to_bytes

    weights = {name: value.detach().cpu().contiguous() for name, value in state.inference_weights().items()}
    metadata = {"class_names": json.dumps(job.class_names), "recipe": json.dumps(as_json(job.recipe))}
    with fsspec.open(f"{job.folder}/model.safetensors", "wb") as file:
        file.write(to_bytes(weights, metadata))
