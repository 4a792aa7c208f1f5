"""Every comparison of the paper, run through the same launch path: full size, or small enough for 2 cores.

    python -m benchmarks.tables --list
    python -m benchmarks.tables T1:cifar10:uniform:0.8:rn29 --data /data/cifar --seeds 3
    python -m benchmarks.tables 'A:*' --scale small --data ../shared/data --seeds 2        an hour or two on 2 cores
    python -m benchmarks.tables --markdown                                                 the table of docs/results.md

A run killed goes on when the command is given again; what is in the results already is not run again, but for
`--again`. `--scale small`: CIFAR-10 at 16 px, 2,000 training images, WRN-10-1 (0.08 M parameters), B = M = 50, 400
steps, in one cosine cycle where a method's authors do not have it otherwise (`benchmarks.rivals`).
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
import os
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.paper import RN29, WRN, Cell, cells
from benchmarks.rivals import as_its_authors_do
from benchmarks.rog import layer_features, robust_ensemble
from pipeline.cifar import Cifar
from pipeline.dataset import Examples, InputError
from pipeline.noise import Noise
from training import cifar, clothing1m, food101n, webvision
from training.engine.batch import normalised
from training.engine.schedule import Schedule
from training.launch import Result, guarded, run
from training.objectives.ieg import Ieg, ablation
from training.objectives.interface import Objective
from training.objectives.registry import METHODS
from training.recipe import Recipe
from training.runs import ledger
from training.runs.model_file import BATCH, ModelFile, read

Scale = Literal["full", "small"]
RESULTS = "benchmarks/results/tables.jsonl"
OPEN_SET_RATE = 0.6  # share of images replaced: not in the paper; as Lee et al. 2019 do, to our memory
STEPS = Schedule(lr=0.1, first_cycle=60_000, cycles=1, drops=(40_000, 50_000))  # figure 2, over L2R's number of steps


@dataclass(frozen=True)
class Settings:
    """Say what to run, or to show."""

    cells: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of cells, or patterns such as 'T1:*' (in quotes)."""
    data: str = ""
    """Where the cells' data set is. With CIFAR also cifar10_labels.npz (arrays cifar10n_worse_label and
    rog_semantic_vgg), cifar100_labels.npz (semantic_vgg13) and open_set_NAME.parquet, where a cell needs them."""
    scale: Scale = "full"
    """full: the paper's size. small: CIFAR-10 on a subset and a small network, half a minute a run on one core."""
    seeds: int = 1
    """How many runs a cell, with seeds 0, 1 …, which draw split, noise, network and all else."""
    storage: str = "runs/tables"
    """Where runs are kept and resumed from."""
    out: str = RESULTS
    """Results, a line a run; lines are only added, and of several for one run the last counts."""
    again: bool = False
    """Run what an earlier version has in the results already, as the code is now."""
    workers: int = 1
    """Training workers of a run; 0 trains in this process."""
    list: bool = False
    """Show every cell with its published figure and ours."""
    markdown: bool = False
    """Print the table of the small scale in docs/results.md."""


@dataclass(frozen=True)
class Row:
    """Hold one run of one cell."""

    cell: str
    scale: Scale
    seed: int
    top1: float  # on the whole test set, at the declared end of the last cycle
    best_top1: float  # of all evaluations of the run: never a headline
    steps: int
    network: str
    noise_rate: float | None  # share of labels really wrong
    trust_right: float | None  # mean λ in the last epoch where the label is right
    trust_wrong: float | None  # … and where it is wrong
    seconds: float
    device: str
    version: str


# ---- a cell's recipe -------------------------------------------------------------------------------------------------


def recipe_of(cell: Cell, settings: Settings, seed: int) -> Recipe:
    """Return the run that stands beside a cell. Raises InputError where there is none at that scale."""
    made = {
        "cifar10": cifar.recipe, "cifar100": cifar.recipe, "webvision-mini": webvision.recipe,
        "webvision": webvision.recipe, "food101n": food101n.recipe, "clothing1m": clothing1m.recipe,
    }[cell.dataset]("supervised" if cell.method == "rog" else cell.method.split()[0])  # fmt: skip
    trained = replace(cell, row=_supervised(cell)) if cell.method == "rog" else cell
    named = replace(
        made,
        name=f"{settings.scale}-{trained.name}-{seed}".replace(":", "-"),
        network=cell.network, objective=_objective(cell, made.objective), data=settings.data, storage=settings.storage,
        workers=settings.workers, seed=seed,
    )  # fmt: skip
    if isinstance(made.dataset, Cifar):
        # Table 9, column PA, as docs/method.md reads it (Ablations)
        without_policy = cell.method.endswith((" M-1", " M-2", " M-7"))
        dataset = replace(
            made.dataset,
            classes=10 if cell.dataset == "cifar10" else 100,
            noise=_noise(cell, settings.data),
            probe_per_class=cell.trusted,
            policy="none" if without_policy else "autoaugment",
        )
        named = replace(named, dataset=dataset)
    if settings.scale == "small":
        return as_its_authors_do(_small(cell, named), cell)
    if cell.network == RN29:
        named = replace(named, weight_decay=2e-4, decay="kernels")
    if cell.dataset == "webvision":
        objective = replace(named.objective, kl=4.0) if isinstance(named.objective, Ieg) else named.objective
        named = replace(named, objective=objective, schedule=replace(named.schedule, first_cycle=18_750, cycles=5))
    return as_its_authors_do(replace(named, schedule=STEPS) if cell.row.endswith("-steps") else named, cell)


