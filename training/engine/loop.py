"""What Ray Train runs on every worker: its place among the others, its share of the stream, and how a start may end."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.metrics import Gauge

from pipeline import stream
from pipeline.dataset import InputError
from training.engine import pretrained, setup
from training.engine.chronicle import Chronicle, Silent
from training.engine.collectives import Processes, WorkersError
from training.engine.monitor import NotFiniteError
from training.engine.worker import Job, Worker
from training.objectives.interface import Alone, Workers
from training.runs import checkpoint, notes

GAUGES = {  # what Prometheus shows of the figures in a progress message
    "images_per_second": "Noisy images trained on a second, by all workers",
    "waiting_for_data": "Share of time that the first worker waited for data",
    "trust": "Mean lambda of the first worker's batch: 1 where labels are believed",
    "zero_weights": "Share of the first worker's batch that counts for nothing",
}

FAULTS = (TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)  # of a program: they come again
LOST = (torch.AcceleratorError, torch.distributed.DistError)  # of a machine, which the next start may not have


def train(config: dict[str, Job]) -> dict[str, Any]:
    """Train to the plan's end, from the last checkpoint; rank 0 returns the run's history, one row an evaluation.

    What a person must fix is returned by all workers as an error, because what is raised is tried again: at once where
    they all see it, else on the next start, from the note that the one that saw it left. So is what no retry mends:
    faults of the program, and what torch refuses twice in the same words.
    """
    job = config["job"]
    with contextlib.ExitStack() as closing:
        try:
            if failure := notes.read(job.folder, notes.FAILURE):
                return {"error": failure}
            return {"history": _train(job, closing)}
        except NotFiniteError as error:
            return {"error": str(error)}
        except WorkersError:
            raise  # another worker knows why
        except Exception as error:
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            fixable = isinstance(cause, (InputError, ValueError))
            text = str(cause).partition("\nFailed to ")[0] if fixable else repr(cause)  # Ray adds lines on retries
            final = fixable or isinstance(cause, FAULTS)
            final |= (
                isinstance(cause, RuntimeError) and not isinstance(cause, LOST) and notes.ends_again(job.folder, text)
            )
            notes.write(job.folder, notes.FAILURE if final else notes.LAST_ERROR, text)
            raise cause from None


def _train(job: Job, closing: contextlib.ExitStack) -> list[dict[str, float]]:
    """Train as one of the workers; return the history."""
    recipe, context = job.recipe, ray.train.get_context()
    rank, world, first = context.get_world_rank(), context.get_world_size(), True
    if rank == 0:  # before anything that may fail at every start
        first = notes.count_start(job.folder, checkpoint.newest_step(job.folder))
    workers: Workers = Processes() if world > 1 else Alone()
    device = ray.train.torch.get_device()
    if recipe.precision == "float64":
        closing.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
    state = setup.new_state(recipe, len(job.class_names), job.plan.examples, world, device)
    history = setup.resume(state, job.folder, rank, world)
    if state.step == job.plan.stop:  # the workers were lost after the last checkpoint
        return history
    if (recipe.start_from or recipe.weights) and not state.step:
        state.load_weights(pretrained.start(job.folder))
    chronicle = Silent()
    if rank == 0:
        gauges = {name: Gauge(f"winnow_{name}", text, tag_keys=("run",)) for name, text in GAUGES.items()}
        chronicle = Chronicle(
            recipe, job.folder, job.class_names, progress=job.progress, gauges=gauges, history=history
        )
        if not first:
            why = notes.read(job.folder, notes.LAST_ERROR) or "a worker or its machine was lost"
            chronicle.warn(f"started again at step {state.step}: {why}")
            notes.write(job.folder, notes.LAST_ERROR, "")
    closing.callback(chronicle.close)
    worker = Worker(
        job,
        state,
        {name: ray.get(ref) for name, ref in job.tests.items()},
        rank=rank,
        workers=workers,
        device=device,
        chronicle=chronicle,
        preempted=lambda: ray.train.get_preemption_info() is not None,
        closing=closing,
    )
    worker.train(stream.groups(ray.train.get_dataset_shard("train"), worker.plan))
    return history
