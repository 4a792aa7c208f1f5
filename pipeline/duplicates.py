"""Copies of images across and within the splits of a raw data set: one look at every image, as a Ray Data job.

Shapes: N images, W words of a hash, P pairs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import ray.data
from rich.console import Console

from pipeline import job, near, storage
from pipeline.images import Rejected
from pipeline.layout import PLACE, Finding, Listing
from pipeline.raw import fetch

TASKS = 64  # the least, where there are images for them
LEAST_ROWS, TASK_ROWS = 64, 1024  # of a task: rows of Parquet sources are held in memory together


@dataclass(frozen=True)
class Copies:
    """Hold P pairs of images that are copies of each other, by the rows of `table`."""

    table: pa.Table  # the images that could be read, split after split as Listing.splits has them
    plain: int  # of these: with so little detail that only their bytes were compared
    row_P: np.ndarray
    other_P: np.ndarray  # a later row: never in an earlier split
    distance_P: np.ndarray  # bits
    equal_P: np.ndarray  # whether the bytes are equal


def duplicates(listing: Listing, pairs: str, console: Console) -> Iterator[Finding]:
    """Yield what is found of copies among the images of a listing, and write each with its nearest copy in each split
    to `pairs`, a CSV file.

    All images are read once. Raises InputError for storage that cannot be used.
    """
    storage.require_writable(pairs.rpartition("/")[0] or ".")
    copies = find(listing, console)
    fs, path = storage.connect(pairs)
    storage.write(fs, path, _csv(copies, listing.class_names))
    yield from _findings(copies, listing.splits, pairs)


def find(listing: Listing, console: Console) -> Copies:
    """Return each image with its nearest copy in each split, of those images that can be read."""
    table = listing.table.filter(pc.is_valid(listing.table["file"]))
    rank_N = np.asarray(pc.index_in(table["split"], pa.array(listing.splits, pa.string())), np.int64)
    order_N = np.argsort(rank_N, kind="stable")
    table = table.take(pa.array(order_N))
    row_N, digest_N, hash_NW, detailed_N = _looked_at(table, console)
    copies = near.nearest_copies(digest_N, hash_NW, detailed_N, rank_N[order_N][row_N])
    return Copies(table.take(pa.array(row_N)), int((~detailed_N).sum()), *copies)


def _looked_at(table: pa.Table, console: Console) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    # The rows that could be read, in order, with digests of their bytes, hashes, and whether these say anything.
    size = int(np.clip(-(-len(table) // TASKS), LEAST_ROWS, TASK_ROWS))
    places = table.select(PLACE).append_column("row", pa.array(np.arange(len(table))))
    tasks = [places.slice(start, size) for start in range(0, len(table), size)]
    job.settings()
    looked = ray.data.from_arrow(tasks).map_batches(look, batch_size=None, batch_format="pyarrow")
    seen = []
    with job.JobProgress(len(table), 0, console) as progress:
        for rows in job.unwrapped(looked.iter_batches(batch_size=None, batch_format="pyarrow")):
            seen.append(rows.filter(rows["readable"]))
            progress.advance(len(rows))
    rows = pa.concat_tables(seen).sort_by("row")
    hash_NW = np.stack([rows[f"word{w}"].to_numpy() for w in range(near.WORDS)], axis=1)
    return rows["row"].to_numpy(), rows["digest"].to_numpy(), hash_NW, rows["detailed"].to_numpy(zero_copy_only=False)


def look(task: pa.Table) -> pa.Table:
    """Return a digest and the hash of the images of one task's rows; of those that cannot be read, zeros."""
    count = len(task)
    digest_N, hash_NW = np.zeros(count, np.int64), np.zeros((count, near.WORDS), np.uint64)
    readable_N, detailed_N = np.zeros((2, count), bool)
    for row, raw in enumerate(fetch(task)):
        if isinstance(raw, Rejected):
            continue
        try:
            perceptual = near.perceptual_hash(raw)
        except Rejected:  # equal error pages are no copies of an image
            continue
        digest_N[row], readable_N[row] = near.digest(raw), True
        if perceptual is not None:
            hash_NW[row], detailed_N[row] = perceptual, True
    words = {f"word{w}": hash_NW[:, w] for w in range(near.WORDS)}
    return pa.table({"row": task["row"], "digest": digest_N, "readable": readable_N, "detailed": detailed_N, **words})


def _csv(copies: Copies, class_names: Sequence[str]) -> bytes:
    names = pa.array(class_names, pa.string())
    columns: dict[str, pa.Array] = {}
    for lead, row_P in (("", copies.row_P), ("other_", copies.other_P)):
        rows = copies.table.take(pa.array(row_P))
        columns |= {f"{lead}key": rows["key"], f"{lead}split": rows["split"], f"{lead}label": names.take(rows["label"])}
    file = io.BytesIO()
    pyarrow.csv.write_csv(pa.table({**columns, "distance": copies.distance_P, "equal": copies.equal_P}), file)
    return file.getvalue()


def _findings(copies: Copies, splits: Sequence[str], pairs: str) -> Iterator[Finding]:
    count = len(copies.table)
    if copies.plain:
        what = f"{copies.plain:,} of {count:,} images are flat or nearly so"
        yield Finding("note", what, "only their bytes were compared; look at some")
    if not len(copies.row_P):
        yield Finding("ok", f"no copies among {count:,} images")
    rank_N = np.asarray(pc.index_in(copies.table["split"], pa.array(splits, pa.string())))
    for number, other in enumerate(splits):
        for split in splits[: number + 1]:
            chosen_P = (rank_N[copies.row_P] == splits.index(split)) & (rank_N[copies.other_P] == number)
            if chosen_P.any():
                yield _finding(copies, chosen_P, split, other, pairs)


def _finding(copies: Copies, chosen_P: np.ndarray, split: str, other: str, pairs: str) -> Finding:
    # What the chosen pairs, of an image of `split` and one of `other`, mean.
    row_P, other_P = copies.row_P[chosen_P], copies.other_P[chosen_P]
    example = " and ".join(copies.table["key"][int(row)].as_py() for row in (row_P[0], other_P[0]))
    count = len(np.unique(other_P))
    label_N = copies.table["label"].to_numpy()
    torn = int((label_N[row_P] != label_N[other_P]).sum())
    labels = f", {torn:,} under another label" if torn else ""
    if split == other:
        return Finding("note", f"{count:,} images of {split} are copies within it{labels} ({example})", f"see {pairs}")
    what = f"{count:,} images of {other} are copies of images of {split}{labels} ({example})"
    if other == "probe":  # split is train
        return Finding("warning", what, f"trusted images are noisy training examples too: take those out, see {pairs}")
    if split in ("train", "probe"):
        return Finding("error", what, f"a leak, which makes results too good: take them out of {split}, see {pairs}")
    return Finding("note", what, f"results on both are not independent: see {pairs}")
