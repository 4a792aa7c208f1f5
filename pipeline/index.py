"""Shards and their index: what ingest leaves on storage and training reads.

    index.json                       everything below, and that the ingest was finished
    train-00003-of-00032.parquet     rows in an order drawn from their ids, in row groups of 16
    rejected.parquet                 id, key, split and reason of every image that could not be used

Shapes: N rows, U row groups.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset import Dataset, Examples, InputError, Source, Split
from pipeline.policies import Policy
from pipeline.views import PHOTO_SIZE, Interpolation, PhotoViews

NAME = "index.json"
FEATURES = "features"  # in the options of an index of features (pipeline/features.py), which has no images
ROW_GROUP = 16  # rows: some 400 kB of 256-px JPEGs, the least that storage serves at a good rate
READERS = 8  # requests to storage at once, per reader
FOOTERS = (
    4096  # kept by an actor, compressed to a few kB each: those of 8 million images, whatever the number of shards
)

SHARD_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int32()),
        ("split", pa.string()),
        ("trusted", pa.bool_()),
        ("image", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """Hold one Parquet file."""

    name: str
    split: str
    rows: int
    bytes: int
    footer: int  # bytes at the end of the file that say where its row groups are
    sha256: str
    per_class: tuple[int, ...]

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Shard:
        """Return the shard that an index, in JSON, tells of."""
        return Shard(**{**fields, "per_class": tuple(fields["per_class"])})


@dataclass(frozen=True)
class Index:
    """Hold all shards of a data set."""

    dataset: str  # the layout's name: webvision, clothing1m, food101n, custom
    made_of: str  # digest of ids, labels, splits and options; the same again gives the same shards
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    rejected: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    row_group: int = ROW_GROUP

    def count(self, split: str) -> int:
        """Return the number of rows of a split."""
        return sum(shard.rows for shard in self.shards if shard.split == split)

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the splits there are: train and probe, then the evaluation sets."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def of(self, url: str, split: str) -> Shards:
        """Return the rows of a split; `url` is where this index was read from."""
        return Shards(url, tuple(shard for shard in self.shards if shard.split == split), self.row_group)

    def as_json(self) -> str:
        """Return what index.json holds."""
        return json.dumps(asdict(self), indent=1)


def write_shard(
    path: str, rows: Iterable[Mapping[str, Any]], classes: int, schema: pa.Schema = SHARD_SCHEMA
) -> Shard | None:
    """Write rows of `schema`, all of one split, to the local file `path`; None where there are no rows.

    A schema of one's own begins with the columns of SHARD_SCHEMA.
    """
    per_class, split = [0] * classes, ""
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as file:
        left = iter(rows)
        while held := list(itertools.islice(left, ROW_GROUP)):
            file.write_table(pa.Table.from_pylist(held, schema))
            split = held[0]["split"]
            for row in held:
                per_class[row["label"]] += 1
    return described(path, split, sum(per_class), per_class) if sum(per_class) else None


def described(path: str, split: str, rows: int, per_class: Sequence[int]) -> Shard:
    """Return what an index says of the local Parquet file `path`."""
    data = Path(path).read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    return Shard(
        Path(path).name, split, rows, len(data), footer, hashlib.sha256(data).hexdigest(), tuple(map(int, per_class))
    )


def read_index(url: str) -> Index:
    """Return the index at `url`; raises InputError where there is none, or none that can be read."""
    fs, path = storage.connect(url)
    try:
        held = json.loads(storage.read(fs, storage.join(path, NAME)))
        shards = tuple(map(Shard.of, held.pop("shards")))
        return Index(shards=shards, **{**held, "class_names": tuple(held["class_names"])})
    except FileNotFoundError:
        raise InputError(
            f"no {NAME} in {url}: make shards first, python -m pipeline.shards DATASET RAW --out {url}"
        ) from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{url}/{NAME} is damaged ({error}): remove it and run pipeline.shards again") from None


def require_images(index: Index, url: str) -> None:
    """Raise InputError where the index at `url` is one of features."""
    if FEATURES in index.options:
        raise InputError(f"{url} holds features, not images: give shards, or train with --network linear or mlp-UNITS")


@dataclass(frozen=True, eq=False)
class Shards:
    """Hold the rows of one split, read from storage by row groups when they are taken."""

    url: str
    shards: tuple[Shard, ...]
    row_group: int

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def row_groups(self) -> np.ndarray:
        """Return the number of rows of each row group, int64: all full but the last of a file."""
        parts = []
        for shard in self.shards:
            full, rest = divmod(shard.rows, self.row_group)
            parts += [np.full(full, self.row_group), np.full(1 if rest else 0, rest)]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    @property
    def digest(self) -> str:
        """Return a checksum of the shards' own."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def take(self, rows: np.ndarray) -> Examples:
        """Return the examples at `rows`, in that order, with encoded images. Raises InputError as `table` does."""
        table = self.table(rows, ("id", "label", "image"))
        label_N = table["label"].to_numpy().astype(np.int64)
        return Examples(table["id"].to_numpy(), label_N, table["image"].combine_chunks())

    def table(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return some columns of `rows`, in that order; each of their row groups is read once.

        Raises InputError for a shard that is missing or damaged.
        """
        end = np.cumsum([shard.rows for shard in self.shards])
        shard_N = np.searchsorted(end, rows, side="right")
        within_N = rows - (end - [shard.rows for shard in self.shards])[shard_N]
        units, unit_N = np.unique(np.stack([shard_N, within_N // self.row_group]), axis=1, return_inverse=True)
        with ThreadPoolExecutor(READERS) as pool:
            files = np.unique(shard_N)
            footers = dict(zip(files, pool.map(lambda file: _footer(self.url, self.shards[file]), files), strict=True))

            def read(unit: np.ndarray) -> pa.Table:
                return _read_row_group(self.url, self.shards[unit[0]], footers[unit[0]], int(unit[1]), columns)

            tables = list(pool.map(read, units.T))
        start = np.cumsum([0, *(len(table) for table in tables[:-1])])
        return pa.concat_tables(tables).combine_chunks().take(pa.array(start[unit_N] + within_N % self.row_group))

    def names(self, rows: np.ndarray) -> list[str]:
        """Return what the data set's own lists call the images at `rows`. Raises InputError as `table` does."""
        return self.table(rows, ("key",))["key"].to_pylist()


def _read_row_group(url: str, shard: Shard, footer: pq.FileMetaData, number: int, names: Sequence[str]) -> pa.Table:
    # One request for one row group: Parquet's own reader would send several, and retry none.
    fs, path = storage.connect(url)
    path = storage.join(path, shard.name)
    with _named(path):
        columns = [footer.row_group(number).column(c) for c in range(footer.num_columns)]
        start = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
        size = sum(column.total_compressed_size for column in columns)
        window = _Window(storage.read(fs, path, start, start + size), start, shard.bytes)
        return pq.ParquetFile(window, metadata=footer, pre_buffer=False).read_row_group(number, list(names))


def _footer(url: str, shard: Shard) -> pq.FileMetaData:
    with _named(storage.join(url, shard.name)):
        # The footer by itself is a Parquet file without rows, as far as Parquet's reader of footers looks.
        return pq.read_metadata(pa.BufferReader(zlib.decompress(_packed_footer(url, shard))))


@lru_cache(maxsize=FOOTERS)
def _packed_footer(url: str, shard: Shard) -> bytes:
    fs, path = storage.connect(url)
    path = storage.join(path, shard.name)
    with _named(path):
        return zlib.compress(storage.read(fs, path, shard.bytes - shard.footer, shard.bytes))


@contextmanager
def _named(path: str) -> Iterator[None]:
    # Say which shard it is that cannot be read.
    try:
        yield
    except (FileNotFoundError, pa.ArrowException, OSError, zlib.error) as error:
        if isinstance(error, ConnectionError):
            raise
        raise InputError(
            f"shard {path} is missing or damaged ({type(error).__name__}): "
            f"remove {NAME} there and run pipeline.shards again"
        ) from None


class _Window(io.RawIOBase):
    """Show a file of `size` bytes of which only those from `start` on are there."""

    def __init__(self, held: bytes, start: int, size: int) -> None:
        super().__init__()
        self.held, self.start, self.length, self.place = memoryview(held), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        first = self.place - self.start
        if first < 0 or first + len(buffer) > len(self.held):
            raise OSError("the file's metadata point outside of what was read")
        buffer[:] = self.held[first : first + len(buffer)]
        self.place += len(buffer)
        return len(buffer)


@dataclass(frozen=True)
class Sharded(Source):
    """Load a data set of photographs that pipeline.shards made into shards."""

    dataset: str
    """The layout that the shards were made from."""
    evaluate: tuple[str, ...] = ("test",)
    """Evaluation sets; the headline figure is read from the first."""
    size: int | None = None
    """Side of the square images that the network sees, px; None: that of its pretrained weights, or 224."""
    policy: Policy = "autoaugment"
    """Operations of the strong view: the learned ImageNet policy, two random ones, or none."""
    crop: float | None = None
    """Share of the short side that a test view shows, 0…1; None: that of the network's pretrained weights, or 0.875."""
    interpolation: Interpolation | None = None
    """How images come to their size; None: as with the network's pretrained weights, or bilinear."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"dataset.size is {self.size}: it must be 1 or more")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise InputError(f"dataset.crop is {self.crop}: it must be above 0 and at most 1")

    @property
    def views(self) -> PhotoViews:
        """Return the weak and strong views to train with."""
        return PhotoViews(self.policy, self.size or PHOTO_SIZE, self.crop, self.interpolation or "bilinear")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return H, W and C of the images that the network sees."""
        size = self.views.size
        return size, size, 3

    def seen(self, size: int, crop: float, interpolation: Interpolation) -> Sharded:
        """See `Source`."""
        return replace(
            self, size=self.size or size, crop=self.crop or crop, interpolation=self.interpolation or interpolation
        )

    def load(self, url: str, seed: int) -> Dataset:
        """Return the data set whose index is at `url`; the probe is read into memory as it is stored."""
        if not url:
            raise InputError("no shards given: --data gs://bucket/shards, made by python -m pipeline.shards")
        index = read_index(url)
        require_images(index, url)
        if index.dataset != self.dataset:
            raise InputError(f"{url} holds shards of {index.dataset}, not {self.dataset}: give another --data")
        for split in ("train", "probe", *self.evaluate):
            if split not in index.splits:
                raise InputError(
                    f"{url} has no {split} set, only {', '.join(index.splits)}: change --dataset.evaluate, or ingest it"
                )
        probe = index.of(url, "probe")
        tests: dict[str, Split] = {split: index.of(url, split) for split in self.evaluate}
        return Dataset(
            train=index.of(url, "train"),
            probe=probe.take(np.arange(len(probe))),
            tests=tests,
            class_names=index.class_names,
            notes=(f"{index.count('train'):,} noisy and {len(probe):,} trusted images in {url}",),
        ).check()
