"""Learned augmentation policies and their operations: torchvision's semantics, without torch.

Shapes: H×W pixels, C = 3 channels (RGB), V = 256 values of a channel. An operation takes a uint8 HWC image and a
magnitude and returns a new uint8 HWC image, equal bit for bit to torchvision's on PIL images (nearest neighbour, black
fill); it never writes on its input.

PIL where only PIL rounds like PIL (warps, grey, blends of two images), else cv2: most operations are tables, and a
conversion to PIL and back costs more than looking one up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageEnhance

Policy = Literal["autoaugment", "random", "none"]

# ---- operations ------------------------------------------------------------------------------------------------------


def shear_x(image_HWC: np.ndarray, slope: float) -> np.ndarray:
    """Shear along x about the top left corner, as the authors of AutoAugment do; `slope` in px per px."""
    return _affine(image_HWC, 1, slope, 0, 0, 1, 0)


def shear_y(image_HWC: np.ndarray, slope: float) -> np.ndarray:
    """Shear along y about the top left corner; `slope` in px per px."""
    return _affine(image_HWC, 1, 0, 0, slope, 1, 0)


def translate_x(image_HWC: np.ndarray, distance: float) -> np.ndarray:
    """Move right by the whole pixels of `distance`."""
    return _affine(image_HWC, 1, 0, -int(distance), 0, 1, 0)


def translate_y(image_HWC: np.ndarray, distance: float) -> np.ndarray:
    """Move down by the whole pixels of `distance`."""
    return _affine(image_HWC, 1, 0, 0, 0, 1, -int(distance))


def rotate(image_HWC: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counter-clockwise about the centre."""
    return np.asarray(Image.fromarray(image_HWC).rotate(degrees, Image.Resampling.NEAREST))


def brightness(image_HWC: np.ndarray, change: float) -> np.ndarray:
    """Blend with black by the factor 1 + `change`."""
    return _blend_grey(image_HWC, 0, 1 + change)


def color(image_HWC: np.ndarray, change: float) -> np.ndarray:
    """Blend with the grey version by the factor 1 + `change`."""
    return np.asarray(ImageEnhance.Color(Image.fromarray(image_HWC)).enhance(1 + change))


def contrast(image_HWC: np.ndarray, change: float) -> np.ndarray:
    """Blend with the mean grey by the factor 1 + `change`."""
    grey = int(np.asarray(Image.fromarray(image_HWC).convert("L")).mean() + 0.5)
    return _blend_grey(image_HWC, grey, 1 + change)


def sharpness(image_HWC: np.ndarray, change: float) -> np.ndarray:
    """Blend with a smoothed version by the factor 1 + `change`."""
    smooth_HWC = image_HWC.copy()  # its outermost pixels stay as they are
    smooth_HWC[1:-1, 1:-1] = cv2.filter2D(image_HWC, -1, _SMOOTH)[1:-1, 1:-1]
    return np.asarray(Image.blend(Image.fromarray(smooth_HWC), Image.fromarray(image_HWC), 1 + change))


def posterize(image_HWC: np.ndarray, bits: float) -> np.ndarray:
    """Keep the upper `bits` bits of every value."""
    return image_HWC & np.uint8(256 - (1 << (8 - int(bits))))


def solarize(image_HWC: np.ndarray, threshold: float) -> np.ndarray:
    """Invert the values at or above `threshold`."""
    return _look_up(image_HWC, np.where(threshold > _VALUE_V, _VALUE_V, 255 - _VALUE_V))


def autocontrast(image_HWC: np.ndarray, _: float) -> np.ndarray:
    """Stretch every channel to the range 0…255."""
    low_C1, high_C1 = np.array([cv2.minMaxLoc(plane_HW)[:2] for plane_HW in cv2.split(image_HWC)]).T[:, :, None]
    # The order of the roundings is PIL's: stretching about `low` in one step differs from it in the last bit.
    scale_C1 = 255.0 / np.maximum(high_C1 - low_C1, 1)
    lut_CV = np.clip(_VALUE_V * scale_C1 - low_C1 * scale_C1, 0, 255)
    return _look_up(image_HWC, np.where(high_C1 > low_C1, lut_CV, _VALUE_V).T)


