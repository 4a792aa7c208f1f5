"""A sweep: recipe and space → trials on Ray Tune → the best recipe → only then, on some seeds, the test set."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ray
import tyro
from ray.tune.search.sample import Domain
from rich.console import Console

from pipeline import compute, storage
from pipeline.dataset import HeldOut, InputError
from training import launch
from training.recipe import Recipe, as_json, difference, preset
from training.runs.recipe_file import FREE_TO_CHANGE, differences
from tuning import outcome, space, trials
from tuning.sweep import Sweep

OPERATIONAL = ("name", "seed", "evaluate_every", *FREE_TO_CHANGE)  # no part of what is found
STATE = "sweep.json"  # in the sweep's folder: what it is


def main(recipe: Callable[[str], Recipe], trained_by: Callable[[str], Recipe], searched: Mapping[str, Domain]) -> None:
    """Run the whole of a tuning script; `trained_by` is the recipe of the training script that takes best.yaml."""
    chosen = preset(recipe, None)
    sweep = tyro.cli(
        Sweep,
        default=Sweep(chosen.recipe),
        args=chosen.rest,
        description=chosen.about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    first = [chosen.recipe, sweep.recipe]
    launch.guarded(
        lambda: run(sweep, searched, first, chosen.method, trained_by(chosen.method), Console()),
        go_on="run the same command with --resume to go on",
    )


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
    dataset = launch.on_features(sweep.recipe).dataset
    held_out = HeldOut(dataset, sweep.validation).load(sweep.recipe.data, sweep.recipe.seed)
    console.print(
        f"{len(held_out.tests['validation'])} trusted examples validate, {len(held_out.probe)} are the probe",
        highlight=False,
    )
    parallel = _room(sweep)
    _claim(sweep, searched)
    tuner = trials.tuner(sweep, searched, first, parallel)
    tried = [trials.tried(result, sweep.metric) for result in tuner.fit()]
    outcome.table(tried, console)
    outcome.write(tried, sweep.folder)
    finished = [each for each in outcome.ranked(tried) if each.state == "finished" and each.figure is not None]
    if not finished:
        reasons = sorted({each.reason for each in tried if each.reason})
        raise InputError(f"none of {len(tried)} trials came to its end: {'; '.join(reasons)}")
    best, accuracy = finished[0], finished[0].figure or 0.0
    recipe = sweep.at(best.fields)
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
    tests = _tested(recipe, sweep, console)
    result = {
        "trials": len(tried),
        "best_trial": best.name,
        "validation": accuracy,
        "steps": spent,
        "steps_without_early_stopping": budget,
        "seconds": round(searched_in, 1),  # since the last start
        "test_top1": list(tests.values()),
        "seeds": list(tests),
    }
    outcome.write_result(result, sweep.folder)


def _tested(recipe: Recipe, sweep: Sweep, console: Console) -> dict[int, float]:
    """Train the best recipe on each of the sweep's seeds, now with its test set; return top-1 there by seed."""
    seeds = range(sweep.recipe.seed, sweep.recipe.seed + sweep.seeds)
    finals = {seed: replace(recipe, name=f"best-seed-{seed}", storage=sweep.folder, seed=seed) for seed in seeds}
    tests = {seed: launch.run(final, console).top1 for seed, final in finals.items()}
    if tests:
        listed = ", ".join(f"{100 * test:.2f}" for test in tests.values())
        console.print(f"test top-1 of the best recipe, seeds {seeds[0]} to {seeds[-1]}: {listed} %", highlight=False)
    return tests


# ---- before it starts ------------------------------------------------------------------------------------------------


def _claim(sweep: Sweep, searched: Mapping[str, Domain]) -> None:
    """Make the sweep's folder its own; raises InputError where it holds another one, or none to resume."""
    operational = dict.fromkeys(FREE_TO_CHANGE)
    wanted = {
        "search": space.as_text(searched),
        **{name: getattr(sweep, name) for name in ("algorithm", "trials", "metric", "validation")},
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
    different = [name for name in wanted if name != "recipe" and wanted[name] != made_with.get(name)]
    different += [f"recipe.{path}" for path in differences(sweep.recipe, wanted["recipe"], made_with["recipe"])]
    if different:
        raise InputError(f"{sweep.folder} is a sweep with another {different[0]}: give the same, or change --name")


def _room(sweep: Sweep) -> int:
    """Return how many trials run at a time, on the cluster of RAY_ADDRESS or this machine.

    Raises InputError where the cluster, as far as it can grow, never has room for one.
    """
    recipe = sweep.recipe
    cpus = 1 + recipe.least_workers + recipe.actors
    cores = max((os.cpu_count() or 1) // (max(recipe.least_workers, 1) + recipe.actors), 1)
    compute.join(cpus=(sweep.parallel or cores) * cpus + 1)
    if compute.training_nodes() is not None:  # nodes come when asked, and nothing tells how many may
        return sweep.parallel or 1
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
