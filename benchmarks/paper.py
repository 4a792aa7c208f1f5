"""Tables 1 to 9 and figures 2 to 4 of the paper as cells: what it prints, and the run of ours that stands beside it.

Published figures of other systems are those that the paper quotes, from networks and schedules of their own; beside
them stands our implementation in this harness, on the paper's default network, or on that which a cell names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from training.objectives.registry import BASELINES, PRESETS

WRN, RN29, DENSENET, RN50 = "wrn-28-10", "resnet29", "densenet100", "resnet50"
ROG = "ours: layers of other blocks, weighted on the trusted images"
PD = "published: MentorNet DD, learned from other data, which is not here; ours: the predefined curriculum, PD"


@dataclass(frozen=True)
class Cell:
    """Hold one figure of the paper."""

    table: str
    dataset: str  # cifar10, cifar100, webvision-mini, webvision, food101n, clothing1m
    noise: str  # kind:rate for CIFAR; "" where labels are as they come
    row: str  # what tells it from the others of its column
    method: str  # name of a --method, one of its ablations ("reference M-4"), or "rog"
    network: str
    trusted: int = 10  # images a class
    published: str = ""  # as printed, top-1 in %; "" where the paper only draws it
    remark: str = ""

    @property
    def name(self) -> str:
        """Return its name on the command line."""
        return ":".join(part for part in (self.table, self.dataset, self.noise, self.row) if part)


def cells() -> list[Cell]:
    """Return every figure of the paper's tables, the runs behind its figures 2 to 4, and table A, which is ours."""
    return [*_tables_1_and_2(), *_table_3(), *_table_4(), *_table_5(), *_tables_6_and_7(), *_table_8(), *_table_9(),
            *_figures(), *_everything()]  # fmt: skip


def _across(table: str, dataset: str, noises: list[str], rows: list[tuple[Any, ...]]) -> Iterator[Cell]:
    # Rows of a table: (row, method, network, trusted a class, remark, a figure a column; None where it has none).
    for row, method, network, trusted, remark, *figures in rows:
        for noise, published in zip(noises, figures, strict=True):
            if published is not None:
                yield Cell(table, dataset, noise, row, method, network, trusted, published, remark)


def _tables_1_and_2() -> Iterator[Cell]:
    noises = ["uniform:0", "uniform:0.2", "uniform:0.4", "uniform:0.8"]
    yield from _across("T1", "cifar10", noises, [
        ("supervised", "supervised", WRN, 10, "", "96.1", None, None, None),
        ("supervised-rn29", "supervised", RN29, 10, "", "92.7", None, None, None),
        ("gce", "gce", WRN, 10, "", "93.5", "89.9 ± 0.2", "87.1 ± 0.2", "67.9 ± 0.6"),
        ("mentornet", "mentornet", WRN, 10, PD, "96.0", "92.0", "89.0", "49.0"),
        ("rog", "rog", DENSENET, 10, ROG, "94.2", "87.4", "81.8", None),
        ("l2r", "reweight", WRN, 100, "", "96.1", "90.0 ± 0.4", "86.9 ± 0.2", "73.0 ± 0.8"),
        ("m-correction", "m-correction", WRN, 10, "", "93.6", "94.0", "92.0", "86.8"),
        ("rn29", "reference", RN29, 10, "", "94.4", "92.9 ± 0.2", "92.5 ± 0.5", "85.6 ± 1.1"),
        ("wrn-1-a-class", "reference", WRN, 1, "", "96.8", "95.4 ± 0.6", "94.5 ± 1.0", "87.9 ± 5.1"),
        ("wrn-5-a-class", "reference", WRN, 5, "", "96.8", "96.4 ± 0.0", "95.5 ± 0.6", "91.8 ± 3.0"),
        ("wrn", "reference", WRN, 10, "", "96.8", "96.2 ± 0.2", "95.9 ± 0.2", "93.7 ± 0.5"),
    ])  # fmt: skip
    yield from _across("T2", "cifar100", noises, [
        ("supervised", "supervised", WRN, 10, "", "81.6", None, None, None),
        ("supervised-rn29", "supervised", RN29, 10, "", "71.3", None, None, None),
        ("gce", "gce", WRN, 10, "", "81.4", "66.8 ± 0.4", "61.8 ± 0.2", "47.7 ± 0.7"),
        ("mentornet", "mentornet", WRN, 10, PD, "79.0", "73.0", "68.0", "35.0"),
        ("l2r", "reweight", WRN, 10, "", "81.2", "67.1 ± 0.1", "61.3 ± 2.0", "35.1 ± 1.2"),
        ("m-correction", "m-correction", WRN, 10, "", "70.3", "68.7", "61.7", "48.2"),
        ("rn29", "reference", RN29, 10, "", "72.1", "69.3 ± 0.5", "67.0 ± 0.8", "60.7 ± 1.0"),
        ("wrn-1-a-class", "reference", WRN, 1, "", "83.0", "77.4 ± 0.4", "75.1 ± 1.1", "62.1 ± 1.2"),
        ("wrn-5-a-class", "reference", WRN, 5, "", "83.0", "80.4 ± 0.5", "79.6 ± 0.3", "73.6 ± 1.5"),
        ("wrn", "reference", WRN, 10, "", "83.0", "81.2 ± 0.7", "80.2 ± 0.3", "75.5 ± 0.2"),
    ])  # fmt: skip


