"""scikit-learn's digits: 1,797 real handwritten digits of 8×8 grey pixels, shipped with the library.

Shapes: N examples, H×W pixels, C = 1 channel, K = 10 classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.dataset import Dataset, Examples, InputError, Source, draw_probe, keyed_generator
from pipeline.noise import Noise, noise_note, uniform
from pipeline.views import DigitsViews

TEST_SIZE = 497  # held out by a fixed draw, the same for every seed
TEST_DRAW, PROBE_DRAW, NOISE_DRAW = 1, 2, 3


@dataclass(frozen=True)
class Digits(Source):
    """Load handwritten digits with uniform label noise and a few trusted examples of each class."""

    noise: Noise = field(default_factory=lambda: Noise("uniform", 0.8))
    """Noise added to the training labels, after the probe is taken out."""
    probe_per_class: int = 5
    """Trusted examples of each class, taken out of the training set."""

    def __post_init__(self) -> None:
        if self.noise.kind not in ("none", "uniform"):
            raise InputError(f"noise kind {self.noise.kind} is not defined for digits: choose uniform or none")

    @property
    def views(self) -> DigitsViews:
        """Return the weak and strong views to train with."""
        return DigitsViews()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return H, W and C of the images that the network sees."""
        return 8, 8, 1

    def load(self, url: str, seed: int) -> Dataset:
        """Return the data set, which needs no `url`; ids are rows of scikit-learn's arrays."""
        if url:
            raise InputError(f"digits come with scikit-learn and are not read from {url}: leave --data out")
        from sklearn.datasets import load_digits  # a second to import, which only who loads them should wait for

        digits = load_digits()
        image_NHWC = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        label_N = digits.target.astype(np.int64)
        everything = Examples(np.arange(len(label_N)), label_N, image_NHWC, label_N)

        order = keyed_generator(0, TEST_DRAW).permutation(len(label_N))
        test, rest = everything.take(np.sort(order[:TEST_SIZE])), everything.take(np.sort(order[TEST_SIZE:]))
        probe_rows = draw_probe(rest.label_N, 10, self.probe_per_class, keyed_generator(seed, PROBE_DRAW))
        clean = rest.take(np.setdiff1d(np.arange(len(rest)), probe_rows))
        noisy_N = uniform(clean.label_N, 10, self.noise.rate, keyed_generator(seed, NOISE_DRAW))
        return Dataset(
            train=Examples(clean.id_N, noisy_N, clean.image_N, clean.label_N),
            probe=rest.take(probe_rows),
            tests={"test": test},
            class_names=tuple(str(digit) for digit in digits.target_names),
            notes=(noise_note(self.noise, noisy_N, clean.label_N),),
        ).check()
