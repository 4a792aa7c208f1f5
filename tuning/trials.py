"""A sweep's trials on Ray Tune, each a training run of its own under `trials/` in the sweep's folder.

A trial trains on the recipe's data set without its tests: part of the trusted examples validate, the others are the
probe. A step of a trial is one cycle of its schedule, so that it is judged, and perhaps stopped, only where accuracy
means something. All trials have the steps of the sweep's recipe: where cycle lengths are searched, whole cycles fill
them.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain
from rich.console import Console

from pipeline import compute, storage
from pipeline.dataset import HeldOut, InputError
from training import launch
from training.recipe import Recipe
from tuning import outcome, space
from tuning.outcome import Tried
from tuning.sweep import Sweep

REDUCTION = 3  # of the trials that come to a rung, the best third goes on to the next, three times as far
MOST_LOSSES = 3  # of a trial's own process, as when its machine leaves
FOLDER = "tune"  # of Tune's own files


class Trial(tune.Trainable):
    """Train a run, one more cycle each step. What was done before an interruption is not done again."""

    def setup(self, config: dict[str, Any], sweep: Sweep) -> None:
        """See `tune.Trainable`."""
        plain, self.metric = sweep.at(config), sweep.metric
        self.recipe = replace(
            plain,
            name=self.trial_id,
            storage=f"{sweep.folder}/trials",
            dataset=HeldOut(plain.dataset, sweep.validation),
            evaluate_every=0,
        )

    def step(self) -> dict[str, Any]:
        """Return the figures at the end of the next cycle."""
        schedule = self.recipe.schedule
        cycle_end = schedule.ends[self.iteration]
        try:
            result = launch.run(self.recipe, Console(quiet=True), until=cycle_end)
        except InputError as error:  # a result: what Tune sees raised, such as the loss of this process, is tried again
            done = [0, *schedule.ends][self.iteration]
            return {"step": done, self.metric: 0.0, "failed": str(error), "finished": False, tune.result.DONE: True}
        (row,) = (row for row in result.history if row["step"] == cycle_end)
        return {
            **row,
            "failed": "",
            "finished": cycle_end == schedule.steps,
            tune.result.DONE: cycle_end == schedule.steps,
        }


class Asha(ASHAScheduler):
    """Halve successively and asynchronously, but stop nobody until there are others to judge by.

    So the first trials, the recipe's own point and the paper's among them, are trained to their end.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.judged: set[str] = set()

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See `TrialScheduler`."""
        self.judged.add(trial.trial_id)
        decision = super().on_trial_result(controller, trial, result)
        return decision if len(self.judged) > REDUCTION else TrialScheduler.CONTINUE


def first_rung(ends: Sequence[int]) -> int:
    """Return the first cycle end with a third of the steps: where labels are wrong, who learns fastest at first fits
    noise.
    """
    return next(end for end in ends if end * REDUCTION >= ends[-1])


def tuner(sweep: Sweep, searched: Mapping[str, Domain], first: Sequence[Recipe], parallel: int) -> tune.Tuner:
    """Return Ray Tune, ready to fit: `first` are the recipes whose points come before all others."""
    # Tune saves its state now and then; what it has not saved is proposed anew.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial has its line, and error.txt
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its own tables of each trial: ours are the runs'
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's tables beside our lines
    apart = compute.data_nodes()  # a driver takes no room on a machine with a GPU
    here = 0 if sweep.recipe.most_workers else sweep.recipe.actors  # threads that make the views
    wanted = {"CPU": 1 + here}
    room = tune.PlacementGroupFactory([wanted], bundle_label_selector=[apart]) if apart else wanted
    trial = tune.with_resources(tune.with_parameters(Trial, sweep=sweep), room)
    filesystem, path = launch.ray_storage(sweep.folder)
    if sweep.resume:
        # A trial may report once more the cycle at whose end it was stopped.
        warnings.filterwarnings("ignore", "The reported value is ignored because this `step=", UserWarning)
        return tune.Tuner.restore(storage.join(path, FOLDER), trial, storage_filesystem=filesystem)
    points = space.points(searched, first)
    schedule = sweep.recipe.schedule
    algorithm: Searcher | SearchAlgorithm
    if sweep.algorithm == "optuna":
        # TPE's own 10 random trials before it learns are most of a small sweep.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(10, max(sweep.trials // 4, 1)), constant_liar=True, seed=sweep.recipe.seed
        )
        algorithm = OptunaSearch(metric=sweep.metric, mode="max", points_to_evaluate=points, sampler=sampler)
    elif sweep.algorithm == "grid":
        algorithm = BasicVariantGenerator()
    else:
        algorithm = BasicVariantGenerator(points_to_evaluate=points, random_state=sweep.recipe.seed)
    return tune.Tuner(
        trial,
        param_space=space.grid(searched) if sweep.algorithm == "grid" else dict(searched),
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode="max",
            search_alg=algorithm,
            scheduler=Asha(
                time_attr="step",
                max_t=schedule.steps,
                grace_period=first_rung(schedule.ends),
                reduction_factor=REDUCTION,
            ),
            num_samples=1 if sweep.algorithm == "grid" else sweep.trials,
            max_concurrent_trials=parallel,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=MOST_LOSSES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's run has its own
            callbacks=[Lines(sweep.trials, schedule.steps, sweep.metric)],
            verbose=0,
        ),
    )


def tried(result: Any, metric: str) -> Tried:
    """Return a trial of Tune's results."""
    last = result.metrics or {}
    reason = _reason(str(result.error)) if result.error else last["failed"]
    return Tried(
        name=os.path.basename(result.path),
        state="failed" if reason else "finished" if last["finished"] else "stopped",
        fields=dict(result.config),
        figure=None if reason else last[metric],
        step=int(last.get("step", 0)),
        seconds=round(last.get("time_total_s", 0.0), 1),
        reason=reason,
    )


def _reason(error: str) -> str:
    """Return the last line of a traceback."""
    return error.strip().splitlines()[-1]


@dataclass
class Lines(tune.Callback):
    """Print a line on the terminal for every cycle that a trial has trained, with the time left."""

    trials: int
    steps: int
    metric: str
    names: list[str] = field(default_factory=list)
    over: int = 0

    def setup(self, **info: Any) -> None:
        """See `tune.Callback`."""
        self.started, self.over_before = time.monotonic(), self.over

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`."""
        if trial.trial_id not in self.names:
            self.names.append(trial.trial_id)
        self._tell(trial, "starts")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """See `tune.Callback`."""
        if not result["failed"]:
            self._tell(trial, f"{100 * result[self.metric]:.1f} % at step {result['step']:,} of {self.steps:,}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`."""
        self.over += 1
        last = trial.last_result
        stopped = f"failed: {last['failed']}" if last["failed"] else f"stopped early at step {last['step']:,}"
        self._tell(trial, "finished" if last["finished"] else stopped)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`."""
        self.over += 1
        error = Path(trial.error_file).read_text()
        self._tell(trial, f"failed: {_reason(error)}")

    def _tell(self, trial: Any, what: str) -> None:
        left = ""
        if done := self.over - self.over_before:
            seconds = (time.monotonic() - self.started) / done * (self.trials - self.over)
            left = f" · {seconds // 60:.0f}:{seconds % 60:02.0f} left"
        fields = ", ".join(f"{path.split('.')[-1]} {outcome.short(value)}" for path, value in trial.config.items())
        number = self.names.index(trial.trial_id) + 1
        print(f"trial {number}/{self.trials} ({fields}): {what}{left}", flush=True)
