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
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import folders, storage, tables, webdataset
from pipeline.archive import IMAGE, Place
from pipeline.dataset import InputError
from pipeline.layout import SCHEMA, Finding, Layout, Listing, identified, looked_around, settle, text_of
from pipeline.tables import Columns, Table
from pipeline.tree import MISSING, Tree, absolute, hidden

SAMPLED = 8  # rows of a table whose images are looked for, to tell how it names them
_PLACE = [SCHEMA.field(name) for name in ("key", "file", "start", "size", "how")]
PART = pa.schema([*_PLACE, ("label", pa.dictionary(pa.int32(), pa.string())), ("split", pa.string())])
_WHOLE = re.compile("(0|[1-9][0-9]*)(?:[.]0+)?")  # as text; 007 and +1 are names


@dataclass(frozen=True)
class Part:
    """Hold the images of one file, or of a tree of folders, by PART; label and split are null where not asked for."""

    where: str
    rows: pa.Table
    class_names: tuple[str, ...] = ()  # in the order of their numbers, where the file gives them
    names_only: bool = False  # whether labels are names even where they look like numbers


@dataclass(frozen=True)
class Gathered:
    """Hold all that is at a place."""

    parts: tuple[Part, ...]
    findings: tuple[Finding, ...] = ()
    home: str = ""  # URL of the folder where files would be that no table names; "" where all were seen
    unlisted: int = -1


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
        findings = [*found.findings, *_alike(class_names)]
        if self.trusted:
            rows = _trust(absolute(self.trusted), rows, class_names, label_N, findings)
        table = identified(_one_key(rows), self.name, label_N, rows["split"])
        listing = Listing(table, class_names, tuple(findings), unlisted=found.unlisted)
        if look_around and found.home:
            listing = _with_neighbours(listing, found.home)
        return _probe_checked(settle(listing))

    @property
    def columns(self) -> Columns:
        """Return the names of columns that were given."""
        return Columns(self.image_column, self.label_column, self.split_column, self.trusted_column, self.id_column)


def images_at(url: str) -> pa.Table:
    """Return key, file, start, size and how of all images at `url`, whatever is said of their labels, as Custom names
    them.

    Raises InputError for what cannot be read.
    """
    found = gather(absolute(url), Columns(), labelled=False)
    return pa.concat_tables([part.rows.select([one.name for one in _PLACE]) for part in found.parts])


def gather(url: str, columns: Columns, *, labelled: bool = True, used: Collection[str] = ()) -> Gathered:
    """Return the images at `url`, with what was found on the way; files at the URLs `used` are read elsewhere.

    Raises InputError as Custom.listing does.
    """
    fs, path = storage.connect(url)
    if path.lower().endswith((".csv", ".tsv")):
        home = url.rpartition("/")[0]
        return _of_tables([tables.read_csv(url, columns, labelled=labelled)], home, ["train"])
    if path.lower().endswith(".parquet"):
        home = url.rpartition("/")[0]
        return _of_tables([tables.read_parquet(url, columns, labelled=labelled)], home, ["train"])
    read_label = webdataset.label_reader(columns.label)
    if re.search(r"\{.*\}", url) and not storage.exists(fs, path):
        trees = [Tree.open(one, whole=True, read_label=read_label) for one in _braces(url)]
    else:
        trees = [Tree.open(url, whole=True, read_label=read_label)]
    names = [name for name in trees[0].names if name.lower().endswith(".parquet") and not _passed_over(name)]
    if names:
        return _of_parquet_tree(trees[0], names, columns, used, labelled=labelled)
    if labelled and any(vars(replace(columns, label="")).values()):
        raise InputError(f"{url} has no table, so it has no columns: leave the flags of columns out")
    return _of_trees(url, trees, columns, used, labelled=labelled)


# ---- folders, archives and WebDataset --------------------------------------------------------------------------------


