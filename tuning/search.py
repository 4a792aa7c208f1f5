"""A sweep: recipe and space → trials on Ray Tune → the best recipe → only then, on some seeds, the test set.

A trial is a run of its own under `trials/` in the sweep's folder, on the recipe's data set without its tests: part of
the trusted examples validate, the others are the probe. A step of a trial is one cycle of its schedule, so that it is
judged, and perhaps stopped, only where accuracy means something. All trials have the steps of the sweep's recipe: where
cycle lengths are searched, whole cycles fill them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
import ray
import tyro
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain
from rich.console import Console

from pipeline import compute, storage
from pipeline.dataset import HeldOut, InputError
from training import launch
from training.recipe import Recipe, as_json, difference, override, preset
from tuning import outcome, space
from tuning.outcome import Tried

REDUCTION = 3  # ASHA: of the trials that come to a rung, the best third goes on
OPERATIONAL = ("name", "seed", "evaluate_every", *launch.FREE_TO_CHANGE)  # no part of what is found
TUNE, STATE = "tune", "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """A search for the fields of a recipe that do best on held-out trusted examples."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """Where the search starts; its name, with -sweep, is the sweep's folder under storage."""
    trials: int = 20
    """Trials, in all; a grid has as many as it has points."""
    algorithm: Literal["optuna", "random", "grid"] = "optuna"
    """How points are chosen: Optuna's TPE learns from the trials before; all have early stopping (ASHA)."""
    search: tuple[str, ...] = ()
    """What is searched instead of this script's SPACE: PATH=LOW..HIGH, PATH=log:LOW..HIGH or PATH=A,B,C."""
    metric: Literal["top1", "top5"] = "top1"
    """What is maximised, on the validation examples."""
    validation: int = 0
    """Trusted examples of each class that validate and do not train; 0: half of the smallest class's, at most 50."""
    seeds: int = 1
    """Seeds that the best recipe is retrained on, with all trusted examples, before the test set is read."""
    parallel: int = 0
    """Trials at a time; 0: as many as fit."""
    resume: bool = False
    """Go on with a sweep that was stopped."""

    def __post_init__(self) -> None:
        for name, least in {"trials": 1, "validation": 0, "seeds": 0, "parallel": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {least} or more")

    @property
    def folder(self) -> str:
        """Absolute path or URL of everything the sweep writes."""
        where = self.recipe.storage if "://" in self.recipe.storage else os.path.abspath(self.recipe.storage)
        return storage.join(where, f"{self.recipe.name}-sweep")


def main(recipe: Callable[[str], Recipe], trained_by: Callable[[str], Recipe], searched: Mapping[str, Domain]) -> None:
    """The whole of a tuning script; `trained_by` is the recipe of the training script that takes best.yaml."""
    chosen = preset(recipe, None)
    sweep = tyro.cli(
        Sweep,
        default=Sweep(chosen.recipe),
        args=chosen.rest,
        description=chosen.about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    first = [chosen.recipe, sweep.recipe]
    launch.guarded(lambda: run(sweep, searched, first, chosen.method, trained_by(chosen.method), Console()))


def run(
    sweep: Sweep, searched: Mapping[str, Domain], first: Sequence[Recipe], method: str, base: Recipe, console: Console
) -> None:
    """Search, and write best.yaml, sweep.parquet, sweep.png and result.json into the sweep's folder.

    The points of the recipes `first` are tried before all others. best.yaml makes the best recipe of `base`, the
    method's own. Raises InputError, before a trial starts, for whatever cannot work.
    """
    started = time.monotonic()
    searched = space.parse(sweep.search) if sweep.search else searched
    space.check(searched, sweep.recipe)
    if sweep.algorithm == "grid":
        sweep = replace(sweep, trials=space.size(searched))
    held_out = HeldOut(sweep.recipe.dataset, sweep.validation).load(sweep.recipe.data, sweep.recipe.seed)
    console.print(
        f"{len(held_out.tests['validation'])} trusted examples validate, {len(held_out.probe)} are the probe",
        highlight=False,
    )
    parallel = _room(sweep)
    _claim(sweep, searched)
    tuner = _tuner(sweep, searched, first, parallel)
    tried = [_tried(result, sweep) for result in tuner.fit()]
    outcome.table(tried, console)
    outcome.write(tried, sweep.folder)
    finished = [each for each in outcome.ranked(tried) if each.state == "finished" and each.figure is not None]
    if not finished:
        reasons = sorted({each.reason for each in tried if each.reason})
        raise InputError(f"none of {len(tried)} trials came to its end: {'; '.join(reasons)}")
    best, accuracy = finished[0], finished[0].figure or 0.0
    recipe = _recipe(sweep, best.fields)
    fields = {path: value for path, value in difference(recipe, base).items() if path.split(".")[0] not in OPERATIONAL}
    file = outcome.write_best(method, fields, accuracy, sweep.folder)
    spent, budget = sum(each.step for each in tried), len(tried) * sweep.recipe.schedule.steps
    console.print(
        f"best: trial {best.name}, {100 * accuracy:.1f} % on validation; {len(tried)} trials took {spent:,} steps, "
        f"{100 * (1 - spent / budget):.0f} % less than without early stopping: {file}",
        highlight=False,
        soft_wrap=True,
    )
    searched_in = time.monotonic() - started
    seeds = range(sweep.recipe.seed, sweep.recipe.seed + sweep.seeds)
    finals = [replace(recipe, name=f"best-seed-{seed}", storage=sweep.folder, seed=seed) for seed in seeds]
    tests = [launch.run(final, console).top1 for final in finals]
    if tests:
        listed = ", ".join(f"{100 * test:.2f}" for test in tests)
        console.print(f"test top-1 of the best recipe, seeds {seeds[0]} to {seeds[-1]}: {listed} %", highlight=False)
    result = {
        "trials": len(tried),
        "best_trial": best.name,
        "validation": accuracy,
        "steps": spent,
        "steps_without_early_stopping": budget,
        "seconds": round(searched_in, 1),  # since the last start
        "test_top1": tests,
        "seeds": list(seeds),
    }
    outcome.write_result(result, sweep.folder)


# ---- trials ----------------------------------------------------------------------------------------------------------


class Trial(tune.Trainable):
    """A run; each step trains one more cycle. What was done before an interruption is not done again."""

    def setup(self, config: dict[str, Any], sweep: Sweep) -> None:
        """See `tune.Trainable`."""
        plain = _recipe(sweep, config)
        self.recipe = replace(
            plain,
            name=self.trial_id,
            storage=f"{sweep.folder}/trials",
            dataset=HeldOut(plain.dataset, sweep.validation),
            evaluate_every=0,
        )

    def step(self) -> dict[str, Any]:
        """The figures at the end of the next cycle."""
        schedule = self.recipe.schedule
        cycle_end = schedule.ends[self.iteration]
        result = launch.run(self.recipe, Console(quiet=True), until=cycle_end)
        (row,) = (row for row in result.history if row["step"] == cycle_end)
        return {**row, "finished": cycle_end == schedule.steps, tune.result.DONE: cycle_end == schedule.steps}


@dataclass
class Lines(tune.Callback):
    """A line on the terminal for every cycle that a trial has trained, with the time left."""

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
        self._tell(trial, f"{100 * result[self.metric]:.1f} % at step {result['step']:,} of {self.steps:,}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`."""
        self.over += 1
        last = trial.last_result
        self._tell(trial, "finished" if last["finished"] else f"stopped early at step {last['step']:,}")

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


def _recipe(sweep: Sweep, found: Mapping[str, Any]) -> Recipe:
    """The sweep's recipe at a point, with a schedule that fills the sweep's steps."""
    recipe = override(sweep.recipe, found)
    return replace(recipe, schedule=recipe.schedule.filling(sweep.recipe.schedule.steps))


def _tuner(sweep: Sweep, searched: Mapping[str, Domain], first: Sequence[Recipe], parallel: int) -> tune.Tuner:
    # Tune saves its state now and then; what it has not saved is proposed anew.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial has its line, and error.txt
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its own tables of each trial: ours are the runs'
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's tables beside our lines
    trial = tune.with_resources(tune.with_parameters(Trial, sweep=sweep), {"CPU": 1})
    filesystem, path = launch.ray_storage(sweep.folder)
    if sweep.resume:
        return tune.Tuner.restore(storage.join(path, TUNE), trial, storage_filesystem=filesystem)
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
            scheduler=ASHAScheduler(
                time_attr="step", max_t=schedule.steps, grace_period=schedule.ends[0], reduction_factor=REDUCTION
            ),
            num_samples=1 if sweep.algorithm == "grid" else sweep.trials,
            max_concurrent_trials=parallel,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's run has its own
            callbacks=[Lines(sweep.trials, schedule.steps, sweep.metric)],
            verbose=0,
        ),
    )


def _tried(result: Any, sweep: Sweep) -> Tried:
    last = result.metrics or {}
    step, reason = int(last.get("step", 0)), _reason(str(result.error)) if result.error else ""
    return Tried(
        name=os.path.basename(result.path),
        state="failed" if reason else "finished" if last["finished"] else "stopped",
        fields=dict(result.config),
        figure=last.get(sweep.metric),
        step=step,
        seconds=round(last.get("time_total_s", 0.0), 1),
        reason=reason,
    )


def _reason(error: str) -> str:
    """The last line of a traceback: the cause, in the words that a single run has for it."""
    return error.strip().splitlines()[-1].removeprefix("pipeline.dataset.InputError: ")


# ---- before it starts ------------------------------------------------------------------------------------------------


def _claim(sweep: Sweep, searched: Mapping[str, Domain]) -> None:
    """Make the sweep's folder its own; raises InputError where it holds another one, or none to resume."""
    operational = dict.fromkeys(launch.FREE_TO_CHANGE)
    wanted = {
        "search": space.as_text(searched),
        **{name: getattr(sweep, name) for name in ("trials", "algorithm", "metric", "validation")},
        "recipe": {**as_json(sweep.recipe), **operational},
    }
    wanted = json.loads(json.dumps(wanted))
    storage.require_writable(sweep.folder)
    fs, path = storage.connect(sweep.folder)
    file = storage.join(path, STATE)
    there = storage.exists(fs, file)
    if there and not sweep.resume:
        raise InputError(f"{sweep.folder} holds a sweep: go on with it by --resume, or choose another --name")
    if sweep.resume and not there:
        raise InputError(f"{sweep.folder} holds no sweep to resume: start one without --resume")
    if not there:
        storage.write(fs, file, json.dumps(wanted, indent=2).encode())
        return
    made_with = json.loads(storage.read(fs, file))
    different = [name for name in wanted if wanted[name] != made_with.get(name)]
    if different:
        raise InputError(f"{sweep.folder} is a sweep with another {different[0]}: give the same, or change --name")


def _room(sweep: Sweep) -> int:
    """Trials at a time, on the cluster of RAY_ADDRESS or this machine.

    Raises InputError where the cluster, as far as it can grow, never has room for one.
    """
    recipe = sweep.recipe
    cpus = 1 + recipe.least_workers + recipe.actors
    cores = max((os.cpu_count() or 1) // (max(recipe.least_workers, 1) + recipe.actors), 1)
    compute.join(cpus=(sweep.parallel or cores) * cpus + 1)
    most = ray._private.state.state.get_max_resources_from_cluster_config() or ray.cluster_resources()
    rooms = {"CPU": int(most.get("CPU", 0)) // cpus}
    if recipe.device == "gpu":
        rooms["GPU"] = int(most.get("GPU", 0)) // max(recipe.least_workers, 1)
    for kind, room in rooms.items():
        wanted = cpus if kind == "CPU" else recipe.least_workers
        if room < max(sweep.parallel, 1):
            raise InputError(
                f"{max(sweep.parallel, 1)} trials at a time want {wanted} {kind}s each, and the cluster has "
                f"{most.get(kind, 0):.0f} at most: lower --workers, --actors or --parallel"
            )
    if "RAY_ADDRESS" not in os.environ:  # logical CPUs were made to fit: real ones decide
        rooms["CPU"] = min(rooms["CPU"], cores)
    return sweep.parallel or min(*rooms.values(), sweep.trials)