def _table_3() -> Iterator[Cell]:
    yield from _across("T3", "cifar10", ["asymmetric:0.2", "asymmetric:0.4", "asymmetric:0.8"], [
        ("gce", "gce", WRN, 10, "", "89.5 ± 0.3", "82.3 ± 0.7", None),
        ("forward", "forward", WRN, 10, "", "89.1 ± 0.5", "83.6 ± 0.3", None),
        ("rn29", "reference", RN29, 10, "", "92.7 ± 0.2", "90.2 ± 0.5", "78.9 ± 3.5"),
        ("wrn", "reference", WRN, 10, "", "96.5 ± 0.2", "94.9 ± 0.1", "79.3 ± 2.4"),
    ])  # fmt: skip


def _table_4() -> Iterator[Cell]:
    for dataset, figures in {
        "cifar10": ("70.0", "71.0", "81.8", "88.3"),
        "cifar100": ("53.6", "56.9", "65.1", "73.7"),
    }.items():
        rows = [
            ("rog", "rog", DENSENET),
            ("l2r", "reweight", WRN),
            ("rn29", "reference", RN29),
            ("wrn", "reference", WRN),
        ]
        for (row, method, network), published in zip(rows, figures, strict=True):
            remark = ROG if method == "rog" else ""
            yield Cell("T4", dataset, "semantic", row, method, network, published=published, remark=remark)


def _table_5() -> Iterator[Cell]:
    yield from _across("T5", "cifar10", ["open_set:cifar100", "open_set:cifar100+imagenet", "open_set:imagenet"], [
        ("supervised-rn29", "supervised", RN29, 10, "", "77.8", "80.3", "84.4"),
        ("supervised-densenet", "supervised", DENSENET, 10, "", "79.0", "86.7", "81.6"),
        ("supervised", "supervised", WRN, 10, "", "82.8", "84.7", "88.7"),
        ("l2r", "reweight", WRN, 10, "", "81.8", "81.3", "85.0"),
        ("rog", "rog", DENSENET, 10, ROG, "83.4", "87.1", "84.4"),
        ("rn29", "reference", RN29, 10, "", "86.4", "87.4", "90.0"),
        ("wrn", "reference", WRN, 10, "", "92.3", "93.0", "94.0"),
    ])  # fmt: skip