def _small(cell: Cell, recipe: Recipe) -> Recipe:
    if cell.dataset != "cifar10":
        raise InputError(f"{cell.name} has no small version: choose cells of cifar10, such as 'A:*'")
    return replace(
        recipe,
        dataset=replace(recipe.dataset, size=16, limit=2_000),  # type: ignore[type-var]
        network="wrn-10-1",
        schedule=Schedule(first_cycle=400, cycles=1),
        batch=50,
        probe_batch=50,
        group=50,
        actors=1,
        evaluate_every=100,
    )


def _supervised(cell: Cell) -> str:
    # The row whose network a cell of RoG classifies with: the same run, trained once.
    return "supervised" if cell.network == WRN else "supervised-densenet"


def _objective(cell: Cell, made: Objective) -> Objective:
    base, _, number = cell.method.partition(" M-")
    if number:
        preset = METHODS[base]()
        assert isinstance(preset, Ieg)
        return ablation(int(number), preset)
    if cell.table == "F3":
        assert isinstance(made, Ieg)
        return replace(made, kl=float(cell.row.removeprefix("k")))
    return made


def _noise(cell: Cell, data: str) -> Noise:
    kind, _, rate = cell.noise.partition(":")
    match kind:
        case "human":
            return Noise("labels", source=f"{data}/cifar10_labels.npz:cifar10n_worse_label")
        case "semantic":
            array = "rog_semantic_vgg" if cell.dataset == "cifar10" else "semantic_vgg13"
            return Noise("labels", source=f"{data}/{cell.dataset}_labels.npz:{array}")
        case "open_set":
            return Noise("open_set", OPEN_SET_RATE, f"{data}/open_set_{rate}.parquet")
    return Noise("uniform" if kind == "uniform" else "asymmetric", float(rate))


# ---- running ---------------------------------------------------------------------------------------------------------


def measure(cell: Cell, settings: Settings, seed: int, console: Console) -> Row:
    """Run a cell, or go on with it."""
    recipe, started = recipe_of(cell, settings, seed), time.monotonic()
    result = run(recipe, console)
    top1 = _generative_top1(result) if cell.method == "rog" else result.top1
    best = top1 if cell.method == "rog" else max(row["top1"] for row in result.history)
    right, wrong = _mean_trust(result, recipe)
    return Row(
        cell.name, settings.scale, seed, round(top1, 4), round(best, 4), recipe.schedule.steps, recipe.network,
        result.dataset.noise_rate, right, wrong, round(time.monotonic() - started, 1), _device(), _version(),
    )  # fmt: skip


def _generative_top1(result: Result) -> float:
    """Return RoG's accuracy: that of the robust generative classifiers on the features of the run's network."""
    model, data = read(result.folder), result.dataset
    train, probe, test = data.train, data.probe, next(iter(data.tests.values()))
    assert isinstance(train, Examples)
    assert isinstance(test, Examples)
    labels = [torch.from_numpy(examples.label_N) for examples in (train, probe, test)]
    features = [_features(model, examples) for examples in (train, probe, test)]
    ensemble = robust_ensemble(features[0], labels[0], features[1], labels[1], len(data.class_names))
    return (ensemble(features[2]).argmax(1) == labels[2]).double().mean().item()


def _features(model: ModelFile, examples: Examples) -> list[Tensor]:
    network, test_view = model.network(), model.source.views.test
    parts = []
    for start in range(0, len(examples), BATCH):
        image_NHWC = np.stack([test_view(examples.image(row)) for row in range(len(examples))[start : start + BATCH]])
        with torch.inference_mode():
            parts.append(layer_features(network, normalised(torch.from_numpy(image_NHWC)), len(model.class_names)))
    return [torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]


def _mean_trust(result: Result, recipe: Recipe) -> tuple[float | None, float | None]:
    """Return mean λ in the last epoch where the label is right, and where it is wrong (figure 4), or None."""
    train = result.dataset.train
    if not isinstance(train, Examples) or train.true_label_N is None:
        return None, None
    first = recipe.schedule.steps - math.ceil(len(train) / recipe.batch)
    tables = [pq.read_table(part.path) for part in ledger.parts(result.folder) if part.last >= first]
    last = pa.concat_tables(tables).filter(pc.field("step") >= first)
    row_N = np.searchsorted(train.id_N, last["id"].to_numpy())
    right_N, trust_N = (train.label_N == train.true_label_N)[row_N], last["trust"].to_numpy()
    return tuple(round(float(trust_N[which].mean()), 4) if which.any() else None for which in (right_N, ~right_N))  # type: ignore[return-value]


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def _version() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


