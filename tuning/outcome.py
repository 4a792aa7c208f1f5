"""What a sweep leaves: a table on the terminal, sweep.parquet, sweep.png, best.yaml and result.json."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from pipeline import storage

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

LOG_WIDTH = 160  # of a table in a log, which has no width of its own


@dataclass(frozen=True)
class Tried:
    """Hold a trial that is over."""

    name: str
    state: Literal["finished", "stopped", "failed"]  # stopped: early, by ASHA
    fields: dict[str, Any]  # by dotted path
    figure: float | None  # the last one on validation; None where a trial failed before its first
    step: int  # steps trained
    seconds: float
    reason: str  # of a failure


def ranked(tried: Sequence[Tried]) -> list[Tried]:
    """Return finished ones first, then those that were stopped, by their figures; then those that failed."""
    order = {"finished": 0, "stopped": 1, "failed": 2}
    return sorted(tried, key=lambda each: (order[each.state], -(each.figure or 0.0)))


def table(tried: Sequence[Tried], console: Console) -> None:
    """Print all trials, the best one first."""
    paths = list(tried[0].fields)
    shown = Table("trial", *(path.split(".")[-1] for path in paths), "validation", "steps", "", box=None)
    for each in ranked(tried):
        figure = "" if each.figure is None else f"{100 * each.figure:.1f} %"
        state = each.reason if each.state == "failed" else each.state
        shown.add_row(each.name, *(short(each.fields[path]) for path in paths), figure, f"{each.step:,}", state)
    (console if console.is_terminal else Console(file=console.file, width=LOG_WIDTH)).print(shown)


def short(value: Any) -> str:
    """Return a value to three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(tried: Sequence[Tried], folder: str) -> None:
    """Write sweep.parquet, a row a trial, and sweep.png."""
    rows = [
        {**each.fields, "trial": each.name, "state": each.state, "validation": each.figure, "steps": each.step}
        | {"seconds": each.seconds, "reason": each.reason}
        for each in tried
    ]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    _write(folder, "sweep.parquet", file.getvalue())
    if any(each.figure is not None for each in tried):
        _write(folder, "sweep.png", picture(tried))


def write_best(method: str, fields: Mapping[str, Any], figure: float, folder: str) -> str:
    """Write best.yaml, which --recipe of a training script reads; returns where."""
    plain = {path: list(value) if isinstance(value, tuple) else value for path, value in fields.items()}
    held = yaml.safe_dump({"method": method, **plain}, sort_keys=False)
    _write(folder, "best.yaml", f"# {100 * figure:.1f} % on the validation examples of {folder}\n{held}".encode())
    return storage.join(folder, "best.yaml")


def write_result(result: Mapping[str, Any], folder: str) -> None:
    """Write result.json."""
    _write(folder, "result.json", json.dumps(result, indent=2).encode())


def _write(folder: str, name: str, data: bytes) -> None:
    fs, path = storage.connect(folder)
    storage.write(fs, storage.join(path, name), data)


# ---- the picture -----------------------------------------------------------------------------------------------------


def picture(tried: Sequence[Tried]) -> bytes:
    """Return a PNG: the best so far against the steps spent, and every trial as a line through its fields."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 8), layout="constrained", dpi=150)
    best_so_far(tried, above)
    parallel_coordinates(tried, below)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()


def best_so_far(tried: Sequence[Tried], axes: Axes) -> None:
    """Draw trials as dots where they ended, and the best finished one's figure as a line."""
    spent = np.cumsum([each.step for each in tried])
    best = -np.inf
    steps, heights = [], []
    for each, at in zip(tried, spent, strict=True):
        if each.state == "finished" and each.figure is not None:
            best = max(best, each.figure)
        steps.append(at)
        heights.append(100 * best if np.isfinite(best) else np.nan)
    axes.step(steps, heights, where="post", color="black", label="best so far")
    for state, marker, label in (("finished", "o", "trained to the end"), ("stopped", "v", "stopped early")):
        rows = [row for row, each in enumerate(tried) if each.state == state and each.figure is not None]
        axes.plot(spent[rows], [100 * (tried[row].figure or 0.0) for row in rows], marker, label=label)
    axes.set(xlabel="steps, all trials together", ylabel="validation accuracy, %", title=f"{len(tried)} trials")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def parallel_coordinates(tried: Sequence[Tried], axes: Axes) -> None:
    """Draw an upright a field, a line a trial, coloured by its figure; those that were stopped early are thin."""
    held = sorted((each for each in tried if each.figure is not None), key=lambda each: each.figure or 0.0)
    paths = list(tried[0].fields)
    places = {path: _place([each.fields[path] for each in held]) for path in paths}
    figures = np.array([100 * (each.figure or 0.0) for each in held])
    colours = matplotlib.colormaps["viridis"]
    scale = matplotlib.colors.Normalize(figures.min(), max(figures.max(), figures.min() + 1e-6))
    for row, (each, figure) in enumerate(zip(held, figures, strict=True)):
        heights = [places[path][0][row] for path in paths]
        width = 2.0 if each.state == "finished" else 0.7
        axes.plot(range(len(paths)), heights, color=colours(scale(figure)), linewidth=width, marker="o", markersize=3)
    for place, path in enumerate(paths):
        axes.axvline(place, color="black", linewidth=0.5)
        for height, text in places[path][1]:
            behind = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
            axes.text(place + 0.03, height, text, fontsize=8, va="center", bbox=behind)
    axes.set_xticks(range(len(paths)), [path.split(".")[-1] for path in paths])
    axes.set_xlim(-0.2, len(paths) - 0.6)
    axes.set_ylim(-0.08, 1.08)
    axes.set_yticks([])
    axes.set_title("every trial through its fields; thick lines were trained to the end")
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.figure.colorbar(matplotlib.cm.ScalarMappable(scale, colours), ax=axes, label="validation accuracy, %")


def _place(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    # Heights 0…1 of values on an upright, and its labels; logarithmic where values lie a factor of 10 and more apart.
    names = sorted(set(values))
    if len(names) <= 4 or not all(isinstance(value, (int, float)) for value in names):
        height = {name: row / max(len(names) - 1, 1) if len(names) > 1 else 0.5 for row, name in enumerate(names)}
        return [height[value] for value in values], [(at, short(name)) for name, at in height.items()]
    logarithmic = names[0] > 0 and names[-1] / names[0] >= 10
    numbers = np.log(values) if logarithmic else np.array(values, float)
    low, high = numbers.min(), numbers.max()
    middle = float(np.exp((low + high) / 2)) if logarithmic else (low + high) / 2
    labels = [(0.0, short(float(names[0]))), (0.5, short(middle)), (1.0, short(float(names[-1])))]
    return list((numbers - low) / (high - low)), labels
