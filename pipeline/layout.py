"""What a raw data set's own lists say, as one table, whatever the layout: what check reads and ingest shards.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.archive import IMAGE, Place, unsafe
from pipeline.dataset import InputError
from pipeline.tree import Tree

# One row an image. `file` is null where the image is known to be missing. `start` and `size` are bytes; size −1 is the
# whole file; how "row" takes row `start` of a Parquet file, from its column number `size` (−1: the one of images).
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # stable_ids(root, key)
        ("key", pa.string()),  # the name in the data set's own lists
        ("label", pa.int32()),
        ("split", pa.string()),  # "train", "probe", or an evaluation set's name
        ("file", pa.string()),  # URL of a file or of the archive that holds it
        ("start", pa.int64()),
        ("size", pa.int64()),
        ("how", pa.string()),  # "file", "stored" (tar, or a zip's uncompressed member), "deflated" (zip), "row"
    ]
)


PLACE = ("key", "file", "start", "size", "how")  # columns that name an image and say where it is
SLICE = 1 << 16  # keys held as Python's objects at once


@dataclass(frozen=True)
class Finding:
    """Hold one line of a check."""

    level: Literal["ok", "note", "warning", "error"]
    what: str
    fix: str = ""
    files: int = 0  # that are below the given place and are not read, for this reason


@dataclass(frozen=True)
class Listing:
    """Hold everything the lists of a data set say."""

    table: pa.Table  # SCHEMA
    class_names: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    expected: dict[str, int] = field(default_factory=dict)  # published number of images of a split
    unlisted: int = -1  # image files there that no list names; −1: not looked for

    def count(self, split: str) -> int:
        """Return the number of images of `split`."""
        return int(pc.sum(pc.equal(self.table["split"], split)).as_py() or 0)

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the splits that have images: train, probe, then the evaluation sets in the table's order."""
        found = self.table["split"].unique().to_pylist()
        return tuple(sorted(found, key=lambda split: {"train": 0, "probe": 1}.get(split, 2)))


class Layout(ABC):
    """Know, as a frozen dataclass, how one data set is distributed; its fields are the flags of check and ingest."""

    name: ClassVar[str]

    @abstractmethod
    def listing(self, url: str, *, look_around: bool = False) -> Listing:
        """Return the lists of the data set at `url`, settled; with `look_around`, unlisted files are counted too.

        Raises InputError where a list is missing or cannot be read.
        """


def stable_ids(root: str, keys: Iterable[str]) -> np.ndarray:
    """Return the ids of images from their data set's name and their own: the same wherever and however the data are
    stored.

    int64, ≥ 0: 63 bits of BLAKE2b, so that two of 10⁸ images share one with probability 5·10⁻⁴; a clash is an error.
    """
    digests = (hashlib.blake2b(f"{root}/{key}".encode(), digest_size=8).digest() for key in keys)
    return (np.frombuffer(b"".join(digests), ">u8") >> np.uint64(1)).astype(np.int64)


