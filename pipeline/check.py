"""Look a raw data set over before hours are spent on it: lists, files, labels, trusted images, and a sample of images.

    python -m pipeline.check webvision gs://raw/webvision --imagenet gs://raw/imagenet

Prints one line a finding, with what to do about it. Exit status: 0 where nothing stands in the way, 1 where something
does, 2 for a wrong command. `python -m pipeline.check DATASET --help` shows the flags of a data set.

Shapes: N images, K classes, S sampled images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import command
from pipeline.cifar import Cifar
from pipeline.dataset import InputError
from pipeline.images import Rejected, check_image, decode
from pipeline.layout import Finding, Layout, Listing
from pipeline.raw import fetch

REJECT = 0.01  # share of unusable images at which ingest stops, by default
SMALL_VERSION = 256  # px: short side of the smaller of the two versions in which WebVision is distributed
IMBALANCE = 10  # times as many images in the largest class as in the smallest: worth a note
NAMED = 10  # classes that are named
RUN = 16  # sampled rows that stay together in Parquet, whose row groups are read whole
MARKS = {"ok": ("✓", "green"), "note": ("•", "cyan"), "warning": ("!", "yellow"), "error": ("✗", "red")}


@dataclass(frozen=True)
class CifarFiles:
    """CIFAR-10 or CIFAR-100: torchvision's folder, or Parquet. It is small, and trains without ingest."""

    name: ClassVar[str] = "cifar"

    classes: Literal[10, 100] = 10
    """CIFAR-10 or CIFAR-100."""


@dataclass(frozen=True)
class Options:
    """Say how much is looked at."""

    sample: int = 200
    """Images to read and decode, of all splits together; 0 reads none."""

    duplicates: bool = False
    """Look for copies of images across splits and within them, also if compressed anew or scaled. Reads every image."""
    pairs: str = "duplicates.csv"
    """CSV that --duplicates writes: each image with its nearest copy in each split. A local path or any fsspec URL."""

    def __post_init__(self) -> None:
        if self.sample < 0:
            raise ValueError(f"sample is {self.sample}: it must be 0 or more")


@dataclass(frozen=True)
class Report:
    """Say what a check found; `listing` is what the data set's lists say, where it has lists."""

    findings: tuple[Finding, ...]
    listing: Listing | None = None

    def count(self, level: str) -> int:
        """Return the number of findings of a level."""
        return sum(finding.level == level for finding in self.findings)


def check(
    layout: Layout | CifarFiles, url: str, sample: int = 200, pairs: str = "", console: Console | None = None
) -> Report:
    """Report on the raw data set at `url`; `sample` images of all its splits are read and decoded.

    With `pairs`, a file to write, every image is read, and those that are copies of each other are found.
    Raises InputError where a list is missing or wrong, so that nothing more can be found.
    """
    if isinstance(layout, CifarFiles):
        if pairs:
            raise InputError("copies are not looked for in cifar: leave out --duplicates")
        return Report(tuple(_of_cifar(layout, url)))
    listing = layout.listing(url, look_around=True)
    findings = [*_of_counts(listing), *_of_classes(listing), *_of_files(listing), *_of_images(listing, sample)]
    if pairs:
        from pipeline.duplicates import duplicates  # loads Ray, in seconds

        findings += duplicates(listing, pairs, console or Console(highlight=False))
    # A layout may know a better fix for what is found here too: the same words come once, from the layout.
    unique = {finding.what: finding for finding in (*findings, *listing.findings)}
    return Report(tuple(unique.values()), listing)


def _of_cifar(layout: CifarFiles, url: str) -> Iterator[Finding]:
    data = Cifar(layout.classes).load(url, seed=0)
    yield from (
        _of_count(split, count, published)
        for split, count, published in (
            ("train", len(data.train) + len(data.probe), 50_000),
            ("test", len(data.tests["test"]), 10_000),
        )
    )
    yield Finding("ok", f"{len(data.class_names)} classes, all images decoded")


def _of_counts(listing: Listing) -> Iterator[Finding]:
    for split in listing.splits:
        yield _of_count(split, listing.count(split), listing.expected.get(split))
    if "train" not in listing.splits:
        yield Finding("error", "no training images", "check the path and the lists")
    if not set(listing.splits) - {"train", "probe"}:
        yield Finding("error", "no evaluation set", "give one: without it nobody knows how good a model is")


def _of_count(split: str, count: int, published: int | None) -> Finding:
    if published is None:
        return Finding("ok", f"{split}: {count:,} images")
    if count == published:
        return Finding("ok", f"{split}: {count:,} images, as published")
    fix = "copy the lists again, or go on if you mean to use other images"
    return Finding("warning", f"{split}: {count:,} images, {published:,} are published", fix)


def _of_classes(listing: Listing) -> Iterator[Finding]:
    names = listing.class_names
    train_K, probe_K = (_per_class(listing, split) for split in ("train", "probe"))
    yield Finding("ok", f"{len(names):,} classes: {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}")
    if not train_K.all():
        fix = "check the lists, or take these classes out"
        yield Finding("warning", f"no training image of {_some_classes(names, train_K == 0)}", fix)
    filled_K = train_K[train_K > 0]
    if len(filled_K):
        uneven = filled_K.max() > IMBALANCE * filled_K.min()
        yield Finding("note" if uneven else "ok", f"train: {_spread(filled_K)} images a class")
    if not probe_K.all():
        fix = "give at least one of each: the method learns from them which labels are wrong"
        yield Finding("error", f"no trusted image of {_some_classes(names, probe_K == 0)}", fix)
    if probe_K.any():
        yield Finding("ok", f"probe: {_spread(probe_K)} trusted images a class")


