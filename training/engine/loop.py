"""One training worker: its groups in, updates, its rows of the ledger and, at every checkpoint, the state out.

Shapes: B noisy examples of this worker, M probe examples, K classes, G noisy examples of a group.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.util.metrics import Gauge
from torch import Tensor, nn

from pipeline import storage, stream
from pipeline.dataset import InputError, Split
from pipeline.plan import Plan, Purpose, key
from pipeline.stream import Group
from training.engine import networks
from training.engine.evaluation import evaluate
from training.engine.graph import StepGraph
from training.engine.monitor import Monitor, NotFiniteError
from training.engine.passes import Passes
from training.engine.state import TrainState, kernels
from training.engine.step import (
    Processes,
    WorkersError,
    average_statistics,
    differentiate,
    gather_statistics,
    normalised,
    update,
)
from training.objectives.interface import Alone, Batch, Outcome, Workers
from training.recipe import Recipe, publishable
from training.runs import checkpoint, model_file
from training.runs.ledger import Ledger, forget
from training.runs.tracking import Tracker

LOOK_EVERY = 10  # steps between looks at loss, clock and notices: each waits for the device and the other workers
TELL_EVERY = 1.0  # seconds between progress messages
FAILURE, LAST_ERROR, STARTS = NOTES = ("failure.json", "last_error.json", "starts.json")
MOST_STARTS = 8  # at one step: a run that gets no further than that is not going to
GAUGES = {  # what Prometheus is told of the figures in a progress message
    "images_per_second": "Noisy images trained on a second, by all workers",
    "waiting_for_data": "Share of time that the first worker waited for data",
    "trust": "Mean lambda of the first worker's batch: 1 where labels are believed",
    "zero_weights": "Share of the first worker's batch that counts for nothing",
}


@dataclass(frozen=True)
class Job:
    """What every worker is told. Evaluation sets travel as object-store references: read without a copy."""

    recipe: Recipe
    plan: Plan  # from step 0
    tests: dict[str, ray.ObjectRef]
    class_names: tuple[str, ...]
    folder: str  # the run's own, a local path or URL
    progress: Any  # a queue that the launching process reads


def train(config: dict[str, Job]) -> dict[str, Any]:
    """Train to the plan's end, from the last checkpoint; rank 0 returns the run's history, one row an evaluation.

    What a person must mend is returned by all workers as an error, because what is raised is tried again: at once
    where they all see it, else on the next start, from the note that the one that saw it left.
    """
    job = config["job"]
    with contextlib.ExitStack() as closing:
        try:
            if told := read_note(job.folder, FAILURE):
                return {"error": told}
            return {"history": _train(job, closing)}
        except NotFiniteError as error:
            return {"error": str(error)}
        except WorkersError:
            raise  # another worker knows why
        except Exception as error:
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            mendable = isinstance(cause, (InputError, ValueError))
            told = str(cause).partition("\nFailed to ")[0] if mendable else repr(cause)  # Ray adds lines on retries
            write_note(job.folder, FAILURE if mendable else LAST_ERROR, told)
            raise cause from None


def read_note(folder: str, name: str) -> Any:
    """What a note in the run's folder says; "" where there is none."""
    fs, path = storage.connect(folder)
    with contextlib.suppress(FileNotFoundError):
        return json.loads(storage.read(fs, storage.join(path, name)))
    return ""


def write_note(folder: str, name: str, said: Any) -> None:
    """Leave a note in the run's folder, for the next start; where that fails, what it would tell fails again."""
    fs, path = storage.connect(folder)
    with contextlib.suppress(InputError, OSError):
        storage.write(fs, storage.join(path, name), json.dumps(said).encode())


