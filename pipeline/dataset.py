"""What a data set is: train, probe and test examples with stable ids, and the checks every one must pass.

Shapes: N examples, H×W pixels, C channels, K classes, U row groups.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from pipeline.images import decode
from pipeline.views import Interpolation, Views

MOST_HELD_OUT = 50  # trusted examples of a class: more tell accuracies apart no better than a sweep needs
HELD_OUT_DRAW = 4  # no other draw of a data set has this number


class InputError(ValueError):
    """Say that what the user gave cannot work. The message is one line: the thing, and the fix."""


class Split(Protocol):
    """Hold N labelled images, in memory or in shards on storage."""

    def __len__(self) -> int:
        """Return N."""

    @property
    def row_groups(self) -> np.ndarray:
        """Return the rows of each of the U units that are read as a whole, int64, in row order; they add up to N."""

    @property
    def digest(self) -> str:
        """Return a checksum of the rows, their order and labels: other data have another."""

    def take(self, rows: np.ndarray) -> Examples:
        """Return the examples at `rows`, in that order, in memory."""

    def names(self, rows: np.ndarray) -> list[str]:
        """Return what the data set calls the images at `rows`; their ids where they have no names."""


@dataclass(frozen=True)
class Examples:
    """Hold N labelled images in memory.

    `true_label_N` is known only where noise was added by us (or annotated twice): it serves reports, never training.
    """

    id_N: np.ndarray  # int64, stable: the same example keeps its id in every run
    label_N: np.ndarray  # int64, as given (noisy, for training examples)
    image_N: np.ndarray | pa.BinaryArray  # N×H×W×C uint8 (features: float16), or N encoded images
    true_label_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.id_N)

    @property
    def row_groups(self) -> np.ndarray:
        """Return ones: in memory every row is read by itself."""
        return np.ones(len(self), np.int64)

    @property
    def digest(self) -> str:
        """Return a checksum of ids and labels."""
        return hashlib.sha256(self.id_N.tobytes() + self.label_N.tobytes()).hexdigest()

    def take(self, rows: np.ndarray) -> Examples:
        """Return the examples at `rows`, in that order."""
        true = None if self.true_label_N is None else self.true_label_N[rows]
        image = self.image_N[rows] if isinstance(self.image_N, np.ndarray) else self.image_N.take(pa.array(rows))
        return Examples(self.id_N[rows], self.label_N[rows], image, true)

    def names(self, rows: np.ndarray) -> list[str]:
        """Return the ids of the images at `rows`, which have no other names here."""
        return [str(number) for number in self.id_N[rows]]

    def image(self, row: int) -> np.ndarray:
        """Return one image, H×W×C uint8."""
        if isinstance(self.image_N, np.ndarray):
            return self.image_N[row]
        return decode(self.image_N[row].as_buffer())


@dataclass(frozen=True)
class Dataset:
    """Hold noisy training examples, a small trusted probe set, and named evaluation sets, over the same K classes."""

    train: Split
    probe: Examples
    tests: Mapping[str, Split]  # the first is the one that the headline figure is read from
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())  # one line each, printed when a run starts (noise asked and measured)

    @property
    def noise_rate(self) -> float | None:
        """Return the share of training labels that are really wrong, where the truth is known."""
        if not isinstance(self.train, Examples) or self.train.true_label_N is None:
            return None
        return float(np.mean(self.train.label_N != self.train.true_label_N))

    @property
    def digest(self) -> str:
        """Return a checksum of all examples and classes: a run resumes on the same data only."""
        parts = [self.train.digest, self.probe.digest, *(test.digest for test in self.tests.values())]
        return hashlib.sha256(" ".join([*parts, *self.class_names]).encode()).hexdigest()

    def held_out(self, per_class: int, seed: int) -> Dataset:
        """Return the data set without its tests: `per_class` trusted examples of each class become its one evaluation
        set.

        With 0, half of the smallest class's, at most MOST_HELD_OUT. Raises InputError where a class has too few.
        """
        classes = len(self.class_names)
        smallest = int(np.bincount(self.probe.label_N, minlength=classes).min())
        per_class = per_class or min(smallest // 2, MOST_HELD_OUT)
        if not 0 < per_class < smallest:
            raise InputError(
                f"a class has {smallest} trusted examples, too few to hold out {max(per_class, 1)} for validation and "
                "train with the rest: lower it, or label more"
            )
        rows = draw_probe(self.probe.label_N, classes, per_class, keyed_generator(seed, HELD_OUT_DRAW))
        rest = np.setdiff1d(np.arange(len(self.probe)), rows)
        tests = {"validation": self.probe.take(rows)}
        return replace(self, probe=self.probe.take(rest), tests=tests).check()

    def check(self) -> Dataset:
        """Return self, or raise InputError naming what is wrong: empty, mislabelled, unbalanced or overlapping.

        The rows of shards were checked when they were made.
        """
        classes = len(self.class_names)
        if classes < 2:
            raise InputError(f"the data set has {classes} class; classification needs 2 or more")
        for name, split in {"train": self.train, "probe": self.probe, **self.tests}.items():
            if len(split) == 0:
                raise InputError(f"the {name} set is empty: check the data path and its filters")
            if isinstance(split, Examples):
                self._check_examples(name, split)
        missing = np.setdiff1d(np.arange(classes), self.probe.label_N)
        if len(missing):
            names = ", ".join(self.class_names[k] for k in missing[:5])
            raise InputError(f"no trusted example of class {names}: the probe set needs at least one of every class")
        return self

    def _check_examples(self, name: str, examples: Examples) -> None:
        classes = len(self.class_names)
        if len(np.unique(examples.id_N)) != len(examples):
            raise InputError(f"the {name} set repeats example ids: every example needs an id of its own")
        low, high = int(examples.label_N.min()), int(examples.label_N.max())
        if low < 0 or high >= classes:
            bad = low if low < 0 else high
            raise InputError(f"the {name} set has label {bad}, outside 0…{classes - 1}: fix the labels or classes")
        shared = np.intersect1d(examples.id_N, self.probe.id_N)
        if name != "probe" and len(shared):
            raise InputError(f"{len(shared)} probe ids are also in the {name} set (first: {shared[0]}): remove them")


class Source(ABC):
    """Say, as a frozen dataclass, which data set, with which noise, probe and views; it is part of a recipe."""

    kinds: ClassVar[dict[str, type[Source]]] = {}  # every class of sources, by the name that a recipe's JSON has for it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Source.kinds[cls.__name__] = cls

    @property
    @abstractmethod
    def views(self) -> Views:
        """Return the weak and strong views to train with."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Return H, W and C of the images that the network sees."""

    @property
    def direct(self) -> bool:
        """Tell whether examples are ready as they are stored: then a worker reads its own, and needs no actors."""
        return False

    def seen(self, size: int, crop: float, interpolation: Interpolation) -> Source:
        """Return the source with its images as a network's weights were trained to see them: `size` px a side, a test
        view the middle `crop` of the image.

        What is set already stays; here all is.
        """
        return self

    @abstractmethod
    def load(self, url: str, seed: int) -> Dataset:
        """Return the data set at `url`, checked; `seed` keys all draws. Raises InputError for what cannot work."""


