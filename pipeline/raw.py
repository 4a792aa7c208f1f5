"""The bytes of raw images, wherever a listing says they are: files, members of archives, rows of Parquet."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.archive import Place
from pipeline.dataset import InputError
from pipeline.images import Rejected

FETCHERS = 16  # requests to storage at once
WINDOW = 64  # images fetched ahead of who asks
MAX_BYTES = 256 << 20  # of one image: what a deflated member may grow to


def fetch(table: pa.Table) -> Iterator[bytes | Rejected]:
    """Yield the encoded image of each row of a listing's table, in order, or why there is none.

    Rows of Parquet sources are held in memory together. Raises InputError for storage that cannot be used.
    """
    places: list[Place] = list(
        zip(*(table[name].to_pylist() for name in ("file", "start", "size", "how")), strict=True)
    )
    from_parquet: dict[tuple[str, int], list[int]] = {}
    for file, start, size, how in places:
        if how == "row" and file is not None:
            from_parquet.setdefault((file, size), []).append(start)
    rows = {
        (file, row): image
        for (file, column), wanted in from_parquet.items()
        for row, image in _parquet_rows(file, column, wanted)
    }
    with ThreadPoolExecutor(FETCHERS) as pool:
        for first in range(0, len(places), WINDOW):
            window = places[first : first + WINDOW]
            yield from pool.map(lambda place: rows[place[:2]] if place[3] == "row" else read_place(place), window)


def image_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that hold encoded images: binary, or Hugging Face's struct with a field
    `bytes`.
    """

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))

    return [column.name for column in schema if holds_bytes(column.type)]


def read_place(place: Place) -> bytes | Rejected:
    """Return the bytes of a file or of an archive's member, or why there are none.

    Raises InputError for storage that cannot be used; that a link of a list is dead is that image's own matter.
    """
    url, start, size, how = place
    if url is None:
        return Rejected("missing")
    try:
        if how == "file" and url.startswith(("http://", "https://")):
            return storage.read_link(url)
        fs, path = storage.connect(url)
        raw = storage.read(fs, path) if how == "file" else storage.read(fs, path, start, start + size)
    except storage.LinkError as error:
        return Rejected(str(error))
    except FileNotFoundError:
        return Rejected("missing")
    if how != "deflated":
        return raw
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        image = inflate.decompress(raw, MAX_BYTES)
    except zlib.error:
        return Rejected("damaged in its archive")
    return image if inflate.eof else Rejected("cut off in its archive, or grows too large")


def _parquet_rows(url: str, column_number: int, wanted: list[int]) -> Iterator[tuple[int, bytes | Rejected]]:
    # (row, its image) of the rows wanted of one file; each of their row groups is read once.
    fs, path = storage.connect(url)
    try:
        with storage.attempt(fs, path, lambda: fs.open(path, "rb")) as file:
            parquet = pq.ParquetFile(file)
            name = parquet.schema_arrow.names[column_number] if column_number >= 0 else None
            name = name or image_columns(parquet.schema_arrow)[0]
            left, first = sorted(set(wanted)), 0
            for number in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(number).num_rows
                here = [row for row in left if first <= row < end]
                if here:
                    column = parquet.read_row_group(number, [name])[name]
                    if pa.types.is_struct(column.type):
                        column = pc.struct_field(column, "bytes")
                    for row in here:
                        image = column[row - first].as_py()
                        yield row, Rejected("empty") if image is None else image
                first = end
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{url} is no readable Parquet file ({type(error).__name__}): copy it again") from None