def _train(job: Job, closing: contextlib.ExitStack) -> list[dict[str, float]]:
    recipe, context = job.recipe, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if rank == 0:  # before anything that may fail at every start
        kept = checkpoint.commits(job.folder)
        first_start = _note_start(job.folder, kept[-1].step if kept else 0)
    workers: Workers = Processes() if world > 1 else Alone()
    device = ray.train.torch.get_device()
    tests: dict[str, Split] = {name: ray.get(ref) for name, ref in job.tests.items()}

    if recipe.precision == "float64":
        closing.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
    state = new_state(recipe, len(job.class_names), job.plan.examples, world, device)
    warnings: list[str] = []
    history = resume(state, job.folder, rank, world, warnings)
    if recipe.start_from and not state.step:
        state.load_weights(dict(model_file.read(recipe.start_from).weights))
    plan = replace(job.plan, start=state.step)
    ledger, monitor = Ledger(job.folder, rank), Monitor(len(job.class_names))
    closing.callback(ledger.close)
    tracker = writer = None
    if rank == 0:
        if first_start:
            warnings = []  # the launching process looked at the same checkpoints and told them
        tracker = Tracker(recipe, job.folder)
        closing.callback(tracker.close)
        gauges = {name: Gauge(f"winnow_{name}", said, tag_keys=("run",)) for name, said in GAUGES.items()}
        writer = checkpoint.Writer(job.folder, state.step)
        closing.callback(writer.close)
    last_good = f"step {state.step}" if state.step else "none"
    told_at, told_step, kept_at = time.monotonic(), state.step, time.monotonic()
    waited, preempted = 0.0, False

    by = StepGraph() if recipe.cuda_graph else differentiate
    batches = plan.by_step(stream.groups(ray.train.get_dataset_shard("train"), plan), world)
    for step in range(plan.start, plan.stop):
        asked = time.monotonic()
        held = next(batches)
        waited += time.monotonic() - asked
        expected = [step * recipe.groups + lane for lane in range(rank, recipe.groups, world)]
        if (received := [int(group["group"][0]) for group in held]) != expected:
            raise RuntimeError(f"the stream is out of plan order at step {step}: groups {received}, not {expected}")
        if rank == 0 and step == plan.start:
            forget(job.folder, step)  # now that all is as it should be; others write no file before rank 0's first step
        batch = assemble(held, recipe, len(job.class_names), device)
        lr = recipe.schedule.learning_rate(step)
        outcome = update(state, recipe.objective, batch, lr=lr, workers=workers, steps=recipe.schedule.steps, by=by)
        known = {
            column: np.concatenate([group[column][: recipe.group] for group in held])
            for column in ("id", "epoch", "label")
        }
        ledger.add(step, known, outcome.coefficients)
        monitor.add(step, outcome, batch.label_B)

        measure = state.step in recipe.evaluations
        keep = measure or (recipe.checkpoint_steps > 0 and state.step % recipe.checkpoint_steps == 0)
        if keep or state.step % LOOK_EVERY == 0:
            minutes = (time.monotonic() - kept_at) / 60
            keep |= look(monitor, workers, device, 0 < recipe.checkpoint_minutes < minutes and rank == 0, last_good)
            notice = ray.train.get_preemption_info() is not None  # a machine of ours is about to be taken
            keep, preempted = keep or (notice and not preempted), notice
        now = time.monotonic()
        if tracker and (now - told_at > TELL_EVERY or measure):
            speed = (state.step - told_step) * recipe.batch / (now - told_at)
            row = figures(step, lr, outcome, recipe, speed, waiting=waited / (now - told_at))
            for name, gauge in gauges.items():
                gauge.set(row[name], {"run": recipe.name})
            if collapse := monitor.collapse_warning():
                warnings.append(collapse)
            job.progress.put_nowait({**row, "warnings": warnings})
            warnings, told_at, told_step, waited = [], now, state.step, 0.0
        if measure:
            average_statistics(state, workers)
            if not state.finite():
                raise NotFiniteError(f"parameters are no numbers after step {step}; last good checkpoint: {last_good}")
            measured = evaluate(state, tests, recipe.dataset.views, rank, workers, device)
            if tracker:
                history.append({**row, **measured})
                if problem := tracker.log(history[-1]):
                    warnings.append(problem)
                job.progress.put_nowait(history[-1])
                if state.step == plan.stop:
                    export(state, job)  # before the last checkpoint: a run whose checkpoints say so is whole
        if keep:
            statistics = gather_statistics(state, workers)
            problem = ledger.flush()
            if agreed(workers, device, not problem):  # a checkpoint says that the ledger holds all until it
                if writer:
                    saved = {**state.state_dict(), "statistics": statistics, "history": history}
                    if told := writer.save(saved, measured["top1"] if measure else None):
                        warnings.append(told)
                last_good = f"step {state.step}"
            else:
                problem = problem or "no checkpoint was written: another worker could not write its rows of the ledger"
                if state.step == plan.stop:
                    raise InputError(problem)  # a run is not done before its ledger and checkpoint are
                warnings.append(problem)
            kept_at = told_at = time.monotonic()  # neither is part of the training speed
            told_step, waited = state.step, 0.0
    if writer:
        problem = writer.wait()
        if [commit.step for commit in checkpoint.commits(job.folder)][-1:] != [plan.stop]:
            raise InputError(problem)
        job.progress.put_nowait({**row, "warnings": [*warnings, *filter(None, [problem])]})
    return history


def look(monitor: Monitor, workers: Workers, device: torch.device, due: bool, last_good: str) -> bool:
    """Whether a checkpoint is due by any worker's clock; raises NotFiniteError on all workers together."""
    problem = ""
    try:
        monitor.check_finite(last_good)
    except NotFiniteError as error:
        problem = str(error)
    (flags,) = workers.mean([torch.tensor([float(bool(problem)), float(due)], device=device)])
    if flags[0] > 0:
        raise NotFiniteError(problem or f"the loss of another worker is no number; last good checkpoint: {last_good}")
    return bool(flags[1] > 0)


def agreed(workers: Workers, device: torch.device, mine: bool) -> bool:
    """Whether all workers say yes."""
    return bool(workers.mean([torch.tensor([float(mine)], device=device)])[0] == 1)


