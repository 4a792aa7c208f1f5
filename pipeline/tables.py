"""Tables of images: CSV and Parquet files whose rows name images, or hold them, and say what they are.

Only the columns that are wanted are read, and kept by column: a million rows take some hundred megabytes.

Shapes: N rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import splits, storage
from pipeline.columns import URI, Columns, chosen, ignored
from pipeline.dataset import InputError
from pipeline.layout import Finding, text_of
from pipeline.raw import image_columns

# As people and spreadsheets write them.
TRUE, FALSE = {"true", "1", "1.0", "yes", "wahr"}, {"false", "0", "0.0", "no", "falsch", ""}
SEPARATORS = ",;\t|"
BATCH = 1 << 14  # rows held as Python's objects at once

TEXT = pa.string()


@dataclass(frozen=True)
class Table:
    """Hold N rows of one file as text; a column that the file does not have is None."""

    url: str
    count: int  # N
    label: pa.Array | None = None  # dictionary-encoded
    split: pa.Array | None = None
    trusted: pa.Array | None = None  # bool
    id: pa.Array | None = None
    path: pa.Array | None = None  # of the image; None where the rows hold the images themselves
    column: int = -1  # number of the column that holds them, where there are several such columns
    lines: np.ndarray | None = None  # of a CSV: the line at which each row ends
    class_names: tuple[str, ...] = ()  # in the order of their numbers, where the file gives them
    findings: tuple[Finding, ...] = ()

    def where(self, row: int) -> str:
        """Return the place of a row, for messages."""
        return f"{self.url}, row {row}" if self.lines is None else f"{self.url}, line {self.lines[row]}"


# ---- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(url: str, columns: Columns, *, labelled: bool = True) -> Table:
    """Return the rows of the CSV at `url`, separated by comma, semicolon, tab or bar; blank ones are left out.

    Raises InputError where it cannot be read, or lacks a column that is needed.
    """
    return _checked(*_csv(url, columns, labelled=labelled), labelled=labelled)


def read_labels(url: str) -> Iterator[tuple[str, str, str]]:
    """Yield place for messages, name of the image and label, which may be "", of each row of a CSV.

    Raises as `read_csv`.
    """
    table, raw, _ = _csv(url, Columns(), labelled=True)
    for row, (path, label) in enumerate(zip(raw["image"].to_pylist(), raw["label"].to_pylist(), strict=True)):
        yield table.where(row), path, label


def has_column(header: str, name: str) -> bool:
    """Return whether the first line of a CSV has this column among others, whatever separates them."""
    names = [one.strip().strip('"').lower() for one in re.split(f"[{re.escape(SEPARATORS)}]", header)]
    return header.lower().startswith("sep=") or (name in names and len(names) > 1)


def _csv(url: str, columns: Columns, *, labelled: bool) -> tuple[Table, dict[str, pa.Array], dict[str, str]]:
    # The rows, their columns by role as they are written, and what each of those is called.
    lines = io.TextIOWrapper(io.BytesIO(read_bytes(url)), "utf-8-sig", newline="")
    text_of(lines.buffer.getvalue(), url)  # raises where it is no UTF-8
    first = lines.readline()
    stated = re.fullmatch(r"sep=(.)[\r\n]*", first, re.IGNORECASE)
    header_line = lines.readline() if stated else first
    separator = stated[1] if stated else _separator(header_line, columns)
    reader = csv.reader(itertools.chain([header_line] * bool(header_line), lines), delimiter=separator, strict=True)
    skipped = 1 if stated else 0
    try:
        header = [name.strip() for name in next(reader, [])]
        while header and not header[-1]:
            header.pop()  # what a spreadsheet leaves behind the last column
        found = chosen(url, header, columns, (), labelled=labelled)
        at = {role: header.index(name) for role, name in found.items()}
        parts, line_N = _by_column(_csv_rows(url, reader, len(header), skipped), at)
    except csv.Error as error:
        raise InputError(f"{url}, line {reader.line_num + skipped} is not CSV ({error}): fix the line") from None
    lines.close()  # its bytes are not held beside the columns
    raw = {role: pa.chunked_array(parts.pop(role), TEXT).combine_chunks() for role in at}
    pa.default_memory_pool().release_unused()  # what Arrow keeps for its next use is as much as the columns
    table = Table(url, len(line_N), lines=line_N, findings=ignored(url, header, found.values()))
    return table, raw, found


def _by_column(
    rows: Iterator[tuple[int, list[str]]], at: dict[str, int]
) -> tuple[dict[str, list[pa.Array]], np.ndarray]:
    # Columns by role, in parts, from rows of all columns, of which a batch at a time is held; and the line of each row.
    line_N: list[np.ndarray] = [np.empty(0, np.int32)]
    parts: dict[str, list[pa.Array]] = {role: [] for role in at}
    while batch := list(itertools.islice(rows, BATCH)):
        line_N.append(np.array([line for line, _ in batch], np.int32))
        for role, column in at.items():
            parts[role].append(pa.array([values[column].strip(" \t") for _, values in batch], TEXT))
    return parts, np.concatenate(line_N)


def _separator(header: str, columns: Columns) -> str:
    # The one by which the header has the columns that are known.
    known = {name.lower() for name in (*URI, "label", *vars(columns).values()) if name}

    def fitting(separator: str) -> int:
        return len(known.intersection(name.strip().strip('"').lower() for name in header.split(separator)))

    return max(SEPARATORS, key=fitting)  # the first of the best: a comma where none fits


def _csv_rows(url: str, reader: Any, width: int, skipped: int) -> Iterator[tuple[int, list[str]]]:
    for values in reader:
        while len(values) > width and not values[-1].strip():
            values.pop()
        if not any(map(str.strip, values)):
            continue
        line = reader.line_num + skipped
        if len(values) != width:
            raise InputError(
                f"{url}, line {line}: {len(values)} values for {width} columns: "
                'quote values that hold commas ("a, b.jpg")'
            )
        yield line, values


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(url: str, columns: Columns, given: dict[str, str] | None = None, *, labelled: bool = True) -> Table:
    """Return the rows of the Parquet file at `url`; `given` are columns that its folder gives (split=test/).

    Of images that it holds nothing is read. Raises InputError as `read_csv`.
    """
    fs, path = storage.connect(url)
    try:
        with storage.attempt(fs, path, lambda: fs.open(path, "rb")) as file:
            table = _parquet(url, file, columns, given or {}, labelled=labelled)
    except FileNotFoundError:
        raise InputError(f"no such file: {url}: check the path") from None
    except pa.ArrowException as error:
        raise InputError(f"{url} is no readable Parquet file ({type(error).__name__}): copy it again") from None
    pa.default_memory_pool().release_unused()  # what Arrow keeps for its next use is as much as the table
    return table


def _parquet(url: str, file: Any, columns: Columns, given: dict[str, str], *, labelled: bool) -> Table:
    parquet = pq.ParquetFile(file)
    schema, count = parquet.schema_arrow, parquet.metadata.num_rows
    images = image_columns(schema)
    found = chosen(url, schema.names, columns, images, labelled=labelled, given=given)
    _require_types(url, schema, found)
    image, within = found["image"], found["image"] in images
    by_path = not within or _paths_only(parquet, image)
    raw = _read(file, parquet.metadata, schema, found, within="path" if within else "", by_path=by_path)
    raw |= {role: pa.repeat(given[name], count) for role, name in found.items() if name not in schema.names}
    table = Table(
        url=url,
        count=count,
        column=schema.get_field_index(image) if not by_path and len(images) > 1 else -1,
        class_names=_class_label(schema, found.get("label", "")),
        findings=() if within else ignored(url, schema.names, found.values()),
    )
    return _checked(table, raw, found, labelled=labelled)


def _read(
    file: Any, footer: pq.FileMetaData, schema: pa.Schema, found: dict[str, str], *, within: str, by_path: bool
) -> dict[str, pa.Array]:
    # The columns by role, that of images if they are told by paths, which may be a field `within` a struct.
    wanted = {role: name for role, name in found.items() if role != "image" and name in schema.names}
    if by_path:
        wanted["image"] = ".".join(filter(None, (found["image"], within)))
    few = [wanted[role] for role in ("label", "split", "trusted") if role in wanted]  # different values
    read = pq.ParquetFile(file, metadata=footer, read_dictionary=few).read(list(wanted.values()), use_threads=False)
    raw = {role: read[found[role]].combine_chunks() for role in wanted}
    del read
    pa.default_memory_pool().release_unused()
    if by_path and within:
        raw["image"] = pc.struct_field(raw["image"], within)
    return raw


def _paths_only(parquet: pq.ParquetFile, column: str) -> bool:
    # Whether a struct of bytes and path has paths alone; told by counts of nulls, without reading images.
    if not pa.types.is_struct(parquet.schema_arrow.field(column).type):
        return False
    meta = parquet.metadata
    leaf = next((c for c in range(meta.num_columns) if meta.schema.column(c).path == f"{column}.bytes"), None)
    if leaf is None or not meta.num_rows or parquet.schema_arrow.field(column).type.get_field_index("path") < 0:
        return False
    statistics = [meta.row_group(group).column(leaf).statistics for group in range(meta.num_row_groups)]
    return all(one is not None and one.has_null_count and one.num_values == 0 for one in statistics)


def _require_types(url: str, schema: pa.Schema, found: dict[str, str]) -> None:
    # Raise for a column of a type that cannot be what it is chosen for.
    for role, name in found.items():
        if role == "image" or name not in schema.names:
            continue
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        scalar = _is_text(kind) or pa.types.is_null(kind) or pa.types.is_boolean(kind)
        if not (scalar or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            raise InputError(f"{url}: column {name} is of type {kind}: make it text or whole numbers")


def _class_label(schema: pa.Schema, label: str) -> tuple[str, ...]:
    # The names that Hugging Face's schema gives the numbers of its labels.
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


# ---- both ------------------------------------------------------------------------------------------------------------


def read_bytes(url: str) -> bytes:
    """Return the bytes of the file at `url`. Raises InputError where there is none."""
    try:
        return storage.read(*storage.connect(url))
    except FileNotFoundError:
        raise InputError(f"no such file: {url}: check the path") from None


def _checked(table: Table, raw: dict[str, pa.Array], called: dict[str, str], *, labelled: bool) -> Table:
    # The table with each column as what it means. Raises for the first row that cannot be understood.
    text = {role: _text(raw[role]) for role in ("image", "id") if role in raw}
    for role, column in text.items():
        if (row := _first(pc.fill_null(pc.equal(column, ""), True))) is not None:
            fix = "fill it in, or remove the row" if role == "image" else "fill it in, or leave the column out"
            raise InputError(f"{table.where(row)}: no {called[role]}: {fix}")
        if (row := _first(pc.match_substring(column, "\0"))) is not None:
            raise InputError(f"{table.where(row)}: {called[role]} holds a NUL byte: fix the row")
    table = replace(table, path=text.get("image"), id=text.get("id"))
    if not labelled:
        return table
    label = _labels(table, raw["label"])
    findings = list(table.findings)
    split = None
    if "split" in raw:
        split, blank_count = _split_names(table, raw["split"])
        if 0 < blank_count < len(split):
            findings.append(Finding("warning", f"{blank_count:,} rows of {table.url} have no split", "fill it in"))
    trusted = _flags(table, raw["trusted"]) if "trusted" in raw else None
    return replace(table, label=label, split=split, trusted=trusted, findings=tuple(findings))


def _labels(table: Table, column: pa.Array) -> pa.Array:
    # Dictionary-encoded names, or whole numbers in figures.
    if pa.types.is_dictionary(column.type):
        different = column.dictionary  # values are few: what is wrong with a row is wrong with its value
        if column.null_count or (row := _first(_no_label(different))) is not None:
            row = _first(_no_label(column.dictionary_decode()))
    else:
        different, row = None, _first(_no_label(column))
    if row is not None:
        raise InputError(
            f"{table.where(row)}: label {column[row].as_py()!r} is no name or whole number: "
            "fill it in, or remove the row"
        )
    if different is not None:
        return (
            pa.DictionaryArray.from_arrays(column.indices, _label_text(different))
            .dictionary_decode()
            .dictionary_encode()
        )
    if table.class_names and not _is_text(column.type):
        return _named(table, column.cast(pa.int64()))
    return _label_text(column).dictionary_encode()


def _no_label(column: pa.Array) -> pa.Array:
    # Where a column has neither a name nor a whole number.
    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        return pa.repeat(True, len(column))
    if _is_text(column.type):
        return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column.cast(TEXT)), ""), True)
    if pa.types.is_integer(column.type):
        return pc.is_null(column)
    column = column.cast(pa.float64())
    return pc.invert(pc.fill_null(pc.equal(pc.floor(column), column), False))  # NaN is equal to nothing


def _label_text(column: pa.Array) -> pa.Array:
    return pc.utf8_trim_whitespace(_text(column)) if _is_text(column.type) else column.cast(pa.int64()).cast(TEXT)


def _named(table: Table, number: pa.Array) -> pa.Array:
    # Names for numbers, as the file's own schema has them.
    names = table.class_names
    if (row := _first(pc.or_(pc.less(number, 0), pc.greater_equal(number, len(names))))) is not None:
        raise InputError(
            f"{table.where(row)}: label {number[row]} has none of the file's {len(names)} names: "
            "leave unlabelled images out"
        )
    return pa.DictionaryArray.from_arrays(number.cast(pa.int32()), pa.array(names, TEXT))


def _split_names(table: Table, column: pa.Array) -> tuple[pa.Array, int]:
    # Names of splits, null where none is given, and how many are not.
    column = _words(column)
    given = [value.strip() for value in column.dictionary.to_pylist()]
    meant = [splits.of_value(value) if value else None for value in given]
    for number, (value, split) in enumerate(zip(given, meant, strict=True)):
        if value and split is None:
            row = _first(pc.equal(column.indices, number))
            assert row is not None
            raise InputError(
                f"{table.where(row)}: {value!r} cannot be the name of a split: "
                "write train, probe, val, test, or a plain name for another evaluation set"
            )
    names = pa.array(meant, TEXT).take(column.indices)
    return names, names.null_count


def _flags(table: Table, column: pa.Array) -> pa.Array:
    column = _words(column)
    words = [value.strip().lower() for value in column.dictionary.to_pylist()]
    for number, word in enumerate(words):
        if word not in TRUE | FALSE:
            row = _first(pc.equal(column.indices, number))
            assert row is not None
            value = column.dictionary[number].as_py()
            raise InputError(f"{table.where(row)}: trusted is {value!r}: write true or false")
    return pa.array([word in TRUE for word in words], pa.bool_()).take(column.indices)


def _words(column: pa.Array) -> pa.Array:
    # Dictionary-encoded text, "" where there is none.
    if pa.types.is_dictionary(column.type) and not column.null_count:
        return pa.DictionaryArray.from_arrays(column.indices, _text(column.dictionary))
    return pc.fill_null(_text(column), "").dictionary_encode()


def _text(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):  # 3.0 is 3: whole numbers that once had a gap among them
        whole = pc.fill_null(pc.equal(pc.floor(column), column), False)
        return pc.if_else(whole, pc.if_else(whole, column, 0).cast(pa.int64()).cast(TEXT), column.cast(TEXT))
    return column.cast(TEXT)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _first(mask: pa.Array) -> int | None:
    row = pc.index(mask, True).as_py()
    return None if row < 0 else int(row)


# ---- where images are ------------------------------------------------------------------------------------------------


def located(paths: pa.Array, parent: str, root: str) -> tuple[pa.Array, pa.Array]:
    """Return keys and URLs of the images that a table in the folder `parent` names, in one normal form.

    However a path is spelt (./a.jpg, x//a.jpg, an absolute one), one file has one key: its name below `root`, where it
    is there.
    """
    odd = pc.match_substring_regex(paths, r"^/|://|(^|/)\.{0,2}(/|$)")
    lead = parent[len(root) + 1 :] + "/" if parent.startswith(f"{root}/") else ""
    keys = pc.binary_join_element_wise(lead, paths, "") if lead else paths
    files = pc.binary_join_element_wise(f"{parent}/", paths, "")
    if not parent.startswith(root):
        odd = pa.repeat(True, len(paths))
    rows = np.flatnonzero(odd.to_numpy(zero_copy_only=False))
    for first in range(0, len(rows), BATCH):
        some = pa.array(rows[first : first + BATCH])
        pairs = [_located(path, parent, root) for path in paths.take(some).to_pylist()]
        mask = np.zeros(len(paths), bool)
        mask[rows[first : first + BATCH]] = True
        keys = pc.replace_with_mask(keys, mask, pa.array([key for key, _ in pairs], TEXT))
        files = pc.replace_with_mask(files, mask, pa.array([file for _, file in pairs], TEXT))
    return keys, files


def _located(path: str, parent: str, root: str) -> tuple[str, str]:
    path = path.removeprefix("file://")
    if "://" in path:
        return (path[len(root) + 1 :] if path.startswith(f"{root}/") else path), path
    spelt = path if path.startswith("/") else f"{parent}/{path}"
    scheme, colon, rest = spelt.rpartition("://")
    normal = posixpath.normpath(rest)
    file = f"{scheme}{colon}{normal.lstrip('/') if colon else '/' + normal.lstrip('/')}"
    if file.startswith(f"{root}/"):
        return file[len(root) + 1 :], file
    return (file if path.startswith("/") or colon else posixpath.relpath(file, root)), file
