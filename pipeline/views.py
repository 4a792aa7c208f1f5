"""Two views of one image, a weak and a strong one, as pure functions of the image and an explicit generator.

Shapes: H×W pixels, C channels (3 for RGB photographs, one for digits), S the side of a photograph's view. Every image
and view is uint8; those of CIFAR and digits are as large as their image, those of photographs S×S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import cv2
import numpy as np
from PIL import Image

from pipeline.policies import CIFAR_POLICY, IMAGENET_POLICY, Policy, apply_policy, below

Interpolation = Literal["bilinear", "bicubic"]

CUTOUT = 16  # px, the side of the square, for CIFAR and photographs (docs/method.md, Data rules)
CUTOUT_FILL = 128  # mid-grey: the authors cut out zeros of data in [−1, 1]

CIFAR_HEIGHT = 32  # px; the cutout and the pads are scaled to images of another height
WEAK_PAD = 2
STRONG_PAD = 4

PHOTO_SIZE = 224  # px; the cutout and the short side in a test view are scaled to views of another size
PHOTO_SHORT_SIDE = 256
CROP_AREA = (0.08, 1.0)  # share of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width by height, log-uniform
CROP_TRIES = 10
BANNER = 8  # long by short side; of anything longer a test view takes no notice

# Digits are 8×8: one pixel is an eighth of the image, so a slope of 15° or 0.15 moves a corner by one pixel, and more
# would turn one digit into another (a 6 into a 0, a 1 into a 7).
DIGITS_SHIFT = 1  # px
DIGITS_ROTATION = 15.0  # degrees, either way
DIGITS_SCALE = (0.85, 1.15)  # strokes stay wider than half a pixel and inside the frame
DIGITS_SHEAR = 0.15
DIGITS_CONTRAST = (0.6, 1.4)  # the faintest stroke stays well above the empty background
DIGITS_CUTOUT = 3  # px: hides one stroke; CIFAR's half side (4 px) would hide half of a digit


class Views(Protocol):
    """Make a data set's views; `rng` is the only source of randomness, so equal keys give equal views."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the weak view, uint8 HWC."""

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the weak and the strong view, both uint8 HWC; the weak one is what `weak` gives for the same key."""

    def test(self, image_HWC: np.ndarray) -> np.ndarray:
        """Return the view to evaluate on, uint8 HWC."""


# ---- geometry --------------------------------------------------------------------------------------------------------


def shift_crop(image_HWC: np.ndarray, pad: int, rng: np.random.Generator) -> np.ndarray:
    """Pad every side with `pad` px of zeros and crop back to the image's own size at a random place."""
    height, width, channels = image_HWC.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image_HWC
    top, left = below(2 * pad + 1, rng), below(2 * pad + 1, rng)
    return padded[top : top + height, left : left + width]


def flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror left and right with probability one half."""
    # Numpy's reversed slice is free, but copying it costs 30 times as much as this.
    return cv2.flip(image_HWC, 1).reshape(image_HWC.shape) if rng.random() < 0.5 else image_HWC


def cutout(image_HWC: np.ndarray, size: int, fill: int, rng: np.random.Generator) -> np.ndarray:
    """Return a copy with a square of `size` px painted over; its centre is uniform, so it may hang over the border.

    Source: arXiv:1708.04552.
    """
    height, width, _ = image_HWC.shape
    top, left = below(height, rng) - size // 2, below(width, rng) - size // 2
    cut = image_HWC.copy()
    cut[max(top, 0) : top + size, max(left, 0) : left + size] = fill
    return cut


def crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a random part of an H×W image: (top, left, height, width) in px, as torchvision's RandomResizedCrop draws
    it.
    """
    low, high = CROP_AREA
    narrow, wide = CROP_RATIO
    for _ in range(CROP_TRIES):
        share, shape, down, right = rng.random(4).tolist()  # four numbers at the price of two
        area = height * width * (low + (high - low) * share)
        ratio = narrow * (wide / narrow) ** shape
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    # The largest part in the middle whose shape is allowed.
    h, w = min(height, round(width / narrow)), min(width, round(height * wide))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image_HWC: np.ndarray, height: int, width: int, interpolation: Interpolation = "bilinear") -> np.ndarray:
    """Return the image at another size; what shrinks is smoothed first, as torchvision and PIL do.

    By bilinear interpolation they weigh by a triangle as wide as the scale. A smoothing of the same variance and cv2's
    plain interpolation leave as much fine detail, within 5 %; cv2's INTER_AREA leaves up to 50 % more, in twice the
    time at scales below 2. Bicubic interpolation is PIL's own, by which pretrained networks were tested: cv2's has
    another kernel, and no smoothing.
    """
    if interpolation == "bicubic":
        return np.asarray(Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC))
    old_height, old_width, _ = image_HWC.shape
    if old_height > height or old_width > width:
        kernels = _triangle(old_width / width), _triangle(old_height / height)
        image_HWC = cv2.sepFilter2D(image_HWC, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(image_HWC, (width, height), interpolation=cv2.INTER_LINEAR)


def _triangle(scale: float) -> np.ndarray:
    # A triangle that falls to zero n px from its top has the variance (n² − 1)/6, and interpolation adds 1/6. Triangles
    # of n = ⌊scale⌋ and n + 1 are mixed so that the sum is scale²/6, the variance of theirs; scale ≤ 1: no smoothing.
    scale = max(scale, 1.0)
    n = int(scale)
    distance = np.abs(np.arange(-n, n + 1))
    share = (scale**2 - n**2) / (2 * n + 1)
    inner, outer = np.maximum(n - distance, 0) / n**2, (n + 1 - distance) / (n + 1) ** 2
    return (1 - share) * inner + share * outer


def _centre(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = round((len(image_HWC) - height) / 2), round((image_HWC.shape[1] - width) / 2)  # rounded as torchvision
    return image_HWC[top : top + height, left : left + width]


def fitted(image_HWC: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a test view in the H, W and C that a network sees; it is changed only where it has others.

    Views of small images are as large as these: one of another origin turns grey for a network of one channel, and its
    central square is resized by area.
    """
    height, width, channels = shape
    if channels == 1 and image_HWC.shape[2] == 3:
        image_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)[:, :, None]
    if image_HWC.shape[:2] != (height, width):
        short = min(image_HWC.shape[:2])
        square = _centre(image_HWC, short, short)
        image_HWC = cv2.resize(square, (width, height), interpolation=cv2.INTER_AREA).reshape(shape)
    return image_HWC


# ---- the views -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CifarViews:
    """Make views of small RGB photographs (docs/method.md, Data rules); strong is made on top of weak."""

    policy: Policy = "autoaugment"
    """Operations of the strong view: the learned CIFAR policy, two random ones, or none (flip, crop, cutout only)."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a random crop after a pad of 2 px, random flip: uint8 HW3."""
        cropped = shift_crop(image_HWC, _scaled(WEAK_PAD, len(image_HWC), CIFAR_HEIGHT), rng)
        return np.ascontiguousarray(flip(cropped, rng))

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the weak view, and the strong one: policy, flip, crop after a pad of 4 px, cutout of 16 px; uint8
        HW3.
        """
        height = len(image_HWC)
        weak = self.weak(image_HWC, rng)
        changed = flip(apply_policy(weak, self.policy, CIFAR_POLICY, rng), rng)
        cropped = shift_crop(changed, _scaled(STRONG_PAD, height, CIFAR_HEIGHT), rng)
        return weak, cutout(cropped, _scaled(CUTOUT, height, CIFAR_HEIGHT), CUTOUT_FILL, rng)

    def test(self, image_HWC: np.ndarray) -> np.ndarray:
        """Return the image itself."""
        return image_HWC


@dataclass(frozen=True)
class PhotoViews:
    """Make S×S views of RGB photographs of any size (docs/method.md, Data rules); weak and strong show other parts."""

    policy: Policy = "autoaugment"
    """Operations of the strong view: the learned ImageNet policy, two random ones, or none (crop, flip, cutout)."""
    size: int = PHOTO_SIZE
    """Side of a view, px."""
    crop: float | None = None
    """Share of a test view's short side that its centre has; None: 224 of 256 px."""
    interpolation: Interpolation = "bilinear"
    """How images come to another size."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a random part of random shape, resized, and a random flip: uint8 SS3."""
        height, width, _ = image_HWC.shape
        top, left, h, w = crop_box(height, width, rng)
        part = image_HWC[top : top + h, left : left + w]
        return flip(resize(part, self.size, self.size, self.interpolation), rng)

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the weak view, and the strong one: another part, flip, policy, cutout of 16 px; both uint8 SS3."""
        weak = self.weak(image_HWC, rng)
        changed = apply_policy(self.weak(image_HWC, rng), self.policy, IMAGENET_POLICY, rng)
        return weak, cutout(changed, _scaled(CUTOUT, self.size, PHOTO_SIZE), CUTOUT_FILL, rng)

    @property
    def short_side(self) -> int:
        """Return to how many px a test view resizes the short side before it cuts out the centre: 256 for views of
        224, or as timm reckons it by `crop`.
        """
        return math.floor(self.size / self.crop) if self.crop else _scaled(PHOTO_SHORT_SIDE, self.size, PHOTO_SIZE)

    def test(self, image_HWC: np.ndarray) -> np.ndarray:
        """Return the centre of the image, after its short side is resized to `short_side`: uint8 SS3."""
        height, width, _ = image_HWC.shape
        short = min(height, width)
        # A banner loses its ends first: resized as a whole it would fill the memory.
        middle = _centre(image_HWC, min(height, BANNER * short), min(width, BANNER * short))
        new_height, new_width = (side * self.short_side // short for side in middle.shape[:2])
        resized = resize(middle, new_height, new_width, self.interpolation)
        return np.ascontiguousarray(_centre(resized, self.size, self.size))


@dataclass(frozen=True)
class DigitsViews:
    """Make views of 8×8×1 grey digits, light on black; never flipped, because a mirrored digit is no digit."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a shift by up to 1 px each way: uint8 HW1."""
        return np.ascontiguousarray(shift_crop(image_HWC, DIGITS_SHIFT, rng))

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the weak view, and on top of it the strong one: affine map, contrast, cutout; uint8 HW1."""
        weak = self.weak(image_HWC, rng)
        height, width, _ = weak.shape
        warped_HW = cv2.warpAffine(weak, _digits_affine(height, width, rng), (width, height))
        # About zero, not about the mean: the background, the pad and the cutout stay one and the same black.
        contrasted_HW = np.minimum(warped_HW * rng.uniform(*DIGITS_CONTRAST) + 0.5, 255).astype(np.uint8)
        return weak, cutout(contrasted_HW[:, :, None], DIGITS_CUTOUT, 0, rng)

    def test(self, image_HWC: np.ndarray) -> np.ndarray:
        """Return the image itself."""
        return image_HWC


def _scaled(size: int, side: int, stated_for: int) -> int:
    return max(1, round(size * side / stated_for))


def _digits_affine(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    # The 2×3 matrix that shears, scales and rotates about the centre, then moves.
    angle = math.radians(rng.uniform(-DIGITS_ROTATION, DIGITS_ROTATION))
    scale, shear = rng.uniform(*DIGITS_SCALE), rng.uniform(-DIGITS_SHEAR, DIGITS_SHEAR)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[cos, cos * shear - sin], [sin, sin * shear + cos]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - linear @ centre + rng.uniform(-DIGITS_SHIFT, DIGITS_SHIFT, 2)
    return np.column_stack([linear, offset])