def _of_trees(url: str, trees: Sequence[Tree], columns: Columns, used: Collection[str], *, labelled: bool) -> Gathered:
    images: dict[str, Place] = {}
    findings = []
    for tree in trees:
        found, more = folders.images_of(tree, used)
        images |= found
        findings += more
    if not images:
        raise InputError(
            f"no images in {url}: give a folder with a folder of images a class, a .csv or .parquet"
            f"{''.join(f' ({finding.what})' for finding in findings[:1])}"
        )
    if not labelled:
        return Gathered((_part(url, list(images), list(images.values())),), tuple(findings))
    archives = [archive for tree in trees for archive in tree.archives]
    if webdataset.is_webdataset(archives, columns.label):
        labelled_ones = webdataset.samples(archives, columns.label)
        strays = sorted(images.keys() - set(labelled_ones.names))
        if strays:
            what = f"{len(strays):,} images are in no tar with labels ({strays[0]})"
            findings.append(Finding("warning", what, "left out; add them if they are wanted", len(strays)))
    elif columns.label:
        raise InputError(f"{url} has no table and no .json beside its images: leave --label-column out")
    else:
        if cls := next((name for tree in trees for name in tree.names if name.lower().endswith(".cls")), None):
            raise InputError(f"{url} has labels in .cls files ({cls}): pack them with their images into tars")
        tree = trees[0]
        others = [name for name in tree.names if not IMAGE.fullmatch(name) and not hidden(name)]
        labelled_ones = folders.classes_of(url, images, tree.folders, others)
    findings += labelled_ones.findings
    part = _part(url, labelled_ones.names, labelled_ones.places, labelled_ones.labels, labelled_ones.splits)
    part = replace(part, names_only=not webdataset.is_webdataset(archives, columns.label))
    return Gathered((part,), tuple(findings), unlisted=0)


def _part(
    where: str,
    keys: list[str],
    places: list[Place],
    labels: Sequence[str | None] = (),
    splits: Sequence[str | None] = (),
) -> Part:
    columns = [pa.array([place[column] for place in places], _PLACE[column + 1].type) for column in range(4)]
    label = pa.array(labels or [None] * len(keys), pa.string()).dictionary_encode()
    split = pa.array(splits or [None] * len(keys), pa.string())
    return Part(where, pa.table([pa.array(keys, pa.string()), *columns, label, split], schema=PART))