def figures(step: int, lr: float, outcome: Outcome, recipe: Recipe, speed: float, waiting: float) -> dict[str, float]:
    """What a progress line and a row of the history have in common.

    `speed` is in noisy images a second, of all workers; `waiting` is the share of time that this worker's host waited
    for data, which a GPU may have spent computing what was queued.
    """
    decided = outcome.coefficients
    return {
        "step": step + 1,
        "cycle": recipe.schedule.cycle(step) + 1,
        "lr": lr,
        "loss": float(outcome.total.detach()),
        **{name: float(part) for name, part in outcome.parts.items()},
        "images_per_second": speed,
        "waiting_for_data": waiting,
        "trust": float(decided.trust_B.mean()),
        "zero_weights": float((decided.weight_B == 0).double().mean()),
    }


def new_network(recipe: Recipe, classes: int, workers: int, device: torch.device) -> nn.Module:
    """The network before step 0, as each of `workers` runs it; raises ValueError for what it cannot be or do."""
    network: nn.Module = networks.build(recipe.network, recipe.dataset.shape[-1], classes, recipe.seed).to(device)
    chunks = recipe.groups // workers // recipe.pass_groups if recipe.pass_groups else 1
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.get_default_dtype()
    if chunks == 1 and dtype != torch.bfloat16 and not (recipe.channels_last or recipe.recompute or recipe.compile):
        return network
    return Passes(
        network,
        chunks=chunks,
        dtype=dtype,
        channels_last=recipe.channels_last,
        recompute=recipe.recompute,
        compiled=recipe.compile,
    )


def new_state(recipe: Recipe, classes: int, examples: int, workers: int, device: torch.device) -> TrainState:
    """The state before step 0, the same on every one of `workers`; for training on `examples` noisy ones."""
    model = new_network(recipe, classes, workers, device)
    memory = recipe.objective.memory(model, examples, classes).to(device)

    def decayed(module: nn.Module) -> frozenset[str]:
        return frozenset(dict(module.named_parameters())) if recipe.decay == "all" else kernels(module)

    return TrainState(
        model,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decayed=decayed(model),
        average=recipe.objective.average_parameters,
        memory=memory,
        memory_decayed=decayed(memory),
    )


def resume(state: TrainState, folder: str, rank: int, world: int, warnings: list[str]) -> list[dict[str, float]]:
    """Continue from the newest whole checkpoint, if there is one; returns the history until then.

    Every worker gets its own batch-norm statistics back, or their mean where the number of workers has changed.
    """
    saved = checkpoint.latest(folder, warnings.append)
    if saved is None:
        return []
    state.load_state_dict(saved)
    of_all = saved["statistics"]
    for name, buffer in state.model.named_buffers():
        values = torch.stack([of_one[name] for of_one in of_all])
        mean = values.mean(0) if values.is_floating_point() else values[0]
        buffer.copy_(values[rank] if len(of_all) == world else mean)
    return saved["history"]


def _note_start(folder: str, step: int) -> bool:
    # Whether this is the first start since the launch; raises InputError where a run starts at one step on and on.
    before = read_note(folder, STARTS)
    starts = [*(each for each in before if each == step), step]
    write_note(folder, STARTS, starts)
    if len(starts) > MOST_STARTS:
        why = read_note(folder, LAST_ERROR) or "its workers were killed"
        raise InputError(
            f"the run started {MOST_STARTS} times at step {step} and came to no checkpoint ({why}): "
            "mend that, or lower checkpoint_steps where machines leave too soon"
        )
    return not before


def assemble(held: list[Group], recipe: Recipe, classes: int, device: torch.device) -> Batch:
    """A worker's groups of one step on the device: noisy examples first, then each group's own trusted ones."""
    weak, strong, trusted = slice(recipe.group), slice(recipe.group, 2 * recipe.group), slice(2 * recipe.group, None)

    def on_device(column: str, rows: slice) -> Tensor:
        tensor = torch.from_numpy(np.concatenate([group[column][rows] for group in held]))
        # From pageable memory the host would wait for all that the GPU has been given to do.
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    return Batch(
        weak_BCHW=normalised(on_device("image", weak)),
        strong_BCHW=normalised(on_device("image", strong)),
        label_B=on_device("label", weak),
        row_B=on_device("row", weak),
        probe_MCHW=normalised(on_device("image", trusted)),
        probe_label_M=on_device("label", trusted),
        group_keys=tuple(key(recipe.seed, Purpose.MIXUP, int(group["group"][0])) for group in held),
        classes=classes,
    )


def export(state: TrainState, job: Job) -> None:
    """Write the evaluated weights as model.safetensors, with class names and recipe in the metadata."""
    from safetensors.torch import save as to_bytes

    weights = {name: value.detach().cpu().contiguous() for name, value in state.inference_weights().items()}
    metadata = {"class_names": json.dumps(job.class_names), "recipe": json.dumps(publishable(job.recipe))}
    fs, path = storage.connect(job.folder)
    storage.write(fs, storage.join(path, model_file.NAME), to_bytes(weights, metadata))
