"""Anyone's own images: a folder a class, a table of paths and labels, Parquet that holds the images, or WebDataset.

Nothing is guessed: what could be meant in two ways is an error, what is not read is counted in a finding. Check, ingest
and predict see the same rows by the same code.

Shapes: N images, K classes.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import folders, tables
from pipeline.archive import IMAGE
from pipeline.columns import URI, Columns
from pipeline.dataset import InputError
from pipeline.gathering import Part, gather
from pipeline.layout import PLACE, Finding, Layout, Listing, among, identified, looked_around, settle, text_of
from pipeline.tree import Tree, absolute

_WHOLE = re.compile("(0|[1-9][0-9]*)(?:[.]0+)?")  # as text; 007 and +1 are names
_NEGATIVE = re.compile("-[1-9][0-9]*")


@dataclass(frozen=True)
class Custom(Layout):
    """Images in folders, one a class: at the top, or in train/ with val/, test/ and probe/ beside it; archived or not.

    Or a .csv or .parquet table with columns uri and label and, as you like, split and trusted; Parquet with a column of
    encoded images in place of the uri; or WebDataset's tars. See docs/own-data.md.
    """

    name: ClassVar[str] = "custom"

    trusted: str = ""
    """URL of a list of trusted images: CSV with columns uri and label, such as suggest.csv of an audit once labels are
    filled in (lines without one are passed over), or a name a line, which keeps its label."""
    image_column: str = ""
    """Column of a table with images or their paths; by default uri, path, image_path, file_name or url."""
    label_column: str = ""
    """Column of a table with labels (default: label), or field of WebDataset's .json files (default: .cls files)."""
    split_column: str = ""
    """Column of a table with names of splits (default: split)."""
    trusted_column: str = ""
    """Column of a table that is true where a label is certainly right (default: trusted)."""
    id_column: str = ""
    """Column with a name of each image, unlike all others of its file (default: id, where Parquet holds the images)."""

    def listing(self, url: str, *, look_around: bool = False) -> Listing:
        """Return the images at `url`, settled; with `look_around`, unlisted files are counted too.

        Classes are the sorted names, or whole numbers 0…K−1 as they are given, or names in the order that a file gives.
        Raises InputError for what cannot be read, contradicts itself, or could be meant in two ways.
        """
        url = absolute(url)
        found = gather(url, self.columns, used={absolute(self.trusted)} if self.trusted else set())
        rows = pa.concat_tables([part.rows for part in found.parts]).unify_dictionaries()
        if not pc.any(pc.equal(rows["split"], "train")).as_py():
            raise InputError(f"no training images in {url}: check the path, and the names of splits and folders")
        class_names, label_N = _classes(found.parts, rows["label"], url)
        rows = rows.drop_columns("label")
        pa.default_memory_pool().release_unused()
        findings = [*found.findings, *_alike(class_names)]
        if self.trusted:
            rows = _trust(absolute(self.trusted), rows, class_names, label_N, findings)
        table = identified(_one_key(rows), self.name, label_N, rows["split"])
        listing = Listing(table, class_names, tuple(findings), unlisted=found.unlisted)
        if look_around and found.home and not found.home.startswith(("http://", "https://")):  # which list nothing
            used = {*(part.where for part in found.parts), *([absolute(self.trusted)] if self.trusted else [])}
            listing = _with_neighbours(listing, found.home, used)
        return _probe_checked(settle(listing))

    @property
    def columns(self) -> Columns:
        """Return the names of columns that were given."""
        return Columns(self.image_column, self.label_column, self.split_column, self.trusted_column, self.id_column)


def images_at(url: str, columns: Columns) -> pa.Table:
    """Return key, file, start, size and how of all images at `url`, whatever is said of their labels, as Custom names
    them.

    Raises InputError for what cannot be read.
    """
    found = gather(absolute(url), columns, labelled=False)
    return pa.concat_tables([part.rows.select(PLACE) for part in found.parts])


def _with_neighbours(listing: Listing, home: str, used: Collection[str]) -> Listing:
    # The listing with files that are missing, and with findings on those that no row names, but for the URLs `used`.
    tree = Tree.open(home)
    names = list(tree.walk())
    looked = looked_around(listing, tree, names=names)
    known = {*used, *(archive.url for archive in tree.archives)}
    others = [name for name in names if not IMAGE.fullmatch(name) and f"{home}/{name}" not in known]
    urls = pa.array([f"{home}/{name}" for name in others], pa.string())
    named = set(among([listing.table["file"]], urls).to_pylist())
    others = [name for name in others if f"{home}/{name}" not in named]
    return replace(looked, findings=(*looked.findings, *folders.unread(others, (), "those of the table")))


# ---- classes and columns ---------------------------------------------------------------------------------------------


def _classes(parts: Sequence[Part], labels: pa.ChunkedArray, url: str) -> tuple[tuple[str, ...], np.ndarray]:
    # Class names, and the label (int32) of each image.
    given = {part.class_names: part.where for part in parts}
    if len(given) > 1:
        raise InputError(f"{' and '.join(sorted(given.values())[:2])} give their classes other names: make them agree")
    numbered = {_numbered(part): part.where for part in parts if len(part.rows)}
    if len(numbered) > 1:
        raise InputError(
            f"{numbered[True]} has numbers as labels and {numbered[False]} names: use one of the two everywhere"
        )
    encoded = labels.combine_chunks()
    values = encoded.dictionary.to_pylist()
    if True in numbered:
        values = [value.partition(".")[0] for value in values]  # 3.0 is 3
        names = _numbers(set(map(int, values)), url)
    else:
        names = next(iter(given)) or tuple(sorted(values))
    if len(names) < 2:
        raise InputError(f"{url} has one class ({names[0]}): classification needs 2 or more")
    number_of = {name: number for number, name in enumerate(names)}
    return names, np.array([number_of[value] for value in values], np.int32)[encoded.indices.to_numpy()]


