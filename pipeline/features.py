"""Stored features: what a pretrained network makes of every image, once, for heads that are trained on it in minutes.

    index.json                       as shards have it; `options.features` says by which network, and what it saw
    train-00003-of-00032.parquet     id, key, label, split, trusted and the embeddings, in row groups of 256

`embedding` is of the test view, `look_1` … `look_V` of random views. To networks, an example's looks are an image one
pixel high and 1 + V wide, whose channels are the embedding's numbers; a view of it is one look.

Shapes: N examples, V random views, D numbers of an embedding, H×W pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import Dataset, Examples, HeldOut, InputError, Source, Split
from pipeline.images import Rejected
from pipeline.index import FEATURES, SHARD_SCHEMA, Index, Shard, Sharded, Shards, described, read_index
from pipeline.plan import Purpose, generator
from pipeline.unlabelled import Reader, named
from pipeline.views import Interpolation, PhotoViews

ROW_GROUP = 256  # rows: 400 kB of 768 numbers each


@dataclass(frozen=True)
class Made:
    """Say how an image became its embeddings: what decides them, as the index holds it."""

    network: str
    weights: str  # sha256 of the file they were read from
    size: int  # px
    crop: float
    interpolation: Interpolation
    width: int  # D
    looks: int  # V
    seed: int  # of the random views

    @property
    def views(self) -> PhotoViews:
        """Return the views that the network saw: `test` of the plain look, `weak` of the random ones."""
        return PhotoViews("none", self.size, self.crop, self.interpolation)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of embeddings, that of the plain look first."""
        return ("embedding", *(f"look_{number}" for number in range(1, self.looks + 1)))

    @property
    def schema(self) -> pa.Schema:
        """Return the columns of a file of features."""
        known = [field for field in SHARD_SCHEMA if field.name != "image"]
        return pa.schema([*known, *((name, pa.list_(pa.float16(), self.width)) for name in self.columns)])

    def digest(self, data: str) -> str:
        """Return the checksum of the features of the images with the checksum `data`."""
        return hashlib.sha256(json.dumps([data, self.__dict__]).encode()).hexdigest()


def made(index: Index, url: str) -> Made:
    """Return how the features at `url`, with this index, were made. Raises InputError where it is of images."""
    held: dict[str, Any] | None = index.options.get(FEATURES)
    if held is None:
        raise InputError(f"{url} holds images, not features: make these first, python -m pipeline.embed {url} --out F")
    try:
        return Made(**held)
    except TypeError as error:
        raise InputError(f"{url} holds features of another version ({error}): make them again") from None


def write_shard(path: str, table: pa.Table, classes: int) -> Shard | None:
    """Write features of one split to the local file `path`; None where there are no rows."""
    if not len(table):
        return None
    pq.write_table(
        table, path, row_group_size=ROW_GROUP, compression="none", use_dictionary=False, write_statistics=False
    )
    label_N = table["label"].to_numpy()
    per_class = np.bincount(label_N[label_N >= 0], minlength=classes)
    return described(path, table["split"][0].as_py(), len(table), per_class.tolist())


def looks_of(some: pa.Table, read: Reader, how: Made) -> dict[str, np.ndarray]:
    """Return the views of some images that a network is to see: N×(1 + V)×H×W×3 uint8, the plain one first.

    Beside `image` are id, key, rejected, label, split and trusted. Random views are keyed by the images' ids.
    """
    cv2.setNumThreads(1)  # a task has one core
    found, views = list(read(some)), how.views
    image_NLHWC = np.zeros((len(found), 1 + how.looks, how.size, how.size, 3), np.uint8)
    for looks_LHWC, each in zip(image_NLHWC, found, strict=True):
        if not isinstance(each.image, Rejected):
            rng = generator(how.seed, Purpose.VIEWS, each.id)
            looks_LHWC[0] = views.test(each.image)
            for look in range(1, 1 + how.looks):
                looks_LHWC[look] = views.weak(each.image, rng)
    return {
        **named(found),
        "label": np.array([each.label for each in found], np.int32),
        "split": np.array([each.split for each in found], object),
        "trusted": np.array([each.trusted for each in found]),
        "image": image_NLHWC,
    }


def unstacked(looks_NLD: np.ndarray, how: Made) -> dict[str, pa.FixedSizeListArray]:
    """Return embeddings of the plain look and of the others, N×(1 + V)×D, as the columns of a file of features."""
    looks = {name: np.ascontiguousarray(looks_NLD[:, look], np.float16) for look, name in enumerate(how.columns)}
    return {name: pa.FixedSizeListArray.from_arrays(pa.array(look.ravel()), how.width) for name, look in looks.items()}


def stacked(table: pa.Table, columns: tuple[str, ...]) -> np.ndarray:
    """Return embeddings as images, N×1×(1 + V)×D float16."""
    looks = [table[name].combine_chunks() for name in columns]
    width = looks[0].type.list_size
    parts = [look.flatten().to_numpy(zero_copy_only=False).reshape(-1, 1, 1, width) for look in looks]
    return np.concatenate(parts, axis=2)


