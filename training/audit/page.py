"""The page of an audit: figures, plots and galleries of thumbnails in one self-contained HTML file.

Shapes: images H×W×C, K classes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow as pa

from training.audit.evidence import HISTOGRAMS, Findings
from training.audit.neighbours import SIDE, Neighbours

TILE = 192  # px a side of a thumbnail: 98 px on the page, sharp on a display of twice the density too
COARSE = 20  # px: smaller images are shown pixel by pixel
MAP_CLASSES, BESIDE_CLASSES = 24, 12  # the most that a confusion map has room for; beside the table of classes
SHOWN_CLASSES = 20  # of more, those with the most wrong labels get a gallery and a line at once
PER_CLASS, OVERALL = 10, 20  # images of a gallery
CONFUSIONS = 10  # lines
PAIRS = 10
COLOURED = 20  # the most classes that colours on the map tell apart


@dataclass(frozen=True)
class Judged:
    """Hold an image, its label, and what the network makes of it."""

    id: int
    image: np.ndarray | None  # H×W×C uint8
    label: int
    proposed: int
    probability: float  # of the label


@dataclass(frozen=True)
class Report:
    """Hold everything that a page shows."""

    name: str
    about: str  # one line: the data set, the network, what was read
    class_names: tuple[str, ...]
    accuracy: float | None  # top-1 on the evaluation set
    findings: Findings
    images: Mapping[int, np.ndarray]  # of the findings' rows, by id; none where there are features alone
    disputed: Sequence[Judged]  # trusted images that the network disputes, the clearest first
    disputed_images: int  # how many there are in all
    torn: Sequence[tuple[np.ndarray | None, tuple[str, ...]]]  # images stored under several labels, and these
    torn_images: int  # how many there are in all
    neighbours: Neighbours | None = None  # where there are features
    map_suspect_P: np.ndarray | None = None  # which points of their map are suspect


@dataclass(frozen=True)
class Shot:
    """Hold a thumbnail and the text with it."""

    image: str  # data URI; "": there is none
    coarse: bool
    title: str
    given: str
    proposed: str
    note: str


@dataclass(frozen=True)
class Gallery:
    """Hold thumbnails under one heading; `swaps` where the given label is the one in doubt."""

    title: str
    about: str
    shots: Sequence[Shot]
    swaps: bool = True


def render(report: Report) -> str:
    """Return the page, HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("audit.html.j2").read_text())
    findings, names = report.findings, report.class_names
    classes = _classes(findings, names)
    suspects = _suspects(report)
    return template.render(
        name=report.name,
        about=report.about,
        figures=_figures(report),
        histograms={column: _histogram(findings, column) for column in HISTOGRAMS},
        confusions=_confusions(findings, names),
        heatmap=_heatmap(findings, names) if len(names) <= MAP_CLASSES else None,
        beside=len(names) <= BESIDE_CLASSES,
        classes=classes[:SHOWN_CLASSES],
        more_classes=classes[SHOWN_CLASSES:],
        suspects=suspects,
        left_out=int((findings.suspect_K > 0).sum()) - len(suspects),
        others=[_hardest(report), _disputed(report), _torn(report), *_neighbours(report)],
        map=_map(report),
    )


def thumbnail(image_HWC: np.ndarray | None) -> tuple[str, bool]:
    """Return the image as a data URI, TILE px on its longer side, and whether it is coarse; "" where there is none.

    A coarse image, of COARSE px at most, is left as it is.
    """
    if image_HWC is None:
        return "", False
    height, width, channels = image_HWC.shape
    longest = max(height, width)
    coarse = longest <= COARSE
    if not coarse:
        size = max(1, round(width * TILE / longest)), max(1, round(height * TILE / longest))
        way = cv2.INTER_AREA if longest > TILE else cv2.INTER_CUBIC
        image_HWC = cv2.resize(image_HWC, size, interpolation=way).reshape(size[1], size[0], channels)
    kind, settings = ("png", []) if coarse else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 88])
    data = cv2.imencode(f".{kind}", image_HWC[..., ::-1], settings)[1].tobytes()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", coarse


