"""Label noise as pure functions of clean labels and an explicit generator, and the reader of label arrays.

Shapes: N examples, M images of another data set, H×W pixels, C channels, K classes.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from typing import Literal

import cv2
import fsspec
import numpy as np

from pipeline.dataset import InputError

# truck→automobile, bird→airplane, cat↔dog, deer→horse (docs/method.md, Data rules)
CIFAR10_CONFUSIONS: dict[int, int] = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


@dataclass(frozen=True)
class Noise:
    """Say which noise is added to clean training labels; the probe and the test set are never touched.

    Raises InputError (a ValueError) for a rate outside 0…1, a missing source, or a field that the kind does not read.
    """

    kind: Literal["none", "uniform", "asymmetric", "labels", "open_set"] = "none"
    """uniform: redraw from all classes; asymmetric: CIFAR-10's usual confusions; labels: read an array of noisy labels
    (human or semantic noise); open_set: replace images by those of another data set, labels kept."""
    rate: float = 0.0
    """Uniform: probability that a label is redrawn, the true class included, so about rate·(1−1/K) are wrong.
    Asymmetric: probability of the flip in the classes that flip. Open_set: share of images replaced."""
    source: str = ""
    """Labels: the array in training order, as path.npy or path.npz:key. Open_set: a Parquet file with one column of
    encoded images. Any path or fsspec URL."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise InputError(f"noise rate is {self.rate}: give a probability from 0 to 1")
        if self.rate and self.kind in ("none", "labels"):
            raise InputError(f"noise kind {self.kind} has no rate, but {self.rate} was given: choose another kind")
        if self.kind in ("labels", "open_set") and not self.source:
            raise InputError(f"noise kind {self.kind} needs a source: path.npz:key for labels, Parquet for open_set")
        if self.source and self.kind not in ("labels", "open_set"):
            raise InputError(
                f"noise kind {self.kind} reads no source, but {self.source} was given: choose another kind"
            )


def uniform(label_N: np.ndarray, classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Return labels of which each is redrawn from all K classes, the true one included, with probability `rate`."""
    redrawn_N = rng.random(len(label_N)) < rate
    return np.where(redrawn_N, rng.integers(classes, size=len(label_N)), label_N)


def asymmetric(label_N: np.ndarray, mapping: dict[int, int], rate: float, rng: np.random.Generator) -> np.ndarray:
    """Return labels of which each one of a class in `mapping` becomes the class it maps to with probability `rate`."""
    flipped_N = rng.random(len(label_N)) < rate
    noisy_N = label_N.copy()
    for true, wrong in mapping.items():
        noisy_N[flipped_N & (label_N == true)] = wrong
    return noisy_N


def open_set(
    image_NHWC: np.ndarray, other_MHWC: np.ndarray, rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return images of which a share `rate`, rounded to whole images, is replaced by others; and which were (bool, N).

    The others are resized by area to the images' size, and drawn with replacement only where they are too few.
    """
    count = round(rate * len(image_NHWC))
    rows = rng.choice(len(image_NHWC), count, replace=False)
    drawn = rng.choice(len(other_MHWC), count, replace=count > len(other_MHWC))
    images, replaced_N = image_NHWC.copy(), np.zeros(len(image_NHWC), bool)
    height, width = image_NHWC.shape[1:3]
    for row, other in zip(rows, drawn, strict=True):
        images[row] = cv2.resize(other_MHWC[other], (width, height), interpolation=cv2.INTER_AREA)
    replaced_N[rows] = True
    return images, replaced_N


def read_label_array(url: str) -> np.ndarray:
    """Return the labels (int64, N) at "path.npy" or "path.npz:key", a local path or any fsspec URL. Nothing is
    unpickled.

    Raises InputError for a missing or unreadable file, a missing key, or an array that is no list of whole numbers.
    """
    found = re.fullmatch(r"(?P<path>.+\.npz)(:(?P<key>[^/]*))?", url)
    path, key = (found["path"], found["key"]) if found else (url, None)
    try:
        with fsspec.open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                label_N = loaded
            elif key in loaded.files:
                label_N = loaded[key]
            else:
                asked = f"no label array {key}" if key else "several label arrays"
                raise InputError(f"{asked} in {path}: give one of them as {path}:KEY ({', '.join(loaded.files)})")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no label array at {path}: check the path") from None
    except (OSError, ValueError, EOFError, ImportError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read label array {path} ({error}): give a .npy or .npz file of numbers") from None
    if label_N.ndim != 1 or label_N.dtype.kind not in "iu":
        raise InputError(
            f"label array {url} is {label_N.dtype} of shape {label_N.shape}: give whole numbers in one row"
        )
    return label_N.astype(np.int64)


def noise_note(noise: Noise, label_N: np.ndarray, true_label_N: np.ndarray) -> str:
    """Return one line that states the noise as asked and as measured on the labels (N) made from it.

    An image of no class has the true label −1 and so counts as wrongly labelled.
    """
    asked = noise.source if noise.kind == "labels" else f"{noise.rate:.2f} asked"
    wrong = np.mean(label_N != true_label_N)
    return f"noise: {noise.kind} {asked}, {100 * wrong:.1f} % of labels really wrong"