def _tables_6_and_7() -> Iterator[Cell]:
    inception = "inception_resnet_v2"
    for dataset, rows in {
        "webvision-mini": [
            ("co-teaching", "co-teaching", inception, "61.5/84.7"),
            ("incv", "incv", inception, "61.6/85.0"),
            ("mentornet", "mentornet", inception, "63.8/85.8"),
            ("rn50", "reference", RN50, "78.0/94.4"),
            ("inception", "reference", inception, "80.0/94.9"),
        ],
        "webvision": [
            ("mentornet", "mentornet", inception, "64.2/84.8"),
            ("rn50", "reference", RN50, "65.8/85.8"),
            ("inception", "reference", inception, "69.0/88.3"),
        ],
    }.items():
        for row, method, network, published in rows:
            remark = f"top-1/top-5; {PD}" if method == "mentornet" else "top-1/top-5"
            yield Cell("T6", dataset, "", row, method, network, published=published, remark=remark)
    for row, method, published in (
        ("supervised", "supervised", "81.44"),
        ("cleannet", "cleannet", "83.95"),
        ("self-learning", "self-learning", "85.11"),
        ("rn50", "reference", "87.57"),
    ):
        yield Cell("T7", "food101n", "", row, method, RN50, published=published)
    yield Cell("S5.3", "clothing1m", "", "rn50", "reference", RN50, published="77.21")


def _table_8() -> Iterator[Cell]:
    unread = "labels are not read"
    for dataset, figures in {
        "cifar10": ("51.2", "92.4 ± 0.7", "94.5 ± 0.3", "86.8", "93.7 ± 0.5"),
        "cifar100": ("34.5", "57.6 ± 0.4", "67.3 ± 0.3", "48.2", "75.2 ± 0.2"),
    }.items():
        rows = [
            ("mixmatch-wrn-28-2", "mixmatch", "wrn-28-2", unread),
            ("mixmatch-kl-wrn-28-2", "mixmatch-kl", "wrn-28-2", unread),
            ("mixmatch-kl", "mixmatch-kl", WRN, unread),
            ("m-correction", "m-correction", WRN, ""),
            ("wrn", "reference", WRN, ""),
        ]
        for (row, method, network, remark), published in zip(rows, figures, strict=True):
            yield Cell("T8", dataset, "uniform:0.8", row, method, network, published=published, remark=remark)


def _table_9() -> Iterator[Cell]:
    # fmt: off
    figures = [("64.43", "33.52"), ("66.14", "36.04"), ("67.82", "37.01"), ("78.06", "61.81"), ("79.96", "75.42"),
               ("73.63", "54.76"), ("79.16", "72.69"), ("81.05", "74.04"), ("78.4", "72.7"), ("62.5", "47.1")]
    # fmt: on
    for number, pair in enumerate(figures, start=1):
        for rate, published in zip(("0.4", "0.8"), pair, strict=True):
            trusted = 1 if number == 10 else 10
            yield Cell(
                "T9", "cifar100", f"uniform:{rate}", f"M-{number}", f"reference M-{number}", WRN, trusted, published
            )


def _figures() -> Iterator[Cell]:
    for method, row in (("reference", "wrn"), ("reweight", "l2r"), ("supervised", "supervised")):
        for schedule in ("cosine", "steps"):
            yield Cell("F2", "cifar10", "uniform:0.4", f"{row}-{schedule}", method, WRN, remark="drawn as curves")
    for k in (1, 20):  # those that the text names; the legend is not in it
        yield Cell("F3", "cifar100", "uniform:0.8", f"k{k}", "reference", WRN, remark="drawn as curves")
    yield Cell("F4", "cifar10", "uniform:0.4", "trust", "reference", WRN, remark="mean λ of right and wrong labels")
    for rate in ("0.9", "0.95"):  # "extreme noise ratios"; which ones is only drawn
        for row, method in (("with-relabelling", "reference"), ("without-relabelling", "reference M-8")):
            yield Cell("F4", "cifar100", f"uniform:{rate}", row, method, WRN, remark="drawn as curves; rates are ours")


def _everything() -> Iterator[Cell]:
    """Yield Table A, ours: every method under five kinds of noise, and the ablations of `winnow` under two."""
    for noise in ("uniform:0.4", "uniform:0.8", "asymmetric:0.4", "semantic", "human"):
        for method in ("rog", *PRESETS, *BASELINES):
            yield Cell("A", "cifar10", noise, method, method, WRN)
        if noise.startswith("uniform"):
            for number in range(1, 11):
                trusted = 1 if number == 10 else 10
                yield Cell("A", "cifar10", noise, f"winnow-M-{number}", f"winnow M-{number}", WRN, trusted)