# ---- showing ---------------------------------------------------------------------------------------------------------


def read_rows(path: str) -> list[Row]:
    """Return the results so far: of every cell, scale and seed the newest."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return list({(row.cell, row.scale, row.seed): row for row in rows}.values())


def mean_and_deviation(rows: list[Row], cell: str, scale: Scale) -> str:
    """Return `85.6 ± 1.1`: mean and standard deviation over seeds, in %; "" where it has not been run."""
    top1 = [100 * row.top1 for row in rows if (row.cell, row.scale) == (cell, scale)]
    return f"{np.mean(top1):.1f} ± {np.std(top1):.1f}" if len(top1) > 1 else f"{top1[0]:.1f}" if top1 else ""


def listing(rows: list[Row]) -> Table:
    """Return every cell: what it is, what was published and what has been run."""
    shown = Table("cell", "method", "network", "trusted a class", "steps", "published", "ours", "ours, small", "remark")
    for cell in cells():
        ours = [mean_and_deviation(rows, cell.name, scale) for scale in ("full", "small")]
        steps = recipe_of(cell, Settings(), 0).schedule.steps
        shown.add_row(cell.name, cell.method, cell.network, str(cell.trusted), f"{steps:,}",
                      cell.published or "–", ours[0] or "not run", ours[1] or "–", cell.remark)  # fmt: skip
    return shown


def markdown(rows: list[Row]) -> str:
    """Return table A at the small scale: methods that were run, by their mean over the noises; then the ablations."""
    in_table = [cell for cell in cells() if cell.table == "A"]
    found = {(cell.noise, cell.row): mean_and_deviation(rows, cell.name, "small") for cell in in_table}
    noises = list(dict.fromkeys(cell.noise for cell in in_table))
    methods = list(
        dict.fromkeys(cell.row for cell in in_table if "-M-" not in cell.row and found[cell.noise, cell.row])
    )

    def top1(noise: str, method: str) -> float:
        return float(found[noise, method].split()[0]) if found[noise, method] else math.nan

    def shown(noise: str, method: str) -> str:
        best = np.nanmax([top1(noise, other) for other in methods])
        return f"**{found[noise, method]}**" if top1(noise, method) == best else found[noise, method]

    mean = {method: float(np.mean([top1(noise, method) for noise in noises])) for method in methods}
    by_method = [["method", *(noise.replace(":", " ") for noise in noises), "mean"]]
    by_method += [
        [f"`{m}`", *(shown(noise, m) for noise in noises), "" if math.isnan(mean[m]) else f"{mean[m]:.1f}"]
        for m in sorted(methods, key=lambda m: -np.nan_to_num(mean[m]))
    ]
    rates = ("0.4", "0.8")
    published = {cell.name: cell.published for cell in cells() if cell.table == "T9"}
    ablations = [["", *(f"published, CIFAR-100, {rate}" for rate in rates), *(f"`winnow`, {rate}" for rate in rates)]]
    for number in range(1, 11):
        theirs = [published[f"T9:cifar100:uniform:{rate}:M-{number}"] for rate in rates]
        ablations.append([f"M-{number}", *theirs, *(found[f"uniform:{rate}", f"winnow-M-{number}"] for rate in rates)])
    return "\n\n".join(_as_markdown(*table) for table in (by_method, ablations))


def _as_markdown(head: list[str], *body: list[str]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def chosen_cells(patterns: tuple[str, ...]) -> list[Cell]:
    """Return the cells that the patterns name; raises InputError for a pattern that names none."""
    every = {cell.name: cell for cell in cells()}
    names: dict[str, None] = {}
    for pattern in patterns:
        found = fnmatch.filter(every, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, every, 1)
            raise InputError(f"no cell is called {pattern}: {f'did you mean {close[0]}?' if close else 'see --list'}")
        names.update(dict.fromkeys(found))
    return [every[name] for name in names]


def main() -> None:
    """Run what is missing of the chosen cells, a line of results each, and show them."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    if settings.markdown:
        print(markdown(read_rows(settings.out)))
    elif settings.list:
        Console(width=200).print(listing(read_rows(settings.out)))
    elif not settings.cells:
        raise InputError("no cells given: name some, or see --list")
    else:
        chosen = chosen_cells(settings.cells)
        if settings.again:
            settings = replace(settings, storage=f"{settings.storage}/{_version()}")
        for cell in chosen:
            recipe_of(cell, settings, 0)  # what cannot be run is said before anything is
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        for seed in range(settings.seeds):
            for cell in chosen:
                rows = [row for row in read_rows(settings.out) if not settings.again or row.version == _version()]
                if (cell.name, settings.scale, seed) not in {(row.cell, row.scale, row.seed) for row in rows}:
                    row = measure(cell, settings, seed, console)
                    with open(settings.out, "a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
        for cell in chosen:
            ours = mean_and_deviation(read_rows(settings.out), cell.name, settings.scale)
            console.print(f"{cell.name}: {ours} %, published {cell.published or '–'}", highlight=False)


if __name__ == "__main__":
    guarded(main)