@dataclass(frozen=True)
class FeatureViews:
    """Choose among an example's looks: weak and strong are two different ones, drawn from all, where there are two."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return one of the looks, 1×1×D."""
        look = int(rng.integers(image_HWC.shape[1]))
        return image_HWC[:, look : look + 1]

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return two looks, 1×1×D each; the first is what `weak` gives for the same key."""
        looks = image_HWC.shape[1]
        weak = int(rng.integers(looks))
        strong = (weak + 1 + int(rng.integers(max(looks - 1, 1)))) % looks
        return image_HWC[:, weak : weak + 1], image_HWC[:, strong : strong + 1]

    def test(self, image_HWC: np.ndarray) -> np.ndarray:
        """Return the plain look, 1×1×D."""
        return image_HWC[:, :1]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Hold the rows of one split of features, those of all folds but one, or of that one alone."""

    shards: Shards
    columns: tuple[str, ...]
    folds: int = 0  # 0: all rows
    fold: int = 0
    inside: bool = False  # whether the rows are those of the fold, or the others

    def __len__(self) -> int:
        return int(self._before(np.array(len(self.shards))))

    @property
    def row_groups(self) -> np.ndarray:
        """Return the number of rows of each row group, int64."""
        return np.diff(self._before(np.cumsum([0, *self.shards.row_groups])))

    @property
    def digest(self) -> str:
        """Return a checksum of the rows."""
        return hashlib.sha256(f"{self.shards.digest} {self.folds} {self.fold} {self.inside}".encode()).hexdigest()

    def take(self, rows: np.ndarray) -> Examples:
        """Return the examples at `rows`, in that order. Raises InputError as `Shards.table` does."""
        table = self.shards.table(self.stored(rows), ("id", "label", *self.columns))
        label_N = table["label"].to_numpy().astype(np.int64)
        return Examples(table["id"].to_numpy(), label_N, stacked(table, self.columns))

    def names(self, rows: np.ndarray) -> list[str]:
        """Return what the data set's own lists call the images at `rows`."""
        return self.shards.names(self.stored(rows))

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of the whole split that `rows` are: row r belongs to fold r mod `folds`.

        Rows were shuffled when shards were made, so that folds are random, and nothing has to be read to know them.
        """
        if not self.folds:
            return rows
        if self.inside:
            return rows * self.folds + self.fold
        rest = rows % (self.folds - 1)
        return rows // (self.folds - 1) * self.folds + rest + (rest >= self.fold)

    def _before(self, stored: np.ndarray) -> np.ndarray:
        # How many of these rows lie before each row of the whole split.
        if not self.folds:
            return stored
        of_fold = (stored + self.folds - 1 - self.fold) // self.folds
        return of_fold if self.inside else stored - of_fold


@dataclass(frozen=True)
class Features(Source):
    """Load a data set of embeddings that pipeline.embed made of shards."""

    dataset: str
    """The layout that the shards were made from."""
    width: int
    """Numbers of an embedding."""
    evaluate: tuple[str, ...] = ("test",)
    """Evaluation sets; the headline figure is read from the first. Those that are not there are left out."""
    folds: int = 0
    """Of how many parts of the training set one is left out; 0: all is trained on."""
    fold: int = 0
    """Which part is left out."""

    def __post_init__(self) -> None:
        if (self.folds and not 0 <= self.fold < self.folds) or self.folds == 1:
            raise InputError(f"dataset.fold is {self.fold} of {self.folds}: it must be below, and folds 2 or more")

    @property
    def views(self) -> FeatureViews:
        """Return how looks are chosen."""
        return FeatureViews()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return one pixel of D channels."""
        return 1, 1, self.width

    @property
    def direct(self) -> bool:
        """See `Source`: no image is decoded."""
        return True

    def load(self, url: str, seed: int) -> Dataset:
        """Return the data set whose index is at `url`; the trusted examples are read into memory."""
        index = read_index(url)
        how = made(index, url)
        if how.width != self.width or index.dataset != self.dataset:
            what = f"{url} holds {how.width} numbers an image of {index.dataset}"
            raise InputError(f"{what}, not {self.width} of {self.dataset}: give another --data")
        for split in ("train", "probe"):
            if split not in index.splits:
                raise InputError(f"{url} has no {split} set, only {', '.join(index.splits)}: embed shards that have it")
        tests: dict[str, Split] = {
            split: Embedded(index.of(url, split), how.columns) for split in self.evaluate if split in index.splits
        }
        if not tests:
            what = f"{url} has none of the sets {', '.join(self.evaluate)}, only {', '.join(index.splits)}"
            raise InputError(f"{what}: change --dataset.evaluate, or embed it")
        probe = Embedded(index.of(url, "probe"), how.columns)
        train = Embedded(index.of(url, "train"), how.columns, self.folds, self.fold)
        return Dataset(
            train=train,
            probe=probe.take(np.arange(len(probe))),
            tests=tests,
            class_names=index.class_names,
            notes=(f"features of {how.network}, {how.width} numbers, {how.looks} random views, in {url}",),
        ).check()

    def held_in(self, url: str) -> Embedded:
        """Return the rows of the fold that is left out of training."""
        index = read_index(url)
        return Embedded(index.of(url, "train"), made(index, url).columns, self.folds, self.fold, inside=True)


def of_features(source: Source, url: str) -> Source:
    """Return the source of the features at `url` that were made of the images of `source`.

    Raises InputError where there are none, or none can be.
    """
    if isinstance(source, HeldOut):
        return replace(source, source=of_features(source.source, url))
    if not isinstance(source, Sharded):
        what = f"{type(source).__name__.lower()} has images, not features"
        raise InputError(f"{what}: embed shards, and train on them with training/custom.py")
    how = made(read_index(url), url)
    return Features(source.dataset, how.width, source.evaluate)