# ---- figures and tables ----------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figures(report: Report) -> list[dict[str, Any]]:
    findings, trusted = report.findings, int(report.findings.trusted_K.sum())
    images, suspects = int(findings.count_K.sum()), int(findings.suspect_K.sum())
    figures = [
        ("Images audited", f"{images:,}", f"{findings.visits / images:.1f} visits each", False),
        ("Suspect labels", f"{suspects:,}", f"{_percent(suspects / images)} of all", True),
        ("Estimated wrong", _percent(findings.wrong_K.sum() / images), "the sum of 1 − quality", True),
        ("Trusted labels disputed", f"{report.disputed_images:,}", f"of {trusted:,} trusted images", False),
        ("Stored under several labels", f"{report.torn_images:,}", "the same bytes, different labels", False),
    ]
    if report.accuracy is not None:
        figures.append(("Accuracy of the judge", _percent(report.accuracy), "top-1 on the evaluation set", False))
    return [dict(zip(("what", "value", "more", "wrong"), figure, strict=True)) for figure in figures]


def _histogram(findings: Findings, name: str) -> list[dict[str, str]]:
    # Heights in % of the tallest bin's, by the square root of the count: suspects are few beside the others.
    (end, bins), count_2H = HISTOGRAMS[name], findings.histograms[name]
    total_H = count_2H.sum(0)
    height_2H = 100 * np.sqrt(total_H / total_H.max()) * count_2H / np.maximum(total_H, 1)
    made = []
    for place, (suspects, others) in enumerate(height_2H.T):
        start, stop = place * end / bins, (place + 1) * end / bins
        hover = f"{start:.2f} to {stop:.2f}: {total_H[place]:,} labels, {count_2H[0, place]:,} suspect"
        made.append({"suspects": f"{suspects:.2f}", "others": f"{others:.2f}", "hover": hover})
    return made


def _confusions(findings: Findings, names: Sequence[str]) -> list[dict[str, str]]:
    largest = np.argsort(-findings.moved_KK, axis=None, kind="stable")[:CONFUSIONS]
    rows = []
    for given, proposed in np.stack(np.unravel_index(largest, findings.moved_KK.shape), 1):
        if (count := findings.moved_KK[given, proposed]) >= 0.5:
            share = _percent(count / findings.count_K[given])
            rows.append({"given": names[given], "proposed": names[proposed], "count": f"{count:,.0f}", "share": share})
    return rows


def _heatmap(findings: Findings, names: Sequence[str]) -> list[dict[str, Any]]:
    share_KK = findings.moved_KK / np.maximum(findings.count_K, 1)[:, None]
    highest = max(share_KK.max(), 1e-9)
    rows = []
    for given, name in enumerate(names):
        cells: list[dict[str, str] | None] = []
        for proposed, share in enumerate(share_KK[given]):
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            hover = f"{_percent(share)} of {name} look like {names[proposed]}"
            shade = f"{60 * share / highest:.0f}"
            cells.append(None if given == proposed else {"shade": shade, "text": text, "hover": hover})
        rows.append({"name": name, "cells": cells})
    return rows


def _classes(findings: Findings, names: Sequence[str]) -> list[dict[str, Any]]:
    # The classes with the most wrong labels first.
    rate_K = findings.wrong_K / np.maximum(findings.count_K, 1)
    return [
        {
            "name": names[k],
            "images": f"{findings.count_K[k]:,}",
            "trusted": f"{findings.trusted_K[k]:,}",
            "suspects": f"{findings.suspect_K[k]:,}",
            "rate": _percent(rate_K[k]),
            "width": round(100 * rate_K[k], 1),
        }
        for k in np.argsort(-findings.wrong_K, kind="stable")
    ]


def _map(report: Report) -> dict[str, Any] | None:
    """Return strokes of the map of features: its points by given label, and by suspicion."""
    around = report.neighbours
    if around is None or report.map_suspect_P is None:
        return None
    largest = np.argsort(-report.findings.count_K, kind="stable")[:COLOURED]
    classes = [
        {
            "name": report.class_names[k],
            "colour": f"hsl({360 * place / len(largest):.0f} 65% {(40, 58)[place % 2]}%)",
            "path": _points(around.map_P2[around.map_label_P == k]),
        }
        for place, k in enumerate(largest)
    ]
    suspect_P = report.map_suspect_P
    return {
        "side": f"{SIDE:.0f}",
        "points": f"{len(suspect_P):,}",
        "classes": classes,
        "left_out": len(report.class_names) - len(largest),
        "calm": _points(around.map_P2[~suspect_P]),
        "suspect": _points(around.map_P2[suspect_P]),
    }


def _points(point_P2: np.ndarray) -> str:
    # Of no length: round ends of a stroke make each of them a dot.
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in point_P2)


# ---- galleries -------------------------------------------------------------------------------------------------------