def _per_class(listing: Listing, split: str) -> np.ndarray:
    label_N = listing.table["label"].filter(pc.equal(listing.table["split"], split)).to_numpy()
    return np.bincount(label_N, minlength=len(listing.class_names))


def _some_classes(names: Sequence[str], chosen_K: np.ndarray) -> str:
    chosen = [name for name, one in zip(names, chosen_K, strict=True) if one]
    return f"{len(chosen)} of {len(names)} classes ({', '.join(chosen[:5])})"


def _spread(values: np.ndarray) -> str:
    return f"{values.min():,} to {values.max():,} (median {np.median(values):,.0f})"


def _of_files(listing: Listing) -> Iterator[Finding]:
    table = listing.table
    for split in listing.splits:
        missing = table["key"].filter(pc.and_(pc.equal(table["split"], split), pc.is_null(table["file"])))
        if len(missing):
            level: Literal["error", "warning"] = "error" if len(missing) > REJECT * len(table) else "warning"
            what = f"{split}: {len(missing):,} of {listing.count(split):,} images are not there (such as {missing[0]})"
            yield Finding(level, what, f"copy them, or their archive; ingest leaves out up to {REJECT:.0%} of all")
    if listing.unlisted > 0:
        what = f"{listing.unlisted:,} image files are in no list"
        yield Finding("note", what, "they are left out", listing.unlisted)


def _of_images(listing: Listing, sample: int) -> Iterator[Finding]:
    rows = _sampled(listing, sample)
    short_sides = []  # of training images, px
    rejected: dict[str, list[str]] = {}  # reason -> keys
    for key, split, raw in zip(rows["key"].to_pylist(), rows["split"].to_pylist(), fetch(rows), strict=True):
        image = _looked_at(raw)
        if isinstance(image, Rejected):
            rejected.setdefault(str(image), []).append(key)
        elif split == "train":
            short_sides.append(min(image.shape[:2]))
    if count := sum(map(len, rejected.values())):
        reasons = "; ".join(f"{len(keys)} {reason} ({keys[0]})" for reason, keys in rejected.items())
        share = count / len(rows)
        what = f"{count} of {len(rows)} sampled images cannot be used: {reasons}"
        fix = f"copy them again; ingest stops where more than {REJECT:.0%} of all are unusable (--reject)"
        yield Finding("error" if share > REJECT else "warning", what, fix)
    elif len(rows):
        yield Finding("ok", f"{len(rows)} sampled images are whole")
    if short_sides:
        median = int(np.median(short_sides))
        version = f"the {SMALL_VERSION}-px version" if median == SMALL_VERSION else "originals"
        yield Finding("ok", f"train: {version}, short side {_spread(np.array(short_sides))} px")


def _looked_at(raw: bytes | Rejected) -> np.ndarray | Rejected:
    # HWC as ingest would store it at full size.
    if isinstance(raw, Rejected):
        return raw
    try:
        return decode(check_image(raw))
    except Rejected as reason:
        return reason


def _sampled(listing: Listing, sample: int) -> pa.Table:
    # Rows of the table that have a file, as many of each split, evenly over its list; of Parquet a few runs.
    table = listing.table
    chosen = [table.slice(0, 0)]
    for split in listing.splits:
        mask = pc.and_(pc.equal(table["split"], split), pc.is_valid(table["file"]))
        row_N = np.flatnonzero(mask.to_numpy())
        run = RUN if len(row_N) and table["how"][int(row_N[0])].as_py() == "row" else 1
        starts = np.linspace(0, len(row_N), -(-sample // (run * len(listing.splits))), endpoint=False, dtype=np.int64)
        rows_S = np.unique(starts[:, None] + np.arange(run))
        chosen.append(table.take(pa.array(row_N[rows_S[rows_S < len(row_N)]])))
    return pa.concat_tables(chosen)


# ---- command line ----------------------------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Print one row a finding, and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in report.findings:
        table.add_row(Text(*MARKS[finding.level]), Text(finding.what), Text(finding.fix))
    console.print(table)
    errors, warnings = report.count("error"), report.count("warning")
    verdict = f"{errors} to fix first" if errors else "ready"
    mark, colour = MARKS["error" if errors else "ok"]
    console.print(Text(f"{mark} {verdict}, {warnings} warnings", colour))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names; the exit status."""
    layouts = {**command.LAYOUTS, CifarFiles.name: CifarFiles}
    chosen = command.parse("pipeline.check", __doc__, layouts, Options, arguments)
    console, options = Console(highlight=False), chosen.options
    try:
        report = check(chosen.layout, chosen.url, options.sample, options.pairs if options.duplicates else "", console)
    except (InputError, ConnectionError) as error:  # nothing more can be found
        report = Report((Finding("error", str(error)),))
    show(report, console)
    return 1 if report.count("error") else 0


if __name__ == "__main__":
    sys.exit(main())