def _braces(url: str) -> list[str]:
    # The URLs that {000..012} and {a,b} in one stand for.
    match = re.search(r"\{([^{}]*)\}", url)
    if match is None:
        return [url]
    if numbers := re.fullmatch("([0-9]+)[.][.]([0-9]+)", match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        parts = [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]
    else:
        parts = match[1].split(",")
    return [one for part in parts for one in _braces(url[: match.start()] + part + url[match.end() :])]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _of_parquet_tree(
    tree: Tree, names: Sequence[str], columns: Columns, used: Collection[str], *, labelled: bool
) -> Gathered:
    given = [dict(part.split("=", 1) for part in name.split("/")[:-1] if "=" in part) for name in names]
    given = [{key: unquote(value) for key, value in one.items()} for one in given]
    some = [
        tables.read_parquet(f"{tree.url}/{name}", columns, one, labelled=labelled)
        for name, one in zip(names, given, strict=True)
    ]
    if labelled:
        # What a column says need not be told from names.
        silent = [name for name, table in zip(names, some, strict=True) if table.split is None]
        said = dict(zip(silent, webdataset.of_files([name.rpartition(".")[0] for name in silent]), strict=True))
        defaults = [said.get(name, "train") for name in names]
    else:
        defaults = ["train"] * len(names)
    found = _of_tables(some, tree.url, defaults)
    if all(table.path is None for table in some):
        others = [name for name in tree.names if name not in set(names) and f"{tree.url}/{name}" not in used]
        images = [name for name in others if IMAGE.fullmatch(name) and not hidden(name)]
        what = f"{len(images):,} images are in no table (such as {images[0]})" if images else ""
        more = [Finding("warning", what, "left out: the labels are those of the Parquet files", len(images))] * bool(
            images
        )
        more += folders.unread([name for name in others if name not in set(images)])
        return replace(found, findings=(*found.findings, *more), home="", unlisted=0)
    return found


def _of_tables(some: Sequence[Table], home: str, defaults: Sequence[str]) -> Gathered:
    apart = _shared_ids(some) or len({table.url.rpartition("/")[2] for table in some}) < len(some)
    parts = [_of_table(table, home, default, apart=apart) for table, default in zip(some, defaults, strict=True)]
    parts, findings = _as_named(parts, home)
    named = any(table.path is not None for table in some)
    findings = [*(finding for table in some for finding in table.findings), *findings]
    return Gathered(tuple(parts), tuple(findings), home if named else "", -1 if named else 0)


def _shared_ids(some: Sequence[Table]) -> bool:
    # Whether an id of one file is in another one too: then ids are told apart by their file.
    ids = [table.id for table in some if table.id is not None and table.path is None]
    if len(ids) < 2:
        return False
    return len(pc.unique(pa.chunked_array(ids))) < sum(len(pc.unique(one)) for one in ids)


def _of_table(table: Table, home: str, default: str, *, apart: bool) -> Part:
    # With images told apart by the path of their file, where its name or their ids do not.
    count = table.count
    parent, _, file = table.url.rpartition("/")
    if table.path is None:
        numbers = pa.array(np.arange(count))
        keys = table.id
        within = table.url[len(home) + 1 :] if apart else file
        if keys is None or (table.label is None and len(pc.unique(keys)) < count):
            keys = pc.binary_join_element_wise(f"{within}:", numbers.cast(pa.string()), "")
        elif len(pc.unique(keys)) < count:
            raise InputError(
                f"{table.url} has ids twice ({_twice(keys)}): give each image its own, or choose --id-column"
            )
        elif apart:
            keys = pc.binary_join_element_wise(f"{within}:", keys, "")
        files, column, how = pa.repeat(table.url, count), table.column, "row"
    else:
        keys, files = tables.located(table.path, parent, home)
        keys = table.id if table.id is not None else keys
        numbers, column, how = pa.repeat(pa.scalar(0, pa.int64()), count), -1, "file"
    split = pa.repeat(default, count) if table.split is None else pc.fill_null(table.split, default)
    if table.trusted is not None:
        split = pc.if_else(pc.and_(table.trusted, pc.equal(split, "train")), "probe", split)
    label = pa.nulls(count, PART.field("label").type) if table.label is None else table.label
    size, hows = pa.repeat(pa.scalar(column, pa.int64()), count), pa.repeat(how, count)
    rows = pa.table([keys, files, numbers, size, hows, label, split], schema=PART)
    return Part(table.url, rows, table.class_names)


def _twice(keys: pa.Array) -> str:
    counts = pc.value_counts(keys)
    return str(counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0])


def _as_named(parts: Sequence[Part], home: str) -> tuple[list[Part], list[Finding]]:
    """Return the parts with images where they are, if tables name them as Windows does, or as members of archives.

    Of each table some images are looked for; those that are there need nothing else.
    """
    done, findings = [], []
    for part in parts:
        rows = part.rows
        some = rows.take(pa.array(np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(int)))) if len(rows) else rows
        here = [row["file"] for row in some.to_pylist() if row["how"] == "file" and _is_here(row["file"], home)]
        missing = [file for file in here if not storage.exists(*storage.connect(file))]
        if missing and (drive := next((one for one in missing if re.search(r"(^|/)[A-Za-z]:\\", one)), None)):
            raise InputError(
                f"{part.where} names {drive.rpartition('/')[2]}, a path of another machine: "
                "write paths relative to the table"
            )
        if any("\\" in name for name in missing) and storage.exists(
            *storage.connect(next(name for name in missing if "\\" in name).replace("\\", "/"))
        ):
            columns = [pc.replace_substring(rows[name], "\\", "/") for name in ("key", "file")]
            rows = rows.set_column(0, PART.field("key"), columns[0]).set_column(1, PART.field("file"), columns[1])
            findings.append(
                Finding("note", f"{part.where} separates folders by backslashes", "they are read as slashes")
            )
        elif missing:
            rows = _from_archives(rows, home)
        done.append(replace(part, rows=rows))
    return done, findings


