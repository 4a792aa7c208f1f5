"""Anyone's own images: a folder a class, a table of paths and labels, or Parquet that holds the images themselves.

Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.archive import Place
from pipeline.dataset import InputError
from pipeline.layout import Finding, Layout, Listing, findings_of, looked_around, rows, settle, text_of
from pipeline.raw import image_columns
from pipeline.tree import Tree, absolute

# Names of splits; any other name is that of an evaluation set.
_SPLITS = {"": "train", "training": "train", "trusted": "probe", "valid": "val", "validation": "val"}
_FOLDERS = ("train", "val", "valid", "validation", "test", "probe", "trusted")
_URI, _OPTIONAL = ("uri", "path", "image_path"), ("split", "trusted")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "")

Label = str | int


@dataclass
class _Rows:
    # N images as they are listed, by column.
    keys: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    folders: bool = False  # whether labels are names of folders, which are names even where they look like numbers
    home: str = ""  # URL of the folder where unlisted files would be
    unlisted: int = -1


@dataclass(frozen=True)
class Custom(Layout):
    """Images in folders, one a class: at the top, or in train/ with val/, test/ and probe/ beside it; archived or not.

    Or a .csv or .parquet table with columns uri, label and, as you like, split and trusted; or Parquet with a column of
    encoded images in place of the uri.
    """

    name: ClassVar[str] = "custom"

    trusted: str = ""
    """URL of a list of trusted images: CSV with columns uri and label, such as suggest.csv of an audit once labels are
    filled in (lines without one are passed over), or a name a line, which keeps its label."""

    def listing(self, url: str, *, look_around: bool = False) -> Listing:
        """Return the images at `url`, settled; with `look_around`, unlisted files are counted too.

        Classes are the sorted names, or whole numbers 0…K−1 as they are given.
        Raises InputError for what cannot be read or contradicts itself.
        """
        fs, path = storage.connect(url)
        url = absolute(url)
        if path.lower().endswith(".csv"):
            found = _manifest(url, *_csv_columns(url), "train")
        elif parquet := _parquet_urls(fs, path, url):
            found = _parquet(parquet)
        else:
            found = _folders(Tree.open(url))
        if "train" not in found.splits:
            raise InputError(f"no training images in {url}: check the path, and the names of splits and folders")
        class_names, label_N = _classes(found.labels, found.folders, url)
        if self.trusted:
            _trust(absolute(self.trusted), found, class_names, label_N)

        split_N = np.array(found.splits)
        tables = []
        for split in dict.fromkeys(found.splits):
            chosen = np.flatnonzero(split_N == split)
            keys, places = [found.keys[row] for row in chosen], [found.places[row] for row in chosen]
            tables.append(rows(self.name, split, keys, label_N[chosen], places))
        listing = Listing(pa.concat_tables(tables), class_names, tuple(found.findings), unlisted=found.unlisted)
        if look_around and found.home:
            listing = looked_around(listing, Tree.open(found.home))
        return _probe_checked(settle(listing))


def images_at(url: str) -> tuple[list[str], list[Place]]:
    """Return the keys and places of all images at `url`, whatever is said of their labels, as Custom names them.

    Raises InputError for what cannot be read.
    """
    fs, path = storage.connect(url)
    url = absolute(url)
    if path.lower().endswith(".csv"):
        columns, where = _csv_columns(url)
        return _uris(url, columns, _uri_column(url, columns), where)
    if not (parquet := _parquet_urls(fs, path, url)):
        tree = Tree.open(url)
        names = sorted(tree.images())
        return names, tree.places(names)
    keys, places = [], []
    for one in parquet:
        columns, images, rows = _parquet_columns(one)
        if images:
            part = _parquet_images(one, columns, rows)
        else:
            part = _uris(one, columns, _uri_column(one, columns), _row_of(one))
        keys += part[0]
        places += part[1]
    return keys, places


def _probe_checked(listing: Listing) -> Listing:
    table = listing.table
    trusted = set(np.asarray(table["label"])[np.asarray(table["split"]) == "probe"].tolist())
    missing = [name for label, name in enumerate(listing.class_names) if label not in trusted]
    if not missing:
        return listing
    what = f"no trusted image of {len(missing)} of {len(listing.class_names)} classes ({', '.join(missing[:5])})"
    fix = "give at least one of each: in a folder probe/, a column trusted, or a list by --trusted"
    return replace(listing, findings=(*listing.findings, Finding("error", what, fix)))


def _classes(labels: Sequence[Label], names_only: bool, url: str) -> tuple[tuple[str, ...], np.ndarray]:
    # Class names, and the label (int32) of each image.
    if not names_only and all(isinstance(label, int) or re.fullmatch("-?[0-9]+", label) for label in set(labels)):
        number_N = [int(label) for label in labels]
        given = set(number_N)
        if min(given) < 0:
            raise InputError(
                f"{url} has label {min(given)}: number the classes from 0, and leave unlabelled images out"
            )
        gap = next(number for number in itertools.count() if number not in given)
        if gap <= max(given):
            raise InputError(f"{url} has labels up to {max(given)} but none is {gap}: number the classes without gaps")
        names = tuple(str(number) for number in range(len(given)))
    else:
        names = tuple(sorted({str(label) for label in labels}))
        number_of = {name: number for number, name in enumerate(names)}
        number_N = [number_of[str(label)] for label in labels]
    if len(names) < 2:
        raise InputError(f"{url} has one class ({names[0]}): classification needs 2 or more")
    return names, np.array(number_N, np.int32)


def _split(name: str) -> str:
    name = name.strip().lower()
    return _SPLITS.get(name, name)


# ---- a folder a class ------------------------------------------------------------------------------------------------


def _folders(tree: Tree) -> _Rows:
    names = sorted(tree.images())
    if not names:
        raise InputError(f"no images in {tree.url}: give a folder with a folder of images a class, a .csv or .parquet")
    found = _Rows(findings=list(findings_of(tree)), folders=True)
    parts = [name.split("/") for name in names]
    top = 0  # folders around all, which archives bring along
    while all(len(part) > top + 2 for part in parts) and len({part[top] for part in parts}) == 1:
        if parts[0][top] in _FOLDERS:
            break
        top += 1
    in_splits = any(part[top] == "train" and len(part) > top + 2 for part in parts)
    kept = []
    for name, part in zip(names, parts, strict=True):
        where = part[top:]
        split = where.pop(0) if in_splits else "train"
        if split in _FOLDERS and len(where) > 1:
            kept.append(name)
            found.labels.append(where[0])
            found.splits.append(_split(split))
    found.keys, found.places = kept, tree.places(kept)
    found.unlisted = len(names) - len(kept)
    if found.unlisted:
        example = min(set(names) - set(kept))
        what = f"{found.unlisted:,} images are in no folder of a class ({example})"
        found.findings.append(Finding("warning", what, "left out; move them if they are wanted"))
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def _csv_columns(url: str) -> tuple[dict[str, list[Any]], Callable[[int], str]]:
    # Columns by name, and the place of a row for messages.
    text = text_of(_read(url), url)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[int] = []
    values: list[list[str]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for line in reader:
            if not line:
                continue
            if len(line) != len(header):
                raise InputError(
                    f"{url}, line {reader.line_num}: {len(line)} values for {len(header)} columns: "
                    'quote values that hold commas ("a, b.jpg")'
                )
            lines.append(reader.line_num)
            values.append(line)
    except csv.Error as error:
        raise InputError(f"{url}, line {reader.line_num} is not CSV ({error}): fix the line") from None
    columns = zip(*values, strict=True) if values else ([] for _ in header)
    return dict(zip(header, map(list, columns), strict=True)), lambda row: f"{url}, line {lines[row]}"


def _manifest(url: str, columns: dict[str, list[Any]], where: Callable[[int], str], default: str) -> _Rows:
    # The images that a table of URIs and labels names.
    named = _required(url, columns, _URI)
    found = _Rows(home=url.rpartition("/")[0])
    found.keys, found.places = _uris(url, columns, named, where)
    _fill(found, columns, where, default)
    ignored = sorted(columns.keys() - {named, "label", *_OPTIONAL})
    if ignored:
        found.findings.append(Finding("note", f"columns of {url} that are not read: {', '.join(ignored)}"))
    return found


def _uris(
    url: str, columns: dict[str, list[Any]], named: str, where: Callable[[int], str]
) -> tuple[list[str], list[Place]]:
    # Keys and places of the images that the column `named` of a table names.
    keys = [str(uri or "") for uri in columns[named]]
    for row, key in enumerate(keys):
        if not key:
            raise InputError(f"{where(row)}: no {named}: fill it in, or remove the row")
    return keys, [(_absolute(url.rpartition("/")[0], key), 0, -1, "file") for key in keys]


def _uri_column(url: str, columns: dict[str, list[Any]]) -> str:
    for name in _URI:
        if name in columns:
            return name
    raise InputError(
        f"{url} has columns {', '.join(columns) or '(none)'}: it needs {' or '.join(_URI)}, or one of encoded images"
    )


def _required(url: str, columns: Sequence[str] | dict[str, list[Any]], names: tuple[str, ...]) -> str:
    # The first of `names` that is a column; label must be one, too.
    named = next((name for name in names if name in columns), None)
    if named is None or "label" not in columns:
        raise InputError(
            f"{url} has columns {', '.join(columns) or '(none)'}: it needs {' or '.join(names)} and label, "
            f"and may have {' and '.join(_OPTIONAL)}"
        )
    return named


def _absolute(parent: str, uri: str) -> str:
    return uri if "://" in uri or uri.startswith("/") else storage.join(parent, uri)


def _label(label: Any, where: Callable[[int], str], row: int) -> str | int:
    if isinstance(label, float) and label.is_integer():  # whole numbers that once had a gap among them
        label = int(label)
    name = label.strip() if isinstance(label, str) else label
    if name == "" or not isinstance(name, (str, int)) or isinstance(name, bool):
        raise InputError(f"{where(row)}: label {label!r} is no name or whole number: fill it in, or remove the row")
    return name


def _fill(found: _Rows, columns: dict[str, list[Any]], where: Callable[[int], str], default: str) -> None:
    # Labels and splits of a table's rows.
    found.labels.extend(_label(label, where, row) for row, label in enumerate(columns["label"]))
    count = len(found.labels)
    found.splits = [default if split is None else _split(str(split)) for split in columns.get("split", [None] * count)]
    for row, trusted in enumerate(columns.get("trusted", [])):
        word = "" if trusted is None else str(trusted).strip().lower()
        if word not in _TRUE + _FALSE:
            raise InputError(f"{where(row)}: trusted is {trusted!r}: write true or false")
        if word in _TRUE and found.splits[row] == "train":
            found.splits[row] = "probe"


def _parquet_urls(fs: Any, path: str, url: str) -> list[str]:
    # The Parquet file at `url`, or those in that folder or in data/ (Hugging Face's layout).
    if path.lower().endswith(".parquet"):
        return [url]
    for folder in ("", "/data") if fs.isdir(path) else ():
        try:
            entries = storage.attempt(fs, path, partial(fs.ls, path + folder, detail=False))
        except FileNotFoundError:
            continue
        if names := sorted(entry.rpartition("/")[2] for entry in entries if entry.lower().endswith(".parquet")):
            return [f"{url}{folder}/{name}" for name in names]
    return []


def _parquet(urls: list[str]) -> _Rows:
    # The images in Parquet files, or that they name; files are named after their split where they have no such column.
    whole = _Rows()
    for url in urls:
        file_name = url.rpartition("/")[2]
        named = re.match(r"(training|train|validation|valid|val|test|probe|trusted)(?![a-z])", file_name.lower())
        part = _parquet_file(url, _split(named[1]) if named else "train")
        for ours, theirs in ((whole.keys, part.keys), (whole.labels, part.labels), (whole.splits, part.splits)):
            ours += theirs
        whole.places += part.places
        whole.findings += part.findings
        whole.home, whole.unlisted = part.home, part.unlisted
    return whole


def _parquet_file(url: str, default: str) -> _Rows:
    columns, images, rows = _parquet_columns(url)
    where = _row_of(url)
    if not images:
        return _manifest(url, columns, where, default)
    _required(url, (*columns, images), (images,))
    found = _Rows(unlisted=0)
    found.keys, found.places = _parquet_images(url, columns, rows)
    _fill(found, columns, where, default)
    return found


def _row_of(url: str) -> Callable[[int], str]:
    return lambda row: f"{url}, row {row}"


def _parquet_columns(url: str) -> tuple[dict[str, list[Any]], str, int]:
    # The columns that are read, the name of the one that holds encoded images ("" where none does), and the rows.
    fs, path = storage.connect(url)
    try:
        with storage.attempt(fs, path, lambda: fs.open(path, "rb")) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            images = image_columns(schema)
            wanted = {"id", "label", *_OPTIONAL} | (set() if images else {column.name for column in schema})
            table = parquet.read([name for name in schema.names if name in wanted])
    except FileNotFoundError:
        raise InputError(f"no such file: {url}: check the path") from None
    except pa.ArrowException as error:
        raise InputError(f"{url} is no readable Parquet file ({type(error).__name__}): copy it again") from None
    if len(images) > 1:
        raise InputError(f"{url} has {len(images)} columns of encoded images ({', '.join(images)}): keep one")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return columns, "".join(images), table.num_rows


def _parquet_images(url: str, columns: dict[str, list[Any]], rows: int) -> tuple[list[str], list[Place]]:
    # Keys and places of the images that a Parquet file holds.
    ids = columns.get("id", [f"{url.rpartition('/')[2]}:{row}" for row in range(rows)])
    if None in ids:
        raise InputError(f"{_row_of(url)(ids.index(None))}: no id: fill it in, or leave the column out")
    return [str(one) for one in ids], [(url, row, -1, "row") for row in range(rows)]


# ---- the list of trusted images --------------------------------------------------------------------------------------


def _trust(url: str, found: _Rows, class_names: tuple[str, ...], label_N: np.ndarray) -> None:
    # Move the images that the list at `url` names to the probe, with the labels it gives (in place).
    entries = _trusted_entries(url)
    row_of = {place[0]: row for row, place in enumerate(found.places) if place[3] == "file"}
    row_of |= {key: row for row, key in enumerate(found.keys)}
    number_of = {name: number for number, name in enumerate(class_names)}
    given: dict[int, int] = {}
    blank = 0
    for where, key, label in entries:
        if label == "":
            blank += 1
            continue
        row = row_of.get(key, row_of.get(_absolute(url.rpartition("/")[0], key)))
        if row is None:
            raise InputError(f"{where}: {key} names no image of the data set: fix the list")
        if found.splits[row] not in ("train", "probe"):
            raise InputError(f"{where}: {key} is in the evaluation set {found.splits[row]}: take it out of the list")
        number = label_N[row] if label is None else number_of.get(label)
        if number is None:
            raise InputError(f"{where}: no class is called {label}: fix the list")
        if given.setdefault(row, number) != number:
            raise InputError(f"{where}: {key} has another label further up: choose one")
    for row, number in given.items():
        found.splits[row], label_N[row] = "probe", number
    if blank:
        found.findings.append(
            Finding("note", f"{blank:,} images of {url} have no label yet", "fill it in to trust them")
        )


def _trusted_entries(url: str) -> Iterator[tuple[str, str, str | None]]:
    # (place for messages, name, label or None for the one it has)
    text = text_of(_read(url), url)
    first = text.partition("\n")[0].rstrip("\r")
    if {"label"} < {name.strip().strip('"') for name in first.split(",")}:
        columns, where = _csv_columns(url)
        named = _required(url, columns, _URI)
        for row, (key, label) in enumerate(zip(columns[named], columns["label"], strict=True)):
            yield where(row), key, label.strip()
        return
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line and (number > 1 or line not in _URI):
            yield f"{url}, line {number}", line, None


def _read(url: str) -> bytes:
    try:
        return storage.read(*storage.connect(url))
    except FileNotFoundError:
        raise InputError(f"no such file: {url}: check the path") from None
