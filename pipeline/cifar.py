"""CIFAR-10 and CIFAR-100, from torchvision's folder or from Parquet, with noise added to the training labels.

Shapes: N examples, H×W pixels, C = 3 channels (RGB), K classes. The whole set fits in memory (150 MB at 32 px).
"""

from __future__ import annotations

import codecs
import io
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset import Dataset, Examples, InputError, Source, draw_probe, keyed_generator
from pipeline.images import Rejected, decode
from pipeline.noise import CIFAR10_CONFUSIONS, Noise, asymmetric, noise_note, open_set, read_label_array, uniform
from pipeline.views import CifarViews, Policy

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NATIVE_SIZE = 32  # px
MIN_SIZE = 8  # px: below this the strong view's pad and cutout leave nothing to see
TEST_ID_START = 1_000_000_000  # far beyond any training row, so that test ids never meet training ids

# One generator for each purpose: another noise leaves the probe as it is.
PROBE_DRAW, LIMIT_DRAW, NOISE_DRAW = 1, 2, 3


@dataclass(frozen=True)
class Cifar(Source):
    """CIFAR with added noise and a probe set of clean labels. Raises InputError for fields that contradict."""

    classes: Literal[10, 100] = 10
    """CIFAR-10 or CIFAR-100."""
    noise: Noise = field(default_factory=Noise)
    """Noise added to the training labels, after the probe is taken out."""
    probe_per_class: int = 10
    """Trusted examples of each class, taken out of the training set."""
    policy: Policy = "autoaugment"
    """Operations of the strong view: the learned CIFAR policy, two random ones, or none (flip, crop, cutout only)."""
    size: int = NATIVE_SIZE
    """Height and width in px, from 8 to 32; less than 32 is resized by area, for small machines."""
    limit: int = 0
    """Training images to keep, balanced by true class and beside the probe; 0 keeps all."""

    def __post_init__(self) -> None:
        if not MIN_SIZE <= self.size <= NATIVE_SIZE:
            raise InputError(f"size is {self.size} px: give {MIN_SIZE} to {NATIVE_SIZE}")
        if self.limit < 0:
            raise InputError(f"limit is {self.limit}: give the number of training images to keep, or 0 for all")
        if self.noise.kind == "asymmetric" and self.classes != 10:
            raise InputError("asymmetric noise is defined for CIFAR-10 only: choose 10 classes or another noise kind")

    @property
    def views(self) -> CifarViews:
        """Return the weak and strong views to train with."""
        return CifarViews(self.policy)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return H, W and C of the images that the network sees."""
        return self.size, self.size, 3

    def load(self, url: str, seed: int) -> Dataset:
        """Return the data set in the folder `url` (a local path or any fsspec URL), checked; `seed` keys all draws.

        The folder holds torchvision's layout (or is its inner folder), or Parquet files named *train* and *test*.
        Training ids are rows of the training files, test ids rows of the test files plus 1,000,000,000.
        Raises InputError for anything missing, unreadable or contradictory.
        """
        train, test, class_names = _open(url, self.classes, self.size)
        clean_N = train.label_N
        if clean_N.size and not 0 <= clean_N.min() <= clean_N.max() < self.classes:
            raise InputError(f"{url} has labels {clean_N.min()}…{clean_N.max()}: set classes to what the data has")
        probe_rows = draw_probe(clean_N, self.classes, self.probe_per_class, keyed_generator(seed, PROBE_DRAW))
        rows = np.setdiff1d(np.arange(len(clean_N)), probe_rows)
        if self.limit:
            rows = _balanced(rows, clean_N, self.classes, self.limit, keyed_generator(seed, LIMIT_DRAW))
        noisy = self._with_noise(Examples(rows, clean_N[rows], train.read(rows), clean_N[rows]), len(clean_N), seed)
        assert noisy.true_label_N is not None
        test_rows = np.arange(len(test.label_N))
        return Dataset(
            train=noisy,
            probe=Examples(probe_rows, clean_N[probe_rows], train.read(probe_rows), clean_N[probe_rows]),
            tests={"test": Examples(TEST_ID_START + test_rows, test.label_N, test.read(test_rows), test.label_N)},
            class_names=class_names,
            notes=(noise_note(self.noise, noisy.label_N, noisy.true_label_N),),
        ).check()

    def _with_noise(self, clean: Examples, total: int, seed: int) -> Examples:
        # `clean` with noise on its labels or images; `total` counts the training rows before probe and limit.
        rng, label_N = keyed_generator(seed, NOISE_DRAW), clean.label_N
        match self.noise.kind:
            case "none":
                return clean
            case "uniform":
                label_N = uniform(label_N, self.classes, self.noise.rate, rng)
            case "asymmetric":
                label_N = asymmetric(label_N, CIFAR10_CONFUSIONS, self.noise.rate, rng)
            case "labels":
                label_N = _labels_of_rows(self.noise.source, clean.id_N, total, self.classes)
            case "open_set":
                fs, path = storage.connect(self.noise.source)
                other = _parquet_split(fs, [path], self.size, with_labels=False)
                other_MHWC = other.read(np.arange(len(other.label_N)))
                if len(other_MHWC) == 0:
                    raise InputError(f"{self.noise.source} has no images: give a file that has some")
                image_NHWC, replaced_N = open_set(clean.image_N, other_MHWC, self.noise.rate, rng)
                # −1: an image of another data set is truly of no class, so its kept label is a wrong one.
                return Examples(clean.id_N, label_N, image_NHWC, np.where(replaced_N, -1, label_N))
        return Examples(clean.id_N, label_N, clean.image_N, clean.true_label_N)


def _balanced(rows: np.ndarray, label_N: np.ndarray, classes: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    # `limit` of `rows`, equally many of each class (one more of some where it does not divide), sorted.
    quota_K = np.full(classes, limit // classes)
    quota_K[rng.permutation(classes)[: limit % classes]] += 1
    kept = []
    for k, quota in enumerate(quota_K):
        of_class = rng.permutation(rows[label_N[rows] == k])
        if len(of_class) < quota:
            raise InputError(
                f"limit {limit} needs {quota} images of class {k}, which has {len(of_class)} beside the probe: lower it"
            )
        kept.append(of_class[:quota])
    return np.sort(np.concatenate(kept))


def _labels_of_rows(source: str, rows: np.ndarray, total: int, classes: int) -> np.ndarray:
    label_N = read_label_array(source)
    if len(label_N) != total:
        raise InputError(
            f"label array {source} has {len(label_N)} labels for {total} training images: give one an image"
        )
    wrong = np.flatnonzero((label_N < 0) | (label_N >= classes))
    if len(wrong):
        raise InputError(
            f"label array {source} has label {label_N[wrong[0]]} in row {wrong[0]}, outside 0…{classes - 1}: fix it"
        )
    return label_N[rows]


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    label_N: np.ndarray  # int64
    read: Callable[[np.ndarray], np.ndarray]  # rows -> uint8 images NHWC, so that only rows in use are decoded


def _open(url: str, classes: int, size: int) -> tuple[_Split, _Split, tuple[str, ...]]:
    # Training split, test split and class names of the data in folder `url`.
    inner, marker = ("cifar-10-batches-py", "data_batch_1") if classes == 10 else ("cifar-100-python", "train")
    fs, folder = storage.connect(url)
    if not storage.exists(fs, folder):
        raise InputError(f"no such folder: {url}: check the path")
    if not storage.attempt(fs, folder, lambda: fs.isdir(folder)):
        raise InputError(f"{url} is a file: give the folder it is in")
    for candidate in (f"{folder}/{inner}", folder):
        if storage.exists(fs, f"{candidate}/{marker}"):
            return _open_torchvision(fs, candidate, classes, size)
    paths = sorted(storage.attempt(fs, folder, lambda: fs.ls(folder, detail=False)))
    trains, tests = (_parquet_of(paths, kind, classes) for kind in ("train", "test"))
    if not trains or not tests:
        raise InputError(
            f"no CIFAR-{classes} in {url}: it needs {inner}/, unpacked, or *train*.parquet and *test*.parquet"
        )
    names = CIFAR10_NAMES if classes == 10 else tuple(f"class {k}" for k in range(classes))
    train, test = (_parquet_split(fs, found, size, with_labels=True) for found in (trains, tests))
    return train, test, names


def _read(fs: Any, path: str) -> bytes:
    try:
        return storage.read(fs, path)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}: check the path, or copy the data again") from None


# The only names a CIFAR pickle may look up. The numpy of its day called its core `numpy.core`, today's `numpy._core`;
# numpy hides `_reconstruct`, but every array names it as the function that rebuilds it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    # A pickle may name any function to be called: this one builds plain values and numpy arrays, nothing else.
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(f"it wants to run {module}.{name}, which no CIFAR file does: get the data from its makers")
        return _ALLOWED[module, name]


def _unpickle(fs: Any, path: str) -> dict[str, Any]:
    data = _read(fs, path)
    try:
        # latin1: the files were written by Python 2, whose strings hold the arrays' bytes.
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except InputError as error:
        raise InputError(f"{path} is refused: {error}") from None
    except Exception as error:  # damaged bytes can make the unpickler raise almost anything
        raise InputError(f"{path} is damaged ({error}): copy the data again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a CIFAR file: copy the data again")
    return content


def _open_torchvision(fs: Any, folder: str, classes: int, size: int) -> tuple[_Split, _Split, tuple[str, ...]]:
    if classes == 10:
        train = _pickle_split(fs, [f"{folder}/data_batch_{i}" for i in range(1, 6)], "labels", size)
        return train, _pickle_split(fs, [f"{folder}/test_batch"], "labels", size), CIFAR10_NAMES
    names = _unpickle(fs, f"{folder}/meta").get("fine_label_names")
    if not isinstance(names, list) or len(names) != classes:
        raise InputError(f"{folder}/meta does not name {classes} classes: copy the data again")
    train, test = (_pickle_split(fs, [f"{folder}/{name}"], "fine_labels", size) for name in ("train", "test"))
    return train, test, tuple(str(name) for name in names)


def _pickle_split(fs: Any, paths: list[str], label_key: str, size: int) -> _Split:
    labels, images = [], []
    for path in paths:
        content = _unpickle(fs, path)
        label, data = np.asarray(content.get(label_key)), np.asarray(content.get("data"))
        if label.dtype.kind != "i" or data.dtype != np.uint8 or data.shape != (*label.shape, 3 * NATIVE_SIZE**2):
            raise InputError(f"{path} does not hold {label_key} and as many rows of 3,072 bytes: copy the data again")
        labels.append(label.astype(np.int64))
        images.append(data.reshape(-1, 3, NATIVE_SIZE, NATIVE_SIZE).transpose(0, 2, 3, 1))
    image_NHWC = np.concatenate(images)
    return _Split(np.concatenate(labels), lambda rows: _resized((image_NHWC[row] for row in rows), len(rows), size))


def _resized(images: Iterable[np.ndarray], count: int, size: int) -> np.ndarray:
    resized = np.empty((count, size, size, 3), np.uint8)
    for row, image_HWC in enumerate(images):
        if image_HWC.shape[:2] == (size, size):
            resized[row] = image_HWC
        else:
            resized[row] = cv2.resize(image_HWC, (size, size), interpolation=cv2.INTER_AREA)
    return resized


def _parquet_of(paths: list[str], kind: str, classes: int) -> list[str]:
    # The Parquet files of one kind, "train" or "test": of several, those named after this CIFAR. Never the other CIFAR.
    named = re.compile(rf"cifar-?{classes}(?!\d)", re.IGNORECASE)
    other = re.compile(rf"cifar-?{110 - classes}(?!\d)", re.IGNORECASE)
    names = {path: path.rsplit("/", 1)[-1] for path in paths}
    found = [p for p, n in names.items() if kind in n and n.endswith(".parquet") and not other.search(n)]
    return [p for p in found if named.search(names[p])] or found


def _parquet_split(fs: Any, paths: list[str], size: int, *, with_labels: bool) -> _Split:
    # Labels are zero where they are not asked for.
    labels, encoded = [], []
    for path in paths:
        try:
            table = pq.ParquetFile(io.BytesIO(_read(fs, path))).read()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is no readable Parquet file ({error}): copy the data again") from None
        column = _image_column(table, path)
        encoded += [(image, f"image {row} of {path}") for row, image in enumerate(column.to_pylist())]
        labels.append(_label_column(table, path) if with_labels else np.zeros(len(column), np.int64))
    return _Split(
        np.concatenate(labels), lambda rows: _resized((_decode(*encoded[row]) for row in rows), len(rows), size)
    )


def _image_column(table: Any, path: str) -> Any:
    # The only column of encoded images: binary, or Hugging Face's struct with a field `bytes`.
    found = []
    for name in table.column_names:
        column = table[name]
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            found.append(column)
    if len(found) != 1:
        raise InputError(
            f"{path} has {len(found)} columns of encoded images ({', '.join(table.column_names)}): keep one"
        )
    return found[0]


def _label_column(table: Any, path: str) -> np.ndarray:
    names = [name for name in ("label", "fine_label") if name in table.column_names]
    if not names:
        raise InputError(f"{path} has no column label or fine_label ({', '.join(table.column_names)}): add one")
    column = table[names[0]]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise InputError(f"column {names[0]} of {path} must be whole numbers without gaps: fix the labels")
    return column.to_numpy().astype(np.int64)


def _decode(encoded: bytes | None, name: str) -> np.ndarray:
    try:
        return decode(encoded or b"")
    except Rejected:
        raise InputError(f"{name} cannot be decoded: copy the data again, or remove the row") from None
