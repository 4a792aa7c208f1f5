"""All images that are at a place of anyone's own: in folders and archives, tables, Parquet or WebDataset's tars.

Shapes: N images.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import folders, splits, storage, tables, webdataset
from pipeline.archive import IMAGE, Archive, Place
from pipeline.columns import Columns
from pipeline.dataset import InputError
from pipeline.folders import Found
from pipeline.layout import PLACE, SCHEMA, Finding, placed
from pipeline.tables import Table
from pipeline.tree import MISSING, Tree, hidden

SAMPLED = 8  # rows of a table whose images are looked for, to tell how it names them
PLACED = [SCHEMA.field(name) for name in PLACE]
PART = pa.schema([*PLACED, ("label", pa.dictionary(pa.int32(), pa.string())), ("split", pa.string())])


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


def gather(url: str, columns: Columns, *, labelled: bool = True, used: Collection[str] = ()) -> Gathered:
    """Return the images at `url`, with what was found on the way; files at the URLs `used` are read elsewhere.

    Raises InputError as Custom.listing does.
    """
    fs, path = storage.connect(url)
    if path.lower().endswith((".csv", ".tsv", ".parquet")):
        home, _, file = url.rpartition("/")
        read = tables.read_parquet if path.lower().endswith(".parquet") else tables.read_csv
        table = read(url, columns, labelled=labelled)
        return _of_tables([table], home, _defaults([file], [table]))
    read_label = webdataset.label_reader(columns.label)
    if re.search(r"\{.*\}", url) and not storage.exists(fs, path):
        trees = [Tree.open(one, whole=True, read_label=read_label) for one in _braces(url)]
    else:
        trees = [Tree.open(url, whole=True, read_label=read_label)]
    _require_plain(url, trees[0])
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
    in_tars = webdataset.is_webdataset(archives, columns.label)
    said = _in_tars(archives, images, columns.label) if in_tars else _in_folders(url, trees[0], images, columns.label)
    part = _part(url, said.names, said.places, said.labels, said.splits)
    return Gathered((replace(part, names_only=not in_tars),), (*findings, *said.findings), unlisted=0)


def _in_tars(archives: Sequence[Archive], images: dict[str, Place], field: str) -> Found:
    found = webdataset.samples(archives, field)
    if strays := sorted(images.keys() - set(found.names)):
        what = f"{len(strays):,} images are in no tar with labels ({strays[0]})"
        found.findings.append(Finding("warning", what, "left out; add them if they are wanted", len(strays)))
    return found


def _in_folders(url: str, tree: Tree, images: dict[str, Place], field: str) -> Found:
    if field:
        raise InputError(f"{url} has no table and no .json beside its images: leave --label-column out")
    members = (name for archive in tree.archives for name in archive.others)
    if cls := next((name for name in (*tree.names, *members) if name.lower().endswith(".cls")), None):
        raise InputError(f"{url} has labels in .cls files ({cls}): pack them with their images into plain tars")
    others = [name for name in tree.names if not IMAGE.fullmatch(name) and not hidden(name)]
    found = folders.classes_of(url, images, tree.folders, others)
    lists = [name for name in others if folders.LIST.fullmatch(name)]
    if lists and len(set(found.labels)) < 2:
        raise InputError(
            f"{url} has no folders of classes, but {lists[0]}: give that table itself if it has the labels"
        )
    return found


def _part(
    where: str,
    keys: list[str],
    places: list[Place],
    labels: Sequence[str | None] = (),
    splits: Sequence[str | None] = (),
) -> Part:
    label = pa.array(labels or [None] * len(keys), pa.string()).dictionary_encode()
    split = pa.array(splits or [None] * len(keys), pa.string())
    return Part(where, pa.table([*placed(keys, places).columns, label, split], schema=PART))


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
    some = [tables.read_parquet(f"{tree.url}/{name}", columns, _partition(name), labelled=labelled) for name in names]
    found = _of_tables(some, tree.url, _defaults(names, some))
    if any(table.path is not None for table in some):
        return found  # files that no row names are looked for by whoever wants to know
    known = {f"{tree.url}/{name}" for name in names} | set(used)
    others = [name for name in tree.names if f"{tree.url}/{name}" not in known]
    return replace(found, findings=(*found.findings, *_left_out(others)))


def _left_out(names: Sequence[str]) -> list[Finding]:
    # Findings on what lies beside Parquet files that hold all images themselves.
    images = {name for name in names if IMAGE.fullmatch(name) and not hidden(name)}
    findings = folders.unread(set(names) - images, (), "those of the Parquet files")
    if images:
        what = f"{len(images):,} images are in no table (such as {min(images)})"
        findings.append(Finding("warning", what, "left out: the images are those of the Parquet files", len(images)))
    return findings


def _defaults(names: Sequence[str], some: Sequence[Table]) -> list[str]:
    # The split of each table's rows where no column says one: told from names, if labels are wanted.
    silent = [name for name, table in zip(names, some, strict=True) if table.label is not None and table.split is None]
    said = dict(zip(silent, splits.of_files([name.rpartition(".")[0] for name in silent]), strict=True))
    return [said.get(name, "train") for name in names]


def _partition(name: str) -> dict[str, str]:
    # The columns that folders give: split=train/label=cat/.
    parts = [part.partition("=") for part in name.split("/")[:-1]]
    return {key: unquote(value) for key, equals, value in parts if equals}


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
    if table.path is None:
        row_N = pa.array(np.arange(count))
        keys = _keys(table, row_N, table.url[len(home) + 1 :] if apart else table.url.rpartition("/")[2], apart=apart)
        files, column, how = pa.repeat(table.url, count), table.column, "row"
    else:
        keys, files = tables.located(table.path, table.url.rpartition("/")[0], home)
        keys = table.id if table.id is not None else keys
        row_N, column, how = pa.repeat(pa.scalar(0, pa.int64()), count), -1, "file"
    split = pa.repeat(default, count) if table.split is None else pc.fill_null(table.split, default)
    if table.trusted is not None:
        split = pc.if_else(pc.and_(table.trusted, pc.equal(split, "train")), "probe", split)
    label = pa.nulls(count, PART.field("label").type) if table.label is None else table.label
    size, hows = pa.repeat(pa.scalar(column, pa.int64()), count), pa.repeat(how, count)
    return Part(table.url, pa.table([keys, files, row_N, size, hows, label, split], schema=PART), table.class_names)


def _keys(table: Table, row_N: pa.Array, file: str, *, apart: bool) -> pa.Array:
    # Of images that a Parquet file holds: their ids, where they have some, else numbers of rows.
    distinct = table.id is not None and len(pc.unique(table.id)) == table.count
    if table.id is not None and not distinct and table.label is not None:
        raise InputError(
            f"{table.url} has ids twice ({_twice(table.id)}): give each image its own, or choose --id-column"
        )
    if distinct and not apart:
        return table.id
    return pc.binary_join_element_wise(f"{file}:", table.id if distinct else row_N.cast(pa.string()), "")


def _twice(keys: pa.Array) -> str:
    counts = pc.value_counts(keys)
    return str(counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0])


def _as_named(parts: Sequence[Part], home: str) -> tuple[list[Part], list[Finding]]:
    """Return the parts with images where they are, if tables name them as Windows does, or as members of archives.

    Of each table some images are looked for; those that are there need nothing else.
    """
    done, findings = [], []
    for part in parts:
        rows, missing = part.rows, _some_missing(part.rows, home)
        if drive := next((file for file in missing if re.search(r"(^|/)[A-Za-z]:\\", file)), None):
            raise InputError(
                f"{part.where} names {drive.rpartition('/')[2]}, a path of another machine: "
                "write paths relative to the table"
            )
        turned = [file.replace("\\", "/") for file in missing if "\\" in file]
        if turned and storage.exists(*storage.connect(turned[0])):
            key, file = (pc.replace_substring(rows[name], "\\", "/") for name in ("key", "file"))
            rows = rows.set_column(0, PART.field("key"), key).set_column(1, PART.field("file"), file)
            what = f"{part.where} separates folders by backslashes"
            findings.append(Finding("note", what, "they are read as slashes"))
        elif missing:
            rows = _from_archives(rows, home)
        done.append(replace(part, rows=rows))
    return done, findings


def _some_missing(rows: pa.Table, home: str) -> list[str]:
    # The files that are not there, of some rows.
    chosen = np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(int)) if len(rows) else np.empty(0, int)
    some = rows.take(pa.array(chosen)).to_pylist()
    files = [row["file"] for row in some if row["how"] == "file" and _is_here(row["file"], home)]
    return [file for file in files if not storage.exists(*storage.connect(file))]


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
    return pa.table([*placed(rows["key"], places).columns, rows["label"], rows["split"]], schema=PART)


def _require_plain(url: str, tree: Tree) -> None:
    # Raise for a table format whose folder holds rows that were deleted beside those that are left.
    for folder in tree.folders:
        for mark, kind in {"_delta_log": "Delta", ".hoodie": "Hudi", "_versions": "Lance"}.items():
            if folder.rpartition("/")[2] == mark:
                raise InputError(
                    f"{url} is a {kind} table, whose files hold deleted rows too: write it out as plain Parquet first"
                )
    if metadata := next(
        (name for name in tree.names if re.search(r"(^|/)metadata/[^/]*\.metadata\.json$", name)), None
    ):
        raise InputError(f"{url} is an Iceberg table ({metadata}): write it out as plain Parquet first")


def _passed_over(name: str) -> bool:
    # As Spark does: _SUCCESS, _metadata and what is being written.
    return hidden(name) or any(part.startswith("_") for part in name.split("/"))
