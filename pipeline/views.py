"""Two views of one image, a weak and a strong one, as pure functions of the image and an explicit generator.

Shapes: H×W pixels, C channels (RGB for CIFAR, one for digits), V = 256 values of a channel. Every view is uint8 and as
large as its image. Sizes written for 32-px images (pads, cutout) are scaled with the image's height.

The policy operations have torchvision's semantics on PIL images (nearest neighbour, black fill), without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import cv2
import numpy as np
from PIL import Image, ImageChops, ImageEnhance

Policy = Literal["autoaugment", "random", "none"]

CIFAR_HEIGHT = 32  # px, the height the three sizes below are stated for (METHOD: data rules)
WEAK_PAD = 2
STRONG_PAD = 4
CUTOUT = 16  # px, the side of the square
CUTOUT_FILL = 128  # mid-grey: the authors cut out zeros of data in [−1, 1]

# Digits are 8×8: one pixel is an eighth of the image, so a slope of 15° or 0.15 moves a corner by one pixel, and more
# would turn one digit into another (a 6 into a 0, a 1 into a 7).
DIGITS_SHIFT = 1  # px
DIGITS_ROTATION = 15.0  # degrees, either way
DIGITS_SCALE = (0.85, 1.15)  # strokes stay wider than half a pixel and inside the frame
DIGITS_SHEAR = 0.15
DIGITS_CONTRAST = (0.6, 1.4)  # the faintest stroke stays well above the empty background
DIGITS_CUTOUT = 3  # px: hides one stroke; CIFAR's half side (4 px) would hide half of a digit


class Views(Protocol):
    """What a data set's views can do; `rng` is the only source of randomness, so equal keys give equal views."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The weak view, uint8 HWC."""

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The weak and the strong view, both uint8 HWC."""


# ---- policy operations: PIL image and magnitude in, PIL image out ----------------------------------------------------


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)


def shear_x(image: Image.Image, slope: float) -> Image.Image:
    """Shear along x about the top left corner, as the authors of AutoAugment do; `slope` in px per px."""
    return _affine(image, 1, slope, 0, 0, 1, 0)


def shear_y(image: Image.Image, slope: float) -> Image.Image:
    """Shear along y about the top left corner; `slope` in px per px."""
    return _affine(image, 1, 0, 0, slope, 1, 0)


def translate_x(image: Image.Image, distance: float) -> Image.Image:
    """Move right by the whole pixels of `distance`."""
    return _affine(image, 1, 0, -int(distance), 0, 1, 0)


def translate_y(image: Image.Image, distance: float) -> Image.Image:
    """Move down by the whole pixels of `distance`."""
    return _affine(image, 1, 0, 0, 0, 1, -int(distance))


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate counter-clockwise about the centre."""
    return image.rotate(degrees, Image.Resampling.NEAREST)


def brightness(image: Image.Image, change: float) -> Image.Image:
    """Blend with black by the factor 1 + `change`."""
    return ImageEnhance.Brightness(image).enhance(1.0 + change)


def color(image: Image.Image, change: float) -> Image.Image:
    """Blend with the grey version by the factor 1 + `change`."""
    return ImageEnhance.Color(image).enhance(1.0 + change)


def contrast(image: Image.Image, change: float) -> Image.Image:
    """Blend with the mean grey by the factor 1 + `change`."""
    # PIL's own enhancer takes the mean in a Python loop over the histogram: several times the cost of this.
    grey = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (grey, grey, grey)), image, 1.0 + change)


def sharpness(image: Image.Image, change: float) -> Image.Image:
    """Blend with a smoothed version by the factor 1 + `change`."""
    return ImageEnhance.Sharpness(image).enhance(1.0 + change)


def posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keep the upper `bits` bits of every value."""
    return _look_up(image, _VALUE_V & (256 - (1 << (8 - int(bits)))))


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """Invert the values at or above `threshold`."""
    return _look_up(image, np.where(threshold > _VALUE_V, _VALUE_V, 255 - _VALUE_V))


def autocontrast(image: Image.Image, _: float) -> Image.Image:
    """Stretch every channel to the range 0…255."""
    low_C1, high_C1 = np.array(image.getextrema(), np.float64).T[:, :, None]
    # The order of the roundings is PIL's: stretching about `low` in one step differs from it in the last bit.
    scale_C1 = 255.0 / np.maximum(high_C1 - low_C1, 1)
    lut_CV = np.clip(_VALUE_V * scale_C1 - low_C1 * scale_C1, 0, 255)
    return _look_up(image, np.where(high_C1 > low_C1, lut_CV, _VALUE_V).T)


def equalize(image: Image.Image, _: float) -> Image.Image:
    """Flatten the histogram of every channel."""
    count_CV = np.reshape(image.histogram(), (3, 256))
    below_CV = np.cumsum(count_CV, axis=1) - count_CV
    # The pixels of a channel's topmost value are not part of its step, so that this value is mapped to 255.
    step_C1 = below_CV.max(axis=1, keepdims=True, where=count_CV > 0, initial=0) // 255
    lut_CV = np.minimum((step_C1 // 2 + below_CV) // np.maximum(step_C1, 1), 255)
    return _look_up(image, np.where(step_C1 > 0, lut_CV, _VALUE_V).T)


def invert(image: Image.Image, _: float) -> Image.Image:
    """255 − value."""
    return ImageChops.invert(image)


_VALUE_V = np.arange(256)


def _look_up(image: Image.Image, lut: np.ndarray) -> Image.Image:
    # `lut` is V or V×C. PIL's own `point` (and so its ImageOps) converts a table of 768 Python numbers on every call,
    # at three times the cost.
    return Image.fromarray(cv2.LUT(np.asarray(image), lut.astype(np.uint8)[:, None]))


OPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Brightness": brightness,
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
}
OP_NAMES = tuple(OPS)
LEVELS = 10  # magnitudes of an operation, numbered 0…9 from weakest to strongest

# A policy operation: its name, the probability that it is applied, and the level of its magnitude.
PolicyOp = tuple[str, float, int]

# AutoAugment, arXiv:1805.09501, table 7 (CIFAR-10); level 0 stands where the operation has no magnitude.
CIFAR_POLICY: tuple[tuple[PolicyOp, PolicyOp], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)


def magnitude(name: str, level: int, height: int, width: int, sign: int) -> float:
    """What `level` (0…9) of operation `name` means on an H×W image, with `sign` (±1) where the operation has one.

    Units are the operation's own: px per px, px, degrees, change of a factor, bits, value. Source: torchvision's
    `AutoAugment._augmentation_space` with 10 bins.
    """
    part = level / (LEVELS - 1)
    match name:
        case "ShearX" | "ShearY":
            return sign * 0.3 * part
        case "TranslateX":
            return sign * 150 / 331 * width * part
        case "TranslateY":
            return sign * 150 / 331 * height * part
        case "Rotate":
            return sign * 30.0 * part
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            return sign * 0.9 * part
        case "Posterize":
            return 8 - round(4 * part)
        case "Solarize":
            return 255 - 255 * part
        case _:
            return 0.0


def apply_policy(image_HWC: np.ndarray, policy: Policy, rng: np.random.Generator) -> np.ndarray:
    """The image after a drawn pair of operations, uint8 HWC; itself under the policy "none".

    "autoaugment" draws one of the 25 sub-policies of CIFAR_POLICY; "random" draws two operations and their levels
    uniformly, as RandAugment does (arXiv:1909.13719), and always applies them.
    """
    ops: tuple[PolicyOp, ...]
    match policy:
        case "autoaugment":
            ops = CIFAR_POLICY[_below(len(CIFAR_POLICY), rng)]
        case "random":
            ops = tuple((OP_NAMES[_below(len(OP_NAMES), rng)], 1.0, _below(LEVELS, rng)) for _ in range(2))
        case "none":
            ops = ()
    height, width, _ = image_HWC.shape
    chosen = [
        (OPS[name], magnitude(name, level, height, width, 1 if rng.random() < 0.5 else -1))
        for name, probability, level in ops
        if rng.random() < probability
    ]
    if not chosen:
        return image_HWC
    image = Image.fromarray(image_HWC)
    for op, value in chosen:
        image = op(image, value)
    return np.asarray(image)


# ---- geometry shared by the views ------------------------------------------------------------------------------------


def _below(n: int, rng: np.random.Generator) -> int:
    # A whole number in 0…n−1. rng.integers costs ten times as much for one number.
    return int(rng.random() * n)


def _scaled(size: int, height: int) -> int:
    return max(1, round(size * height / CIFAR_HEIGHT))


def shift_crop(image_HWC: np.ndarray, pad: int, rng: np.random.Generator) -> np.ndarray:
    """Pad every side with `pad` px of zeros and crop back to the image's own size at a random place."""
    height, width, channels = image_HWC.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image_HWC
    top, left = _below(2 * pad + 1, rng), _below(2 * pad + 1, rng)
    return padded[top : top + height, left : left + width]


def flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror left and right with probability one half."""
    return image_HWC[:, ::-1] if rng.random() < 0.5 else image_HWC


def cutout(image_HWC: np.ndarray, size: int, fill: int, rng: np.random.Generator) -> np.ndarray:
    """A copy with a square of `size` px painted over; its centre is uniform, so it may hang over the border.

    Source: arXiv:1708.04552.
    """
    height, width, _ = image_HWC.shape
    top, left = _below(height, rng) - size // 2, _below(width, rng) - size // 2
    cut = image_HWC.copy()
    cut[max(top, 0) : top + size, max(left, 0) : left + size] = fill
    return cut


# ---- the views -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CifarViews:
    """Views of small RGB photographs (METHOD: data rules); strong is made on top of weak."""

    policy: Policy = "autoaugment"
    """Operations of the strong view: the learned CIFAR policy, two random ones, or none (flip, crop, cutout only)."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Random crop after a pad of 2 px, random flip: uint8 HW3."""
        cropped = shift_crop(image_HWC, _scaled(WEAK_PAD, len(image_HWC)), rng)
        return np.ascontiguousarray(flip(cropped, rng))

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The weak view, and the strong one: policy, flip, crop after a pad of 4 px, cutout of 16 px; uint8 HW3."""
        height = len(image_HWC)
        weak = self.weak(image_HWC, rng)
        changed = flip(apply_policy(weak, self.policy, rng), rng)
        cropped = shift_crop(changed, _scaled(STRONG_PAD, height), rng)
        return weak, cutout(cropped, _scaled(CUTOUT, height), CUTOUT_FILL, rng)


@dataclass(frozen=True)
class DigitsViews:
    """Views of 8×8×1 grey digits, light on black; never flipped, because a mirrored digit is no digit."""

    def weak(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A shift by up to 1 px each way: uint8 HW1."""
        return np.ascontiguousarray(shift_crop(image_HWC, DIGITS_SHIFT, rng))

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The weak view, and on top of it the strong one: affine map, contrast, cutout; uint8 HW1."""
        weak = self.weak(image_HWC, rng)
        height, width, _ = weak.shape
        warped_HW = cv2.warpAffine(weak, _digits_affine(height, width, rng), (width, height))
        # About zero, not about the mean: the background, the pad and the cutout stay one and the same black.
        contrasted_HW = np.minimum(warped_HW * rng.uniform(*DIGITS_CONTRAST) + 0.5, 255).astype(np.uint8)
        return weak, cutout(contrasted_HW[:, :, None], DIGITS_CUTOUT, 0, rng)


def _digits_affine(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    # The 2×3 matrix that shears, scales and rotates about the centre, then moves.
    angle = math.radians(rng.uniform(-DIGITS_ROTATION, DIGITS_ROTATION))
    scale, shear = rng.uniform(*DIGITS_SCALE), rng.uniform(-DIGITS_SHEAR, DIGITS_SHEAR)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[cos, cos * shear - sin], [sin, sin * shear + cos]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - linear @ centre + rng.uniform(-DIGITS_SHIFT, DIGITS_SHIFT, 2)
    return np.column_stack([linear, offset])
