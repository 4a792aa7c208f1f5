"""Images to predict on or to embed, labelled or not: in shards, in folders and archives, or named by a table.

Shapes: N images, H×W pixels, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.columns import Columns
from pipeline.custom import Custom, images_at
from pipeline.dataset import InputError, Source
from pipeline.images import Rejected, decode, read_image
from pipeline.index import NAME, SHARD_SCHEMA, Index, Shard, Shards, read_index, require_images
from pipeline.layout import PLACE, identified
from pipeline.raw import fetch
from pipeline.views import fitted

NO_COLUMNS = Columns()


class Seen(NamedTuple):
    """Hold an image, or why there is none, and what is known of it."""

    id: int
    key: str
    image: np.ndarray | Rejected  # HWC RGB uint8
    label: int = -1  # −1: none is known
    split: str = "all"
    trusted: bool = False


Reader = Callable[[pa.Table], Iterator[Seen]]  # of some of `Images.rows`


@dataclass(frozen=True)
class Images:
    """Hold N images in a fixed order."""

    rows: pa.Table  # one an image: what `read` must know of it
    read: Reader
    digest: str  # of which images they are
    index: Index | None = None  # of shards
    shards: tuple[Shard, ...] = ()  # whose rows they are, in order


def open_images(url: str, split: str, short_side: int, columns: Columns = NO_COLUMNS) -> Images:
    """Return the images at `url`: those of shards (of one `split`, or all where it is ""), or all there are by their
    names.

    Images in a folder, an archive or a table become what ingest would store, so `short_side` means what it means there;
    ids and keys are those of pipeline.custom, and `columns` are the names of a table's.
    Raises InputError where there are none, or what lists them cannot be read.
    """
    fs, path = storage.connect(url)
    if storage.attempt(fs, path, lambda: fs.isdir(path)) and storage.exists(fs, storage.join(path, NAME)):
        index = read_index(url)
        require_images(index, url)
        if split and split not in index.splits:
            raise InputError(f"{url} has no {split} set, only {', '.join(index.splits)}: change --split")
        chosen = index.of(url, split) if split else Shards(url, index.shards, index.row_group)
        # Every task is given all shards: without their counts of a thousand classes.
        shards = replace(chosen, shards=tuple(replace(shard, per_class=()) for shard in chosen.shards))
        table = pa.table({"row": np.arange(len(shards))})
        return Images(table, partial(_read_shards, shards=shards), shards.digest, index, shards.shards)
    if split:
        raise InputError(f"{url} holds no shards, so it has no {split} set: leave --split out")
    found = images_at(url, columns)
    if not len(found):
        raise InputError(f"no images in {url}: give shards, a folder or archive of images, a .csv or .parquet")
    table = identified(found, Custom.name, np.full(len(found), -1), pa.repeat("", len(found)))
    first_N = np.unique(table["id"].to_numpy(), return_index=True)[1]  # what is listed twice is one image
    table = table.take(pa.array(np.sort(first_N)))
    digest = hashlib.sha256(f"{short_side}".encode())
    for item in zip(*(table[name].to_pylist() for name in PLACE), strict=True):
        digest.update(repr(item).encode())
    return Images(table, partial(_read_files, short_side=short_side), digest.hexdigest())


def views_of(some: pa.Table, read: Reader, source: Source) -> dict[str, np.ndarray]:
    """Return what the network is evaluated on of some of `Images.rows`: image (uint8 N×H×W×C), id, key, place and
    rejected.

    `rejected` is the reason why there is no image, "" where there is one; `place` is the row's own column.
    """
    cv2.setNumThreads(1)  # a task has one core
    found = list(read(some))
    image_NHWC = np.zeros((len(found), *source.shape), np.uint8)
    for view_HWC, each in zip(image_NHWC, found, strict=True):
        if not isinstance(each.image, Rejected):
            view_HWC[:] = fitted(source.views.test(each.image), source.shape)
    return {**named(found), "place": some["place"].to_numpy(), "image": image_NHWC}


def named(found: Sequence[Seen]) -> dict[str, np.ndarray]:
    """Return the columns id, key and rejected of what was found."""
    return {
        "id": np.array([each.id for each in found], np.int64),
        "key": np.array([each.key for each in found], object),
        "rejected": np.array([str(e.image) if isinstance(e.image, Rejected) else "" for e in found], object),
    }


def _read_files(some: pa.Table, short_side: int) -> Iterator[Seen]:
    for id_, key, raw in zip(some["id"].to_pylist(), some["key"].to_pylist(), fetch(some), strict=True):
        yield Seen(id_, key, _pixels(partial(read_image, short_side=short_side or None), raw))


def _read_shards(some: pa.Table, shards: Shards) -> Iterator[Seen]:
    table = shards.table(some["row"].to_numpy(), SHARD_SCHEMA.names)
    known = (table[name].to_pylist() for name in ("id", "key", "label", "split", "trusted"))
    for stored, id_, key, *rest in zip(table["image"], *known, strict=True):
        yield Seen(id_, key, _pixels(decode, stored.as_buffer()), *rest)


def _pixels(read: Callable[[bytes], np.ndarray], encoded: bytes | Rejected) -> np.ndarray | Rejected:
    if isinstance(encoded, Rejected):
        return encoded
    try:
        return read(encoded)
    except Rejected as reason:
        return reason