def settle(listing: Listing) -> Listing:
    """Return the listing with every image once: evaluation sets win over probe, probe over train, each case a finding.

    Images that one split lists twice are kept once; those it lists under two labels are left out.
    Raises InputError where two images share an id.
    """
    table, findings, splits = listing.table, list(listing.findings), listing.splits
    if len(np.unique(table["id"].to_numpy())) == len(table):
        return listing
    id_N, label_N, key = table["id"].to_numpy(), table["label"].to_numpy(), table["key"]
    rank_N = np.asarray(pc.index_in(table["split"], pa.array(splits, pa.string())))  # train, probe, evaluation sets
    by_id = np.lexsort((np.arange(len(id_N)), -rank_N, id_N))
    first = np.ones(len(by_id), bool)
    first[1:] = id_N[by_id][1:] != id_N[by_id][:-1]
    owner = by_id[np.maximum.accumulate(np.where(first, np.arange(len(by_id)), 0))]  # the row that keeps the id
    again, kept = by_id[~first], owner[~first]

    clashes = np.flatnonzero(pc.not_equal(key.take(again), key.take(kept)).to_numpy())
    if len(clashes):
        one, other = (key[int(side[clashes[0]])].as_py() for side in (again, kept))
        raise InputError(f"{one} and {other} share id {id_N[again[clashes[0]]]}: rename one of them")

    same_split = rank_N[again] == rank_N[kept]
    two_labels = same_split & (label_N[again] != label_N[kept])
    torn = np.isin(again, again[np.isin(kept, kept[two_labels])])  # all rows of an image with two labels
    keep_N = np.ones(len(id_N), bool)
    keep_N[again] = keep_N[kept[two_labels]] = False
    for rank, split in enumerate(splits):
        mine = rank_N[again] == rank
        if twice := len(np.unique(id_N[again[mine & same_split & ~torn]])):
            findings.append(Finding("warning", f"{split} lists {twice:,} images twice", "kept once; fix the list"))
        if count := len(np.unique(id_N[again[mine & two_labels]])):
            example = key[int(again[mine & two_labels][0])]
            findings.append(
                Finding("warning", f"{split} gives {count:,} images two labels ({example})", "left out; choose one")
            )
        for winner, other in enumerate(splits):
            moved = mine & ~same_split & (rank_N[kept] == winner)
            if shared := len(np.unique(id_N[again[moved]])):
                findings.append(
                    Finding("note", f"{shared:,} images of {split} are in {other} too", f"they stay in {other} only")
                )
    return replace(listing, table=table if keep_N.all() else table.filter(pa.array(keep_N)), findings=tuple(findings))


def rows(root: str, split: str, keys: Sequence[str], label_N: np.ndarray, places: Sequence[Place]) -> pa.Table:
    """Return a table of SCHEMA for the N images of one split of the data set `root`."""
    return identified(placed(keys, places), root, label_N, pa.repeat(split, len(keys)))


def placed(keys: Sequence[str] | pa.ChunkedArray, places: Sequence[Place]) -> pa.Table:
    """Return a table with the columns PLACE of N images."""
    columns = [keys, *([place[column] for place in places] for column in range(4))]
    return pa.table(columns, schema=pa.schema([SCHEMA.field(name) for name in PLACE]))


def identified(places: pa.Table, root: str, label_N: np.ndarray, split: pa.Array) -> pa.Table:
    """Return a table of SCHEMA for N images of the data set `root`; `places` has key, file, start, size and how."""
    id_N = np.empty(len(places), np.int64)
    for first in range(0, len(places), SLICE):
        keys = places["key"].slice(first, SLICE).to_pylist()
        id_N[first : first + len(keys)] = stable_ids(root, keys)
    columns = {name: places[name] for name in PLACE}
    columns |= {"id": id_N, "label": label_N.astype(np.int32, copy=False), "split": split}
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def looked_around(
    listing: Listing, tree: Tree, others: Sequence[Place] = (), names: Sequence[str] | None = None
) -> Listing:
    """Return the listing with `file` null where the tree has no such file, and with the tree's images that it does not
    name.

    `others` are images that the data set's lists name, but not this listing. All folders of the tree are listed, unless
    `names`, those of its plain files, are known.
    """
    table = listing.table
    names = list(tree.walk()) if names is None else names
    every = pa.array([f"{tree.url}/{name}" for name in names], pa.string())
    plain = pc.and_(pc.equal(table["how"], "file"), pc.starts_with(table["file"], f"{tree.url}/"))
    missing = pc.fill_null(pc.and_(plain, pc.invert(pc.is_in(table["file"], every))), False)
    if pc.any(missing).as_py():
        file = pc.if_else(missing, pa.scalar(None, pa.string()), table["file"])
        table = table.set_column(table.schema.get_field_index("file"), "file", file)

    images = pa.array([f"{tree.url}/{name}" for name in names if IMAGE.fullmatch(name)], pa.string())
    also = pa.table(
        {"file": [p[0] for p in others], "start": [p[1] for p in others]}, table.select(["file", "start"]).schema
    )
    tables = [table.select(["file", "start"]), also]
    unlisted = len(images) - len(among([each["file"] for each in tables], images))
    if tree.archives:
        archives = pa.array([archive.url for archive in tree.archives], pa.string())
        inside = pa.concat_tables([each.filter(pc.is_in(each["file"], archives)) for each in tables])
        members = sum(len(archive.images) for archive in tree.archives)
        unlisted += members - len(inside.group_by(["file", "start"]).aggregate([]))
    return replace(listing, table=table, unlisted=unlisted)


