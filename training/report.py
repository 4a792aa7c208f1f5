"""The picture and the table at the end of a run: accuracy over time, and what the method came to think of the labels.

Shapes: R ledger rows, N training examples.
"""

from __future__ import annotations

from collections.abc import Mapping

import fsspec
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipeline.dataset import Examples
from training.launch import Result
from training.runs import ledger

POINTS = 40  # of each curve over time
RIGHT, WRONG = "#1f77b4", "#d62728"


def coefficients_over_time(folder: str, train: Examples) -> dict[str, np.ndarray]:
    """Return mean λ and ω of rightly and wrongly labelled examples, in up to 40 bins of steps (the paper's Figure 4).

    The columns are `step` (bin centres) and `trust_right`, `trust_wrong`, `weight_right`, `weight_wrong`.
    """
    assert train.true_label_N is not None, "right and wrong labels are known only where we added the noise"
    table = ledger.read(folder)
    order = np.argsort(train.id_N)
    rows = order[np.searchsorted(train.id_N[order], table["id"].to_numpy())]
    wrong_R = train.label_N[rows] != train.true_label_N[rows]
    step_R = table["step"].to_numpy()
    edges = np.linspace(0, step_R.max() + 1, min(POINTS, step_R.max() + 1) + 1)
    bin_R = np.digitize(step_R, edges) - 1
    curves = {"step": (edges[:-1] + edges[1:]) / 2}
    for name in ("trust", "weight"):
        value_R = table[name].to_numpy()
        for label, mask_R in (("right", ~wrong_R), ("wrong", wrong_R)):
            total = np.bincount(bin_R[mask_R], value_R[mask_R], len(edges) - 1)
            count = np.bincount(bin_R[mask_R], minlength=len(edges) - 1)
            curves[f"{name}_{label}"] = total / np.maximum(count, 1)
    return curves


def draw(results: Mapping[str, Result], path: str) -> None:
    """Write the picture: accuracy curves of all `results`, and λ and ω of the last one, the method under test."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(13, 4), layout="constrained")
    accuracy, trust, weight = figure.subplots(1, 3)
    method, result = list(results.items())[-1]
    colours = dict(zip(results, ("#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e"), strict=False))
    for name, each in results.items():
        steps = [row["step"] for row in each.history]
        top1 = [100 * row["top1"] for row in each.history]
        accuracy.plot(steps, top1, marker="o", markersize=3, color=colours[name], label=f"{name}: {top1[-1]:.1f} %")
    rate = result.dataset.noise_rate
    _finish(accuracy, f"Test accuracy, {100 * (rate or 0):.0f} % of training labels wrong", "top-1 (%)")
    accuracy.set_ylim(0, 100)

    train = result.dataset.train
    assert isinstance(train, Examples), "right and wrong labels are known only in memory"
    curves = coefficients_over_time(result.folder, train)
    for axes, name in ((trust, "trust"), (weight, "weight")):
        axes.plot(curves["step"], curves[f"{name}_right"], color=RIGHT, label="labelled right")
        axes.plot(curves["step"], curves[f"{name}_wrong"], color=WRONG, label="labelled wrong")
        axes.set_ylim(bottom=0)
    _finish(trust, f"Trust in the given label ({method})", "mean λ")
    _finish(weight, f"Weight of an example ({method})", "mean ω (1 = ordinary)")
    with fsspec.open(path, "wb") as file:
        figure.savefig(file, dpi=110, format="png")


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def table(results: Mapping[str, Result], console: Console) -> None:
    """Print one line a result."""
    rows = Table(title="Test accuracy at the end of the last cycle")
    for heading in ("method", "steps", "top-1"):
        rows.add_column(heading, justify="left" if heading == "method" else "right")
    for name, result in results.items():
        rows.add_row(name, f"{int(result.history[-1]['step']):,}", f"{100 * result.top1:.1f} %")
    console.print(rows)