@dataclass(frozen=True)
class HeldOut(Source):
    """Wrap a source for what is chosen by its results: some trusted examples validate, and no test set is there."""

    source: Source
    """The data set itself."""
    per_class: int
    """Trusted examples of each class that validate; 0: half of the smallest class's, at most 50."""

    @property
    def views(self) -> Views:
        """See `Source`."""
        return self.source.views

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Source`."""
        return self.source.shape

    @property
    def direct(self) -> bool:
        """See `Source`."""
        return self.source.direct

    def seen(self, size: int, crop: float, interpolation: Interpolation) -> HeldOut:
        """See `Source`."""
        return replace(self, source=self.source.seen(size, crop, interpolation))

    def load(self, url: str, seed: int) -> Dataset:
        """See `Source`."""
        return self.source.load(url, seed).held_out(self.per_class, seed)


def keyed_generator(seed: int, purpose: int) -> np.random.Generator:
    """Return the generator of one of a data set's own draws (probe, noise, …): independent of all its others."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose]))


def draw_probe(label_N: np.ndarray, classes: int, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Return the rows of a class-balanced probe set, `per_class` of each class, sorted (docs/method.md, Data rules).

    Raises InputError where a class has too few examples.
    """
    if per_class < 1:
        raise InputError(f"probe_per_class is {per_class}: at least 1 trusted example a class is needed")
    rows = []
    for k in range(classes):
        of_class = np.flatnonzero(label_N == k)
        if len(of_class) <= per_class:
            raise InputError(
                f"class {k} has {len(of_class)} examples, too few to take {per_class} for the probe: lower its size"
            )
        rows.append(rng.choice(of_class, per_class, replace=False))
    return np.sort(np.concatenate(rows))
