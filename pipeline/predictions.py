"""A folder of predictions: what training.predict writes and training.clean reads.

    _predictions.json                what they are of: model, images, classes; written first
    part-00003-of-00032.parquet      images 3·4096 … in their order; whole, or not there

Shapes: N images, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset import InputError

NAME = "_predictions.json"  # readers of Parquet folders skip such names
PART_ROWS = 4096  # what a kill may cost: seconds of a GPU's work, minutes of a CPU's

# Most likely classes first. Of an image that could not be used all answers are null, and `rejected` says why.
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("top_labels", pa.list_(pa.int32())),
        ("top_classes", pa.list_(pa.string())),
        ("top_probabilities", pa.list_(pa.float32())),
        ("pred_probs", pa.list_(pa.float32())),  # of all K classes, where they were asked for
        ("rejected", pa.string()),
    ]
)


@dataclass(frozen=True)
class Predictions:
    """Say what a folder's predictions are of, and which parts that makes."""

    model: str  # checksum of the model's file
    data_set: str  # checksum of which images they are
    split: str  # of shards; "": all
    rows: int  # N
    class_names: tuple[str, ...]
    top: int  # classes reported of each image
    all_probabilities: bool

    @property
    def parts(self) -> int:
        """Return how many parts hold N rows."""
        return -(-self.rows // PART_ROWS)

    def name(self, part: int) -> str:
        """Return the file of a part."""
        return f"part-{part:05d}-of-{self.parts:05d}.parquet"

    def rows_of(self, part: int) -> range:
        """Return the rows of a part."""
        return range(part * PART_ROWS, min((part + 1) * PART_ROWS, self.rows))


def begin(out: str, wanted: Predictions) -> list[int]:
    """Return the parts that are still to be made in the folder `out`, which belongs to `wanted` from now on.

    Raises InputError where it holds other predictions, or cannot be written.
    """
    storage.require_writable(out)
    fs, path = storage.connect(out)
    try:
        there = asdict(read(out))
    except FileNotFoundError:
        storage.write(fs, storage.join(path, NAME), json.dumps(asdict(wanted)).encode())
        return list(range(wanted.parts))
    for name, value in asdict(wanted).items():
        if there[name] != value:
            what = f"{out} holds predictions made with another {name.replace('_', ' ')}"
            raise InputError(f"{what}: choose another --out, or remove that folder")
    return missing(out, wanted)


def missing(url: str, about: Predictions) -> list[int]:
    """Return the parts that are not there."""
    fs, path = storage.connect(url)
    there = {entry.rpartition("/")[2] for entry in storage.attempt(fs, path, lambda: fs.ls(path, detail=False))}
    return [part for part in range(about.parts) if about.name(part) not in there]


def read(url: str) -> Predictions:
    """Return what the predictions in `url` are of. Raises FileNotFoundError where there are none."""
    fs, path = storage.connect(url)
    data = storage.read(fs, storage.join(path, NAME))
    try:
        fields = json.loads(data)
        return Predictions(**{**fields, "class_names": tuple(fields["class_names"])})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{url}/{NAME} is damaged ({error}): predict again, to another folder") from None


def regrouped(tables: Iterable[pa.Table], lengths: Iterable[int]) -> Iterator[pa.Table]:
    """Yield the rows of `tables`, in order, as tables of `lengths` rows; raises RuntimeError where there are too
    few.
    """
    held, rows = [], 0
    coming = iter(tables)
    for length in lengths:
        while rows < length:
            table = next(coming, None)
            if table is None:
                raise RuntimeError(f"the results end {length - rows} rows too early")
            held.append(table)
            rows += len(table)
        whole = pa.concat_tables(held)
        yield whole.slice(0, length)
        held, rows = [whole.slice(length)], rows - length


def write_part(out: str, about: Predictions, part: int, table: pa.Table) -> None:
    """Write the rows of a part, of SCHEMA."""
    fs, path = storage.connect(out)
    storage.write_table(fs, storage.join(path, about.name(part)), table.select(SCHEMA.names).cast(SCHEMA))


def read_rows(url: str, about: Predictions, rows: range, columns: Sequence[str]) -> pa.Table:
    """Return some columns of consecutive rows. Raises InputError where a part of them is missing or damaged."""
    fs, path = storage.connect(url)
    tables = []
    for part in range(rows.start // PART_ROWS, -(-rows.stop // PART_ROWS)):
        name = storage.join(path, about.name(part))
        try:
            tables.append(pq.read_table(pa.BufferReader(storage.read(fs, name)), columns=list(columns)))
        except (FileNotFoundError, pa.ArrowException) as error:
            raise InputError(
                f"{url}/{about.name(part)} is missing or damaged ({type(error).__name__}): "
                "remove it and run training.predict again, as before"
            ) from None
    return pa.concat_tables(tables).slice(rows.start - rows.start // PART_ROWS * PART_ROWS, len(rows))