def shown(findings: Findings, neighbours: Neighbours | None = None) -> list[int]:
    """Return the ids of the images that the page shows."""
    tables = [findings.hardest, *(rows for _, rows in _suspects_by_class(findings))]
    ids = [id_ for table in tables for id_ in table["id"].to_pylist()]
    if neighbours is not None:
        pairs = neighbours.pairs(PAIRS)
        ids += pairs["id"].to_pylist() + pairs["nearest"].to_pylist()
        ids += neighbours.outliers(OVERALL)["id"].to_pylist()
    return ids


def _suspects_by_class(findings: Findings) -> list[tuple[int, pa.Table]]:
    # The most suspect images of each class, of the classes with the most of them.
    label_N = findings.suspects["label"].to_numpy()
    largest = [int(k) for k in np.argsort(-findings.suspect_K, kind="stable")[:SHOWN_CLASSES] if findings.suspect_K[k]]
    return [(k, findings.suspects.filter(pa.array(label_N == k))) for k in largest]


def _suspects(report: Report) -> list[Gallery]:
    galleries = []
    for k, rows in _suspects_by_class(report.findings):
        count, images = report.findings.suspect_K[k], report.findings.count_K[k]
        about = f"{count:,} of {images:,} suspect"
        galleries.append(Gallery(report.class_names[k], about, _shots(report, rows, "quality {quality:.3f}")))
    return galleries


def _hardest(report: Report) -> Gallery:
    about = (
        "No label convinces here, neither the given one nor another: ambiguous, unusual or poor images, and those "
        "that belong to no class. Below the given label is what the network leans to, and in which share of its visits."
    )
    shots = _shots(report, report.findings.hardest, "{stability:.0%} of visits")
    return Gallery("Hardest", about, shots, swaps=False)


def _shots(report: Report, rows: pa.Table, note: str) -> list[Shot]:
    names, shots = report.class_names, []
    for row in rows.to_pylist():
        proposed = names[row["proposed"]] if row["proposed"] != row["label"] else ""
        image, title = thumbnail(report.images.get(row["id"])), f"id {row['id']}"
        shots.append(Shot(*image, title, names[row["label"]], proposed, note.format(**row)))
    return shots


def _disputed(report: Report) -> Gallery:
    about = (
        "Trusted images to which the network, trained on them, still gives another label: look here for errors in the "
        "trusted set. With them stands how probable the network holds the trusted label."
    )
    if not report.disputed:
        about = "The network agrees with every trusted label. It was trained on them, so only gross errors would show."
    names, shots = report.class_names, []
    for one in report.disputed:
        note = f"p {one.probability:.3f}"
        shots.append(Shot(*thumbnail(one.image), f"id {one.id}", names[one.label], names[one.proposed], note))
    return Gallery("Trusted, and disputed", about, shots, swaps=False)


def _torn(report: Report) -> Gallery:
    others = "are not looked for" if report.neighbours is None else "may be among the look-alikes"
    about = "The same bytes are stored under these labels, so all but one are wrong."
    if not report.torn:
        about = "No two stored images have the same bytes and different labels."
    about += f" Copies that were scaled or compressed anew have other bytes and {others}."
    shots = [Shot(*thumbnail(image), "", " / ".join(labels), "", "") for image, labels in report.torn]
    return Gallery("Stored under several labels", about, shots, swaps=False)


def _neighbours(report: Report) -> list[Gallery]:
    around = report.neighbours
    if around is None:
        return []

    def one(id_: int, label: int, note: str) -> Shot:
        return Shot(*thumbnail(report.images.get(id_)), f"id {id_}", report.class_names[label], "", note)

    pairs = [
        shot
        for row in around.pairs(PAIRS).to_pylist()
        for shot in (
            one(row["id"], row["label"], f"{row['similarity']:.3f} like the next"),
            one(row["nearest"], row["nearest_label"], f"{row['similarity']:.3f} like the last"),
        )
    ]
    outliers = [
        one(row["id"], row["label"], f"isolation {row['isolation']:.2f}")
        for row in around.outliers(OVERALL).to_pylist()
    ]
    alike = (
        "Two by two, the images whose features are closest of all that have different labels: copies that were scaled, "
        "cut or compressed anew, pictures of one thing, or a pair that nobody can tell apart. If both show the same, "
        "at most one label is right."
    )
    unlike = "The images furthest from the ten next to each: pictures of something else, empty, broken, or merely rare."
    return [
        Gallery("Look-alikes with different labels", alike if pairs else "There are none.", pairs, swaps=False),
        Gallery("Outliers", unlike, outliers, swaps=False),
    ]
