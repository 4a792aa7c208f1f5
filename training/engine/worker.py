"""One training worker: its groups in, updates, its rows of the ledger and, at every checkpoint, the state out.

Shapes: B noisy examples of this worker, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.dataset import InputError, Split
from pipeline.plan import Group, Plan
from training.engine import pretrained, setup
from training.engine.batch import assemble
from training.engine.chronicle import Chronicle, Silent
from training.engine.collectives import agreed, average_statistics, gather_statistics
from training.engine.evaluation import evaluate
from training.engine.graph import StepGraph
from training.engine.monitor import Monitor, NotFiniteError
from training.engine.state import TrainState
from training.engine.step import differentiate, update
from training.objectives.interface import Outcome, Workers
from training.recipe import Recipe
from training.runs import notes
from training.runs.ledger import Ledger

LOOK_EVERY = 10  # steps between looks at loss, clock and notices: each waits for the device and the other workers


@dataclass(frozen=True)
class Job:
    """Hold what every worker is given."""

    recipe: Recipe
    plan: Plan  # from step 0
    class_names: tuple[str, ...]
    folder: str  # the run's own, a local path or URL
    progress: Any  # a queue that the launching process reads


@dataclass(frozen=True)
class Place:
    """Hold where a worker stands: who it is, on what it computes, and what only its surroundings know."""

    rank: int
    workers: Workers
    device: torch.device
    gauges: Mapping[str, Any]  # Prometheus', of rank 0
    preempted: Callable[[], bool]  # whether a machine of the run is about to be taken


def go_on(
    job: Job,
    place: Place,
    tests: Mapping[str, Split],
    groups: Callable[[Plan], Iterator[Group]],
    closing: ExitStack,
    *,
    again: bool = False,
) -> list[dict[str, float]]:
    """Train from the newest checkpoint to the plan's end as one of the workers; return the run's history.

    `groups` gives this worker's groups of what is left of the plan; `again` tells that an earlier start has failed.
    Raises as `Worker.train`.
    """
    recipe = job.recipe
    if recipe.precision == "float64":
        closing.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
    workers = place.workers.size
    state = setup.new_state(recipe, len(job.class_names), job.plan.examples, workers, place.device)
    history = setup.resume(state, job.folder, place.rank, workers)
    if state.step == job.plan.stop:  # the workers were lost after the last checkpoint
        return history
    if (recipe.start_from or recipe.weights) and not state.step:
        state.load_weights(pretrained.start(job.folder))
    chronicle = Silent()
    if place.rank == 0:
        chronicle = Chronicle(
            recipe, job.folder, job.class_names, progress=job.progress, gauges=place.gauges, history=history
        )
        if again:
            why = notes.read(job.folder, notes.LAST_ERROR) or "a worker or its machine was lost"
            chronicle.warn(f"started again at step {state.step}: {why}")
            notes.write(job.folder, notes.LAST_ERROR, "")
    closing.callback(chronicle.close)
    worker = Worker(job, state, tests, place, chronicle, closing)
    worker.train(groups(worker.plan))
    return history


class Worker:
    """Train as a worker of a run, from the step that `state` is at."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        tests: Mapping[str, Split],
        place: Place,
        chronicle: Silent,
        closing: ExitStack,
    ) -> None:
        """Set up; `closing` closes files."""
        self.recipe, self.classes, self.plan = job.recipe, len(job.class_names), replace(job.plan, start=state.step)
        self.state, self.tests = state, tests
        self.rank, self.workers, self.device = place.rank, place.workers, place.device
        self.chronicle, self.preempted, self.noticed = chronicle, place.preempted, False
        self.ledger, self.monitor = Ledger(job.folder, place.rank), Monitor(self.classes)
        closing.callback(self.ledger.close)
        self.by = StepGraph() if self.recipe.cuda_graph else differentiate
        self.last_good = f"step {state.step}" if state.step else "none"

    def train(self, groups: Iterator[Group]) -> None:
        """Train on this worker's `groups`, in order, to the plan's end.

        Raises NotFiniteError, on all workers together, where a loss is NaN or infinite, and InputError where ledger or
        last checkpoint cannot be written.
        """
        batches = self.plan.by_step(groups, self.workers.size)
        for step in range(self.plan.start, self.plan.stop):
            held = self.next_batch(batches, step)
            if step == self.plan.start:
                self.chronicle.begin(step)  # other workers write no file before rank 0's first step
            self.after_step(step, self.step(step, held))
        self.chronicle.finish(self.state)

    def next_batch(self, batches: Iterator[list[Group]], step: int) -> list[Group]:
        """Return this worker's groups of `step`; raises RuntimeError where the stream gives others."""
        asked = time.monotonic()
        held = next(batches)
        self.chronicle.wait(time.monotonic() - asked)
        groups = self.recipe.groups
        expected = [step * groups + place for place in range(self.rank, groups, self.workers.size)]
        if (received := [int(group["group"][0]) for group in held]) != expected:
            raise RuntimeError(f"the stream is out of plan order at step {step}: groups {received}, not {expected}")
        return held

    def step(self, step: int, held: list[Group]) -> Outcome:
        """Update on this worker's groups of `step`, and note what was decided about each example."""
        recipe = self.recipe
        batch = assemble(held, recipe, self.classes, self.device)
        outcome = update(
            self.state,
            recipe.objective,
            batch,
            lr=recipe.schedule.learning_rate(step),
            workers=self.workers,
            steps=recipe.schedule.steps,
            by=self.by,
        )
        known = {
            column: np.concatenate([group[column][: recipe.group] for group in held])
            for column in ("id", "epoch", "label")
        }
        self.ledger.add(step, known, outcome.coefficients)
        self.monitor.add(step, outcome, batch.label_B)
        return outcome

    def after_step(self, step: int, outcome: Outcome) -> None:
        """Look at the loss, report, evaluate and write a checkpoint, as far as it is time for each."""
        done = self.state.step
        measures = done in self.recipe.evaluations
        keeps = measures or (self.recipe.checkpoint_steps > 0 and done % self.recipe.checkpoint_steps == 0)
        if keeps or done % LOOK_EVERY == 0:
            keeps |= self.look()
            notice = self.preempted()
            keeps, self.noticed = keeps or (notice and not self.noticed), notice
        lr = self.recipe.schedule.learning_rate(step)
        self.chronicle.step(step, lr, outcome, self.monitor, now=measures)
        measured = self.measure() if measures else {}
        if keeps:
            self.keep(measured.get("top1"))

    def look(self) -> bool:
        """Return whether a checkpoint is due by the clock; raises NotFiniteError on all workers together."""
        problem = ""
        try:
            self.monitor.check_finite(self.last_good)
        except NotFiniteError as error:
            problem = str(error)
        flags = torch.tensor([float(bool(problem)), float(self.chronicle.checkpoint_due())], device=self.device)
        failed, due = self.workers.mean([flags])[0]
        if failed > 0:
            raise NotFiniteError(
                problem or f"the loss of another worker is NaN or infinite; last good checkpoint: {self.last_good}"
            )
        return bool(due > 0)

    def measure(self) -> dict[str, float]:
        """Evaluate on all test sets, and report it; at the run's end export the model.

        Raises NotFiniteError where parameters are NaN or infinite.
        """
        average_statistics(self.state.model, self.workers)
        if not self.state.finite():
            what = f"parameters are NaN or infinite after step {self.state.step - 1}"
            raise NotFiniteError(f"{what}; last good checkpoint: {self.last_good}")
        views = self.recipe.dataset.views
        measured = evaluate(self.state, self.tests, views, self.rank, self.workers, self.device)
        self.chronicle.measure(measured)
        if self.state.step == self.plan.stop:
            self.chronicle.export(self.state)  # before the last checkpoint: a run whose checkpoints say so is whole
        return measured

    def keep(self, top1: float | None) -> None:
        """Write a checkpoint, if all workers' ledgers hold all rows until it.

        Raises InputError where that is not so at the run's end: a run is not done before its ledger and checkpoint are.
        """
        statistics = gather_statistics(self.state.model, self.workers)
        problem = self.ledger.flush()
        if agreed(self.workers, self.device, not problem):
            self.chronicle.keep(self.state, statistics, top1)
            self.last_good = f"step {self.state.step}"
        else:
            problem = problem or "no checkpoint was written: another worker could not write its rows of the ledger"
            if self.state.step == self.plan.stop:
                raise InputError(problem)
            self.chronicle.warn(problem)
        self.chronicle.pause(self.state.step)  # neither is part of the training speed