def equalize(image_HWC: np.ndarray, _: float) -> np.ndarray:
    """Flatten the histogram of every channel."""
    count_CV = np.array([cv2.calcHist([image_HWC], [c], None, [256], [0, 256]).ravel() for c in range(3)], np.int64)
    below_CV = np.cumsum(count_CV, axis=1) - count_CV
    # The pixels of a channel's topmost value are not part of its step, so that this value is mapped to 255.
    step_C1 = below_CV.max(axis=1, keepdims=True, where=count_CV > 0, initial=0) // 255
    lut_CV = np.minimum((step_C1 // 2 + below_CV) // np.maximum(step_C1, 1), 255)
    return _look_up(image_HWC, np.where(step_C1 > 0, lut_CV, _VALUE_V).T)


def invert(image_HWC: np.ndarray, _: float) -> np.ndarray:
    """Replace every value by 255 − value."""
    return ~image_HWC


_VALUE_V = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH


def _affine(image_HWC: np.ndarray, *inverse: float) -> np.ndarray:
    image = Image.fromarray(image_HWC)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST))


def _blend_grey(image_HWC: np.ndarray, grey: int, factor: float) -> np.ndarray:
    # In float32 and cut, not rounded, as PIL blends.
    lut_V = grey + np.float32(factor) * (_VALUE_V - grey).astype(np.float32)
    return _look_up(image_HWC, np.clip(lut_V, 0, 255))


def _look_up(image_HWC: np.ndarray, lut: np.ndarray) -> np.ndarray:
    return cv2.LUT(image_HWC, lut.astype(np.uint8)[:, None])  # `lut` is V or V×C


OPS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
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

# ---- policies --------------------------------------------------------------------------------------------------------

# A policy operation: its name, the probability that it is applied, and the level of its magnitude.
PolicyOp = tuple[str, float, int]
SubPolicy = tuple[PolicyOp, PolicyOp]

# AutoAugment, arXiv:1805.09501, table 7 (CIFAR-10); level 0 stands where the operation has no magnitude.
CIFAR_POLICY: tuple[SubPolicy, ...] = (
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

# The same, table 9 (ImageNet), in the version of torchvision; a pair that stands twice is drawn twice as often.
IMAGENET_POLICY: tuple[SubPolicy, ...] = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)


def magnitude(name: str, level: int, height: int, width: int, sign: int) -> float:
    """Return what `level` (0…9) of operation `name` means on an H×W image, with `sign` (±1) where the operation has
    one.

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


def apply_policy(
    image_HWC: np.ndarray, policy: Policy, learned: tuple[SubPolicy, ...], rng: np.random.Generator
) -> np.ndarray:
    """Return the image after a drawn pair of operations, uint8 HWC, perhaps read-only; itself where none is applied.

    "autoaugment" draws one of the sub-policies in `learned`; "random" draws two operations and their levels uniformly,
    as RandAugment does (arXiv:1909.13719), and always applies them; "none" does nothing.
    """
    ops: tuple[PolicyOp, ...]
    match policy:
        case "autoaugment":
            ops = learned[below(len(learned), rng)]
        case "random":
            ops = tuple((OP_NAMES[below(len(OP_NAMES), rng)], 1.0, below(LEVELS, rng)) for _ in range(2))
        case "none":
            ops = ()
    height, width, _ = image_HWC.shape
    for name, value in [
        (name, magnitude(name, level, height, width, 1 if rng.random() < 0.5 else -1))
        for name, probability, level in ops
        if rng.random() < probability
    ]:
        image_HWC = OPS[name](image_HWC, value)
    return image_HWC


def below(n: int, rng: np.random.Generator) -> int:
    """Return a whole number in 0…n−1; rng.integers costs ten times as much for one number."""
    return int(rng.random() * n)
