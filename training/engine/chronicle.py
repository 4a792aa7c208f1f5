"""What a run reports while it trains: progress, figures, history, checkpoints. Rank 0 reports; others are silent.

Shapes: B noisy examples of this worker.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.dataset import InputError
from training.engine.monitor import Monitor
from training.engine.state import TrainState
from training.objectives.interface import Outcome
from training.recipe import Recipe
from training.runs import checkpoint, ledger, model_file
from training.runs.tracking import Tracker

REPORT_EVERY = 1.0  # seconds between progress messages


class Silent:
    """Report nothing: the chronicle of every worker but rank 0."""

    def begin(self, step: int) -> None:
        """Take note that the first batch is there and `step` begins."""

    def wait(self, seconds: float) -> None:
        """Count time that the worker's host waited for data."""

    def checkpoint_due(self) -> bool:
        """Tell whether the clock asks for a checkpoint."""
        return False

    def step(self, step: int, lr: float, outcome: Outcome, monitor: Monitor, *, now: bool) -> None:
        """Report an update: `now`, or where enough time has passed."""

    def measure(self, measured: dict[str, float]) -> None:
        """Report accuracies after the step just reported."""

    def warn(self, warning: str) -> None:
        """Report a warning with the next message."""

    def keep(self, state: TrainState, statistics: list[dict[str, Tensor]], top1: float | None) -> None:
        """Begin to save a checkpoint, with every worker's batch-norm `statistics`."""

    def pause(self, step: int) -> None:
        """Count nothing until now, before `step`, as time of training."""

    def export(self, state: TrainState) -> None:
        """Write the evaluated weights as the run's model file."""

    def finish(self, state: TrainState) -> None:
        """Wait until the last checkpoint is safe. Raises InputError where it could not be written."""

    def close(self) -> None:
        """Finish what is still being written."""


class Chronicle(Silent):
    """Report to the launching process, trackers and Prometheus, and write checkpoints and model file: rank 0's."""

    def __init__(
        self,
        recipe: Recipe,
        folder: str,
        class_names: tuple[str, ...],
        *,
        progress: Any,
        gauges: Mapping[str, Any],
        history: list[dict[str, float]],
    ) -> None:
        """Take over the run's `folder` with the `history` so far.

        `progress` is a queue for messages; `gauges` are those of some `figures`, by name.
        """
        self.recipe, self.folder, self.class_names, self.progress = recipe, folder, class_names, progress
        self.history = history  # one row an evaluation
        self.tracker = Tracker(recipe, folder)
        self.writer = checkpoint.Writer(folder)
        self.gauges = gauges
        self.row: dict[str, Any] = {}  # figures of the last message
        self.warnings: list[str] = []  # not reported yet
        self.reported_at = self.kept_at = time.monotonic()
        self.reported_step, self.waited = 0, 0.0

    def begin(self, step: int) -> None:
        """See `Silent`. Now that all is as it should be, rows of steps to be repeated go."""
        ledger.forget(self.folder, step)
        self.reported_step = step

    def wait(self, seconds: float) -> None:
        """See `Silent`."""
        self.waited += seconds

    def checkpoint_due(self) -> bool:
        """See `Silent`."""
        return 0 < self.recipe.checkpoint_minutes < (time.monotonic() - self.kept_at) / 60

    def step(self, step: int, lr: float, outcome: Outcome, monitor: Monitor, *, now: bool) -> None:
        """See `Silent`."""
        seconds = time.monotonic() - self.reported_at
        if not (now or seconds > REPORT_EVERY):
            return
        speed = (step + 1 - self.reported_step) * self.recipe.batch / seconds
        self.row = figures(step, lr, outcome, self.recipe, speed, waiting=self.waited / seconds)
        for name, gauge in self.gauges.items():
            gauge.set(self.row[name], {"run": self.recipe.name})
        if collapse := monitor.collapse_warning():
            self.warnings.append(collapse)
        self._send(self.row)
        self.reported_at, self.reported_step, self.waited = self.reported_at + seconds, step + 1, 0.0

    def measure(self, measured: dict[str, float]) -> None:
        """See `Silent`."""
        self.history.append({**self.row, **measured})
        if problem := self.tracker.log(self.history[-1]):
            self.warnings.append(problem)
        self.progress.put_nowait(self.history[-1])

    def warn(self, warning: str) -> None:
        """See `Silent`."""
        self.warnings.append(warning)

    def keep(self, state: TrainState, statistics: list[dict[str, Tensor]], top1: float | None) -> None:
        """See `Silent`."""
        saved = {**state.state_dict(), "statistics": statistics, "history": self.history}
        if problem := self.writer.save(saved, top1):
            self.warnings.append(problem)

    def pause(self, step: int) -> None:
        """See `Silent`."""
        self.kept_at = self.reported_at = time.monotonic()
        self.reported_step, self.waited = step, 0.0

    def export(self, state: TrainState) -> None:
        """See `Silent`."""
        model_file.write(self.folder, state.inference_weights(), self.class_names, self.recipe)

    def finish(self, state: TrainState) -> None:
        """See `Silent`."""
        problem = self.writer.wait()
        if checkpoint.newest_step(self.folder) != state.step:
            raise InputError(problem)
        self.warnings += filter(None, [problem])
        self._send(self.row)

    def close(self) -> None:
        """See `Silent`."""
        self.writer.close()
        self.tracker.close()

    def _send(self, row: dict[str, Any]) -> None:
        self.progress.put_nowait({**row, "warnings": self.warnings})
        self.warnings = []


def figures(step: int, lr: float, outcome: Outcome, recipe: Recipe, speed: float, waiting: float) -> dict[str, float]:
    """Return what a progress line and a row of the history have in common.

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
