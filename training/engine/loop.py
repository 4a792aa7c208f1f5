"""What Ray Train runs on every worker: its place among the others, its share of the stream, and how a start may end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.metrics import Gauge

from pipeline import stream
from pipeline.dataset import InputError
from pipeline.plan import Group, Plan
from training.engine.collectives import Processes, WorkersError
from training.engine.monitor import NotFiniteError
from training.engine.worker import Job, Place, go_on
from training.objectives.interface import Alone
from training.runs import checkpoint, notes

GAUGES = {  # what Prometheus shows of the figures in a progress message
    "images_per_second": "Noisy images trained on a second, by all workers",
    "waiting_for_data": "Share of time that the first worker waited for data",
    "trust": "Mean lambda of the first worker's batch: 1 where labels are believed",
    "zero_weights": "Share of the first worker's batch that counts for nothing",
}

FAULTS = (TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)  # of a program: they come again
LOST = (torch.AcceleratorError, torch.distributed.DistError)  # of a machine, which the next start may not have


@dataclass(frozen=True)
class RayJob(Job):
    """Hold what Ray Train gives every worker. Examples travel as object-store references: read without a copy."""

    tests: Mapping[str, Any]  # evaluation sets, by name
    direct: Sequence[Any]  # training and trusted examples, of a data set that workers read themselves


def train(config: dict[str, RayJob]) -> dict[str, Any]:
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


def _train(job: RayJob, closing: contextlib.ExitStack) -> list[dict[str, float]]:
    """Train as one of Ray Train's workers; return the history."""
    context = ray.train.get_context()
    rank, world, first, gauges = context.get_world_rank(), context.get_world_size(), True, {}
    if rank == 0:  # before anything that may fail at every start
        first = notes.count_start(job.folder, checkpoint.newest_step(job.folder))
        gauges = {name: Gauge(f"winnow_{name}", text, tag_keys=("run",)) for name, text in GAUGES.items()}
    place = Place(
        rank,
        Processes() if world > 1 else Alone(),
        ray.train.torch.get_device(),
        gauges,
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )

    def groups(plan: Plan) -> Iterator[Group]:
        if not job.recipe.dataset.direct:
            return stream.groups(ray.train.get_dataset_shard("train"), plan)
        examples, probe = ray.get(list(job.direct))
        return stream.groups_here(examples, probe, job.recipe.dataset.views, plan, rank, world)

    tests = {name: ray.get(ref) for name, ref in job.tests.items()}
    return go_on(job, place, tests, groups, closing, again=not first)