def among(columns: Sequence[pa.ChunkedArray], values: pa.Array) -> pa.Array:
    """Return those of `values` that are in any of the columns; what is held beside these is of the size of `values`."""
    found = [column.filter(pc.is_in(column, values)).unique() for column in columns]
    return pa.chunked_array(found, values.type).unique()


def findings_of(tree: Tree) -> tuple[Finding, ...]:
    """Return what a tree leaves out."""
    found = [Finding("warning", line.partition(": ")[0], line.partition(": ")[2], 1) for line in tree.unread]
    if tree.unsafe:
        name, reason = tree.unsafe[0]
        what = f"{len(tree.unsafe):,} files are never read (such as {name}: {reason})"
        found.append(Finding("warning", what, "rename and repack them if they are wanted", len(tree.unsafe)))
    return tuple(found)


def counted(where: str, count: int, published: int) -> Finding:
    """Return the finding on the length of a list whose published length is known."""
    if count == published:
        return Finding("ok", f"{where} lists {count:,} images, as published")
    return Finding("warning", f"{where} lists {count:,} images, {published:,} are published", "copy the list again")


# ---- lists -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextList:
    """Hold the lines of a list, and where they are from."""

    where: str
    lines: list[str]
    first: int = 1  # number of the first line

    @staticmethod
    def read(tree: Tree, *names: str) -> TextList:
        """Return the first of `names` that the tree has: UTF-8 text with a line an image, whatever ends the lines.

        Raises InputError where there is none, or where it is no text.
        """
        for name in names:
            try:
                data = tree.read(name)
            except FileNotFoundError:
                continue
            where = storage.join(tree.url, name)
            return TextList(where, text_of(data, where).replace("\r\n", "\n").rstrip("\n").split("\n"))
        if tree.unread:
            raise InputError(tree.unread[0])
        raise InputError(
            f"no {' or '.join(names)} in {tree.url}: give the folder or archive that has it, or copy the data again"
        )

    def without_header(self, header: str) -> TextList:
        """Return the list without its first line where that starts with `header`."""
        return replace(self, lines=self.lines[1:], first=2) if self.lines[0].startswith(header) else self

    def refuse(self, row: int, wanted: str) -> InputError:
        """Return the error of a line that is not `wanted`."""
        return InputError(
            f"{self.where}, line {row + self.first}: {self.lines[row][:80]!r} is not {wanted}: copy the list again"
        )

    def keys(self) -> list[str]:
        """Return one name of an image a line. Raises InputError for an empty line or a name that leaves the folder."""
        for row, key in enumerate(self.lines):
            if not key or unsafe(key):
                raise self.refuse(row, "the name of an image")
        return self.lines

    def labelled(self, classes: int, separator: str = " ") -> tuple[list[str], np.ndarray]:
        """Return names and labels (int32), 0…`classes`−1, from lines "name label"; a name may hold the separator, too.

        Raises InputError for any other line.
        """
        keys, label_N = [], np.empty(len(self.lines), np.int32)
        for row, line in enumerate(self.lines):
            key, _, label = line.rstrip(" \t").rpartition(separator)
            if not (key and label.isascii() and label.isdigit() and int(label) < classes) or unsafe(key):
                raise self.refuse(row, f"the name of an image and a label of 0…{classes - 1}")
            keys.append(key)
            label_N[row] = int(label)
        return keys, label_N


def text_of(data: bytes, where: str) -> str:
    """Return UTF-8 text without a byte order mark. Raises InputError where it is none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is no UTF-8 text (byte {error.start:,}): copy it again, or save it as UTF-8"
        ) from None