def _is_here(file: str, home: str) -> bool:
    # Whether a file is where the table is, or on this machine.
    return "://" not in file or file.startswith(f"{home}/")


def _from_archives(rows: pa.Table, home: str) -> pa.Table:
    # Images that lie in archives beside the table are taken from there.
    tree = Tree.open(home)
    if not tree.archives or pc.any(pc.not_equal(rows["how"], "file")).as_py():
        return rows
    places = tree.places(rows["key"].to_pylist())
    kept = rows["file"].to_pylist()
    places = [
        (file, 0, -1, "file") if place is MISSING or place[3] == "file" else place
        for place, file in zip(places, kept, strict=True)
    ]
    columns = [pa.array([place[column] for place in places], _PLACE[column + 1].type) for column in range(4)]
    return pa.table([rows["key"], *columns, rows["label"], rows["split"]], schema=PART)


def _passed_over(name: str) -> bool:
    # As Spark does: _SUCCESS, _metadata and what is being written.
    return hidden(name) or any(part.startswith("_") for part in name.split("/"))


def _with_neighbours(listing: Listing, home: str) -> Listing:
    # The listing with files that are missing, and with findings on those that no row names.
    tree = Tree.open(home)
    looked = looked_around(listing, tree)
    others = [name for name in tree.walk() if not IMAGE.fullmatch(name) or hidden(name)]
    named = set(pc.unique(listing.table["file"]).to_pylist())
    archives = {archive.url for archive in tree.archives}
    others = [name for name in others if f"{home}/{name}" not in named | archives and not folders.LIST.fullmatch(name)]
    return replace(looked, findings=(*looked.findings, *folders.unread(others)))


# ---- classes and columns ---------------------------------------------------------------------------------------------


def _classes(parts: Sequence[Part], labels: pa.ChunkedArray, url: str) -> tuple[tuple[str, ...], np.ndarray]:
    # Class names, and the label (int32) of each image.
    given = {part.class_names for part in parts}
    if len(given) > 1:
        one, other = (next(part.where for part in parts if part.class_names == names) for names in sorted(given)[:2])
        raise InputError(f"{one} and {other} give their classes other names: make them agree")
    kinds = {_numbered(part): part.where for part in parts if len(part.rows)}
    if len(kinds) > 1:
        raise InputError(f"{kinds[True]} has numbers as labels and {kinds[False]} names: use one of the two everywhere")
    encoded = labels.combine_chunks()
    dictionary = encoded.dictionary.to_pylist()
    if names := given.pop():
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [number_of[value] for value in dictionary]
    elif True in kinds:
        whole = [value.partition(".")[0] for value in dictionary]  # 3.0 is 3
        names = _numbers(set(map(int, whole)), url)
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [number_of[value] for value in whole]
    else:
        names = tuple(sorted(dictionary))
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [number_of[value] for value in dictionary]
    if len(names) < 2:
        raise InputError(f"{url} has one class ({names[0]}): classification needs 2 or more")
    return names, np.array(numbers, np.int32)[encoded.indices.to_numpy()]


def _numbered(part: Part) -> bool:
    # Whether all labels of a part are whole numbers, written as such.
    if part.class_names or part.names_only:
        return False
    values = pc.unique(part.rows["label"]).to_pylist()
    negative = any(re.fullmatch("-[1-9][0-9]*", value) for value in values) and "0" in values
    return all(_WHOLE.fullmatch(value) or (negative and re.fullmatch("-[1-9][0-9]*", value)) for value in values)


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
    named = [key.replace("\\", "/") if "\\" in key else key for _, key, _ in entries]
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
        if line and (number > 1 or line.strip().lower() not in tables.URI):
            yield f"{url}, line {number}", line, None
