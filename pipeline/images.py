"""One image: what ingest stores of a raw file, and how the training stream decodes what is stored.

Shapes: H×W pixels, C = 3 channels (RGB). The content decides what a file is, whatever its name says.
"""

from __future__ import annotations

import io
import re
import warnings

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Of what PIL opens: EPS would run a program on what a stranger wrote, of the others it knows the header alone.
_NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
Image.init()
# All formats that the installed PIL reads and tells by their first bytes, those of photographs first.
FORMATS = tuple(
    dict.fromkeys(
        name
        for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", *Image.ID)
        if Image.OPEN[name][1] is not None and name not in _NOT_READ
    )
)
# Endings of the names of such files, in lower case, with their dot.
ENDINGS = frozenset(
    ending for ending, name in Image.registered_extensions().items() if name in FORMATS or name == "MPO"
)
# First bytes of files that people take for images, and that are not read.
_FOREIGN = (
    (rb"....ftyp(heic|heix|hevc|mif1|msf1)", "HEIC"),
    (rb"\xff\x0a|....JXL ", "JPEG XL"),
    (rb"%PDF", "PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
    (rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "SVG"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb".{128}DICM", "DICOM"),
    (rb"....ftyp|\x1a\x45\xdf\xa3", "a video"),
)
MIN_SIDE = 8  # px: crawls hold many counting pixels and spacers, 1×1 and the like
MAX_PIXELS = 100_000_000  # 300 MB decoded. A larger header is a mistake or an attack
MAX_SIDE = 65_500  # px: what a JPEG can hold

# Beyond the eye's and any network's reach: errors far below those of the views. 100 would double the bytes.
QUALITY = 95
# Chroma at half the resolution, as nearly all photographs on the web have it: against 4:4:4, half the bytes and half
# the decoding in every epoch.
SUBSAMPLING = "4:2:0"

# What turns an image upright, by its EXIF orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Rejected(ValueError):  # noqa: N818
    """Say that these bytes are no usable image. The message is a short plain reason."""


def check_image(encoded: bytes, short_side: int | None = None) -> bytes:
    """Return what to store of the raw file `encoded`: a whole, upright RGB or grey JPEG, its shorter side ≤
    `short_side` px.

    A file that is one already is returned byte for byte, once decoded in full. Anything else becomes an RGB JPEG: of
    an animation the first frame, upright, on white where it is transparent, with its aspect, never enlarged.
    Raises Rejected for what cannot be decoded to its last byte, is too small, or absurdly large.

    Not for threads: it holds back PIL's warnings, which are the whole process's.
    """
    upright = _usable(encoded, short_side)
    if upright is None:
        return encoded
    stored = io.BytesIO()
    upright.save(stored, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING)
    return stored.getvalue()


def read_image(encoded: bytes, short_side: int | None = None) -> np.ndarray:
    """Return the pixels of the raw file `encoded`, HWC RGB uint8: what `check_image` stores, without the loss of
    storing.

    Raises Rejected as it does, and is not for threads either.
    """
    upright = _usable(encoded, short_side)
    return decode(encoded) if upright is None else np.asarray(upright)


def decode(encoded: bytes) -> np.ndarray:
    """Return the pixels of a stored image: HWC, RGB, uint8. Raises Rejected where there are none.

    Orientation tags are ignored: ingest has turned every image upright, and its pixels must not turn again.
    """
    try:
        # twice as fast as PIL; the flags make it RGB, whatever the JPEG is
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image_HWC = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if len(encoded) else None
    except cv2.error:  # a header of more pixels than OpenCV takes
        image_HWC = None
    if image_HWC is None:
        raise Rejected("damaged")
    return image_HWC


def _usable(encoded: bytes, short_side: int | None) -> Image.Image | None:
    # The image, upright and RGB, its shorter side ≤ `short_side`; None where that is just what its own bytes hold.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on doubtful metadata and sizes, where only the pixels count
        try:
            return _upright(encoded, short_side)
        except Rejected:
            raise
        except Image.DecompressionBombError:
            raise Rejected(f"larger than {MAX_PIXELS:,} pixels") from None
        except Exception as error:  # PIL's decoders raise almost anything on damaged bytes
            raise Rejected("truncated" if "truncated" in str(error).lower() else "damaged") from None


def _upright(encoded: bytes, short_side: int | None) -> Image.Image | None:
    with _opened(encoded) as image:
        if image.format not in ("JPEG", "MPO"):
            image.load()  # which turns TIFF upright, and takes its tag away
        smaller = _shrunk(image.size, short_side)
        turn = _UPRIGHT.get(_orientation(image))
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and smaller is None and turn is None:
            # Both: PIL refuses a JPEG that ends early, which older OpenCV fills with grey; and the stream uses OpenCV.
            image.load()
            decode(encoded)
            return None
        # Of a JPEG libjpeg can decode a half, a quarter or an eighth of each side, and saves most of the time. What is
        # left to shrink has the sharpest filter without aliasing.
        image.draft(None, smaller)
        upright = _rgb(image)
        if smaller is not None:
            upright = upright.resize(smaller, Image.Resampling.LANCZOS)
        return upright if turn is None else upright.transpose(turn)


def _shrunk(size: tuple[int, int], short_side: int | None) -> tuple[int, int] | None:
    # Width and height with the shorter side at `short_side`; None where it is not longer now.
    shorter = min(size)
    if short_side is None or shorter <= short_side:
        return None
    return round(size[0] * short_side / shorter), round(size[1] * short_side / shorter)


def _opened(encoded: bytes) -> Image.Image:
    # The image, of which only the header is read. Raises Rejected by what the header says.
    if not len(encoded):
        raise Rejected("empty")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        start = encoded[:200]
        if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            raise Rejected("a web page, not an image") from None
        for signature, name in _FOREIGN:
            if re.match(signature, start, re.DOTALL):
                raise Rejected(f"{name}, a format that is not read: convert it to JPEG") from None
        raise Rejected("not an image") from None
    width, height = image.size
    if min(image.size) < MIN_SIDE:
        raise Rejected(f"too small: {width}×{height} px")
    if width * height > MAX_PIXELS:
        raise Rejected(f"larger than {MAX_PIXELS:,} pixels")
    if max(image.size) > MAX_SIDE:
        raise Rejected(f"a side longer than {MAX_SIDE:,} px")
    if image.mode in ("I", "F"):
        raise Rejected("pixels of 32 bits")  # of no stated range
    return image


def _orientation(image: Image.Image) -> int:
    # 1 to 8; 1 where there is no tag, or none that can be read: a bad tag makes no bad image.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises almost anything on damaged tags
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    # Decoded and converted: CMYK as Adobe stores it, inks inverted, 16 bits to their upper 8, on white where
    # transparent. Colour profiles are ignored, as the stream ignores those of the files that are kept.
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