def _numbered(part: Part) -> bool:
    # Whether all labels of a part are whole numbers, written as such. A negative one among those from 0 is a mistake.
    if part.class_names or part.names_only:
        return False
    values = pc.unique(part.rows["label"]).to_pylist()
    signed = any(map(_NEGATIVE.fullmatch, values)) and "0" in values
    return all(_WHOLE.fullmatch(value) or (signed and _NEGATIVE.fullmatch(value)) for value in values)


def _numbers(given: set[int], url: str) -> tuple[str, ...]:
    # The names of classes that are given as numbers.
    if min(given) < 0:
        raise InputError(f"{url} has label {min(given)}: number the classes from 0, and leave unlabelled images out")
    if not given & {0, 1}:  # product codes and the like
        return tuple(sorted(map(str, given)))
    gap = next(number for number in itertools.count() if number not in given)
    if gap <= max(given):
        raise InputError(
            f"{url} has labels up to {max(given)} but none is {gap}: number the classes without gaps, from 0"
        )
    return tuple(str(number) for number in range(len(given)))


def _alike(names: Sequence[str]) -> Iterator[Finding]:
    counts = Counter(" ".join(re.split(r"[\s_-]+", name.casefold())) for name in names)
    for same, count in counts.items():
        if count > 1:
            alike = [name for name in names if " ".join(re.split(r"[\s_-]+", name.casefold())) == same]
            yield Finding("warning", f"classes of nearly one name: {', '.join(alike)}", "make them one if they are")


def _one_key(rows: pa.Table) -> pa.Table:
    # The rows, where an image that is spelt in two ways, absolute and from another folder, has one key.
    keys = rows["key"]
    if not (pc.any(pc.starts_with(keys, "../")).as_py() and pc.any(pc.starts_with(keys, "/")).as_py()):
        return rows
    key_of: dict[str, str] = {}
    pairs = zip(rows["file"].to_pylist(), keys.to_pylist(), strict=True)
    return rows.set_column(0, "key", pa.array([key_of.setdefault(file, key) for file, key in pairs], pa.string()))


def _probe_checked(listing: Listing) -> Listing:
    table = listing.table
    trusted = set(pc.unique(table.filter(pc.equal(table["split"], "probe"))["label"]).to_pylist())
    missing = [name for label, name in enumerate(listing.class_names) if label not in trusted]
    if not missing:
        return listing
    what = f"no trusted image of {len(missing)} of {len(listing.class_names)} classes ({', '.join(missing[:5])})"
    fix = "give at least one of each: in a folder probe/, a column trusted, or a list by --trusted"
    return replace(listing, findings=(*listing.findings, Finding("error", what, fix)))


# ---- the list of trusted images --------------------------------------------------------------------------------------


def _trust(
    url: str, rows: pa.Table, class_names: tuple[str, ...], label_N: np.ndarray, findings: list[Finding]
) -> pa.Table:
    """Return the rows with the images that the list at `url` names in the probe; `label_N` gets the labels it gives."""
    parent = url.rpartition("/")[0]
    entries = list(_trusted_entries(url))
    named = [key.replace("\\", "/") for _, key, _ in entries]
    rows_of = [pc.index_in(pa.array([key for _, key, _ in entries], pa.string()), rows["key"].combine_chunks())]
    keys, files = tables.located(pa.array(named, pa.string()), parent, parent)
    rows_of += [pc.index_in(keys, rows["key"].combine_chunks())]
    plain = pc.if_else(pc.equal(rows["how"], "file"), rows["file"], pa.scalar(None, pa.string())).combine_chunks()
    rows_of += [pc.index_in(files, plain)]
    number_of = {name: number for number, name in enumerate(class_names)}
    split_N = np.array(rows["split"].to_pylist(), object)
    given: dict[int, int] = {}
    blank = 0
    for (where, key, label), row in zip(entries, pc.coalesce(*rows_of).to_pylist(), strict=True):
        if label == "":
            blank += 1
            continue
        if row is None:
            raise InputError(f"{where}: {key} names no image of the data set: fix the list")
        if split_N[row] not in ("train", "probe"):
            raise InputError(f"{where}: {key} is in the evaluation set {split_N[row]}: take it out of the list")
        number = label_N[row] if label is None else number_of.get(label, number_of.get(re.sub("[.]0+$", "", label)))
        if number is None:
            raise InputError(f"{where}: no class is called {label}: fix the list")
        if given.setdefault(row, number) != number:
            raise InputError(f"{where}: {key} has another label further up: choose one")
    for row, number in given.items():
        split_N[row], label_N[row] = "probe", number
    if blank:
        findings.append(Finding("note", f"{blank:,} images of {url} have no label yet", "fill it in to trust them"))
    return rows.set_column(rows.column_names.index("split"), "split", pa.array(split_N, pa.string()))


def _trusted_entries(url: str) -> Iterator[tuple[str, str, str | None]]:
    # (place for messages, name, label or None for the one it has)
    text = text_of(tables.read_bytes(url), url)
    first = next(iter(text.splitlines()), "")
    if tables.has_column(first, "label"):
        yield from tables.read_labels(url)
        return
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        line = line.strip(" \t")
        if line and (number > 1 or line.lower() not in URI):
            yield f"{url}, line {number}", line, None
