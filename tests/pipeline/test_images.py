import io
import struct
import time
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pipeline.images import MIN_SIDE, Rejected, check_image, decode


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Something smooth, as photographs are: random colours a few pixels apart, uint8, HWC."""
    small = np.random.default_rng(height * width).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def saved(image: Image.Image | np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(encoded: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bad tags
        image = Image.open(io.BytesIO(encoded))
        image.load()
        image.getexif()
    return image


def assert_stored(encoded: bytes, expected_HWC: np.ndarray, tolerance: float) -> None:
    """`encoded` is an upright RGB JPEG that the stream and PIL both read as what is expected, on average."""
    image, pixels_HWC = opened(encoded), decode(encoded)
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert pixels_HWC.dtype == np.uint8
    assert pixels_HWC.shape == (image.height, image.width, 3) == expected_HWC.shape
    for ours_HWC in (pixels_HWC, np.asarray(image)):
        assert np.abs(ours_HWC.astype(float) - expected_HWC).mean() <= tolerance


KEPT = {
    "rgb": saved(photo(64, 48)),
    "grey": saved(photo(64, 48, 1)),
    "progressive": saved(photo(64, 48), progressive=True),
    "poor quality": saved(photo(64, 48), quality=10),
    "no subsampling": saved(photo(64, 48), subsampling=0),
    "upright by its tag": saved(photo(64, 48), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x01\0\0"),
    "bad tags": saved(photo(64, 48), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03"),
    "huge aspect": saved(photo(8, 3000)),
    "colour profile": saved(photo(64, 48), icc_profile=b"not a profile"),
    "bytes after its end": saved(photo(64, 48)) + b"garbage",
    "several pictures": saved(photo(64, 48), "MPO", save_all=True, append_images=[Image.new("L", (9, 9))]),
}


@pytest.mark.parametrize("encoded", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("short_side", [None, 64, 300])
def test_what_is_stored_already_is_kept_byte_for_byte(encoded, short_side):
    assert check_image(encoded, short_side) is encoded
    image = opened(encoded)
    pixels_HWC = decode(encoded)
    assert pixels_HWC.shape == (image.height, image.width, 3)
    assert np.abs(pixels_HWC.astype(float) - np.asarray(image.convert("RGB"))).mean() < 2


def over_white(rgba_HWC: np.ndarray) -> np.ndarray:
    alpha = rgba_HWC[:, :, 3:] / 255
    return rgba_HWC[:, :, :3] * alpha + 255 * (1 - alpha)


def test_other_modes_become_rgb():
    rgb_HWC, grey_HW = photo(64, 48), photo(64, 48, 1)[:, :, 0]
    alpha_HW = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (64, 1))
    rgba_HWC = np.dstack([rgb_HWC, alpha_HW])
    greys_HWC = np.dstack([grey_HW] * 3)
    bits_HW = np.repeat(np.arange(64) < 32, 48).reshape(64, 48)
    palette = Image.fromarray(rgb_HWC).quantize(64)
    clear = saved(palette, "PNG", transparency=3)
    index_HW = np.asarray(palette)
    on_white_HWC = np.where((index_HW == 3)[:, :, None], 255, np.asarray(palette.convert("RGB")))
    for encoded, expected_HWC in (
        (saved(rgb_HWC, "PNG"), rgb_HWC),
        (saved(rgb_HWC, "BMP"), rgb_HWC),
        (saved(rgb_HWC, "TIFF"), rgb_HWC),
        (saved(rgb_HWC, "WEBP", lossless=True), rgb_HWC),
        (saved(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        (clear, on_white_HWC),
        (saved(palette, "GIF", transparency=3), on_white_HWC),
        (saved(rgba_HWC, "PNG"), over_white(rgba_HWC)),
        (saved(rgba_HWC, "WEBP", lossless=True, exact=True), over_white(rgba_HWC)),
        (saved(np.dstack([grey_HW, alpha_HW]), "PNG"), over_white(np.dstack([greys_HWC, alpha_HW]))),
        (saved(grey_HW, "PNG"), greys_HWC),
        (saved(grey_HW.astype(np.uint16) * 257, "PNG"), greys_HWC),
        (saved(Image.frombytes("I;16B", (48, 64), (grey_HW.astype(">u2") * 257).tobytes()), "TIFF"), greys_HWC),
        (saved(bits_HW, "PNG"), np.dstack([bits_HW * 255.0] * 3)),
    ):
        assert_stored(check_image(encoded, 256), expected_HWC, tolerance=6)  # GIF and its like dither


def test_cmyk_and_ycck_become_rgb():
    # PIL writes as Adobe does: 255 − ink, with Adobe's marker.
    rgb_HWC = photo(64, 48)
    inks = np.dstack([255 - rgb_HWC, np.zeros((64, 48), np.uint8)])
    assert_stored(check_image(saved(Image.fromarray(inks, "CMYK"), quality=95), 256), rgb_HWC, tolerance=4)
    # The marker can say that three of the four are stored as YCbCr. Y is 255 − grey of the inverted inks.
    grey_HW = photo(64, 48, 1)[:, :, 0]
    middle_HW, none_HW = np.full_like(grey_HW, 128), np.zeros_like(grey_HW)
    ycck = bytearray(saved(Image.fromarray(np.dstack([grey_HW, middle_HW, middle_HW, none_HW]), "CMYK"), quality=95))
    ycck[ycck.index(b"Adobe") + 11] = 2
    assert_stored(check_image(bytes(ycck), 256), np.dstack([grey_HW] * 3), tolerance=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("short_side", [256, 32])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_turned_images_become_upright(orientation, short_side, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    encoded = saved(photo(80, 128), kind, exif=exif.tobytes(), quality=95)
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()  # PIL turns TIFF at this point by itself, and only TIFF
        upright = ImageOps.exif_transpose(image)
    assert upright.size == ((128, 80) if orientation < 5 else (80, 128))
    if short_side == 32:
        upright = upright.resize((51, 32) if upright.width == 128 else (32, 51), Image.Resampling.LANCZOS)
    assert_stored(check_image(encoded, short_side), np.asarray(upright.convert("RGB")), tolerance=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_kept(kind):
    frames = [Image.fromarray(photo(64, 48)), Image.new("RGB", (48, 64), "red")]
    encoded = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert opened(encoded).is_animated
    assert_stored(check_image(encoded, 256), np.asarray(frames[0]), tolerance=6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("height", "width"), [(480, 641), (641, 480), (256, 257), (1000, 3000), (512, 512), (257, 900)]
)
def test_large_images_shrink_to_the_short_side(kind, height, width):
    source = Image.fromarray(photo(height, width))
    image = opened(check_image(saved(source, kind, quality=95), 256))
    assert min(image.size) == 256
    assert abs(image.width / image.height - width / height) < 0.01
    whole = np.asarray(source.resize(image.size, Image.Resampling.LANCZOS))
    assert_stored(check_image(saved(source, kind, quality=95), 256), whole, tolerance=1.5)
    assert opened(check_image(saved(source, kind), None)).size == (width, height)


def test_shrinking_leaves_no_aliases():
    stripes_HWC = np.zeros((512, 512, 3), np.uint8)
    stripes_HWC[:, ::2] = 255  # finer than 200 px can show: grey remains
    for kind in ("JPEG", "PNG"):
        pixels_HWC = decode(check_image(saved(stripes_HWC, kind, quality=100), 200)).astype(float)
        assert np.abs(pixels_HWC[8:-8, 8:-8] - 127.5).max() < 16


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


REJECTED = {
    "zero bytes": (b"", "^empty$"),
    "web page": (b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "^a web page, not an image$"),
    "text": (b"Not Found", "^not an image$"),
    "program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage",
        "^EPS, a format that is not read",
    ),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(30), "^HEIC, a format that is not read: convert it to JPEG$"),
    "jpeg xl": (b"\0\0\0\x0cJXL \r\n\x87\n", "^JPEG XL, a format"),
    "svg": (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "^SVG, a format"),
    "video": (b"\0\0\0\x18ftypisom" + bytes(30), "^a video, a format"),
    "noise": (np.random.default_rng(0).bytes(5000), "^not an image$"),
    "bomb": (png_header(60_000, 60_000), "^larger than 100,000,000 pixels$"),
    "just over the limit": (png_header(10_000, 10_001), "^larger than 100,000,000 pixels$"),
    "long": (png_header(70_000, 10), "^a side longer than 65,500 px$"),
    "bomb in a chunk": (
        png_header(64, 64)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))) + png_header(64, 64)[33:],
        "^damaged$",
    ),
    "counting pixel": (saved(Image.new("L", (1, 1)), "GIF"), "^too small: 1×1 px$"),
    "spacer": (saved(photo(MIN_SIDE - 1, 300)), "^too small: 300×7 px$"),
    "32 bits": (saved(np.zeros((64, 64), np.float32), "TIFF"), "^pixels of 32 bits$"),
    "wrong chunk": (saved(photo(64, 48), "PNG").replace(b"IDAT", b"IDAX"), "^not an image$"),
    "half a header": (saved(photo(64, 48))[:300], "truncated|not an image"),
}


@pytest.mark.parametrize(("encoded", "reason"), REJECTED.values(), ids=REJECTED)
@pytest.mark.parametrize("short_side", [None, 16])
def test_what_is_no_image_is_rejected(encoded, reason, short_side):
    with pytest.raises(Rejected, match=reason):
        check_image(encoded, short_side)


@pytest.mark.parametrize("encoded", [b"", b"Not Found", saved(photo(64, 48))[:300], png_header(60_000, 60_000)])
def test_what_is_no_image_does_not_decode(encoded):
    with pytest.raises(Rejected, match=r"^damaged$"):
        decode(encoded)


@pytest.mark.parametrize("missing", [1, 2, 3, 20, 500, 2000])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {})],
    ids=["baseline", "progressive", "png", "tiff", "bmp", "webp"],
)
@pytest.mark.parametrize("short_side", [None, 60])
def test_every_truncation_is_rejected(missing, kind, options, short_side):
    rng = np.random.default_rng(0)
    whole = saved(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8), kind, **options)
    assert check_image(whole, short_side)
    if kind == "PNG" and missing <= 20:
        pytest.skip("end mark and checksums are missing, but no pixel")
    with pytest.raises(Rejected, match=r"truncated|damaged|not an image"):
        check_image(whole[:-missing], short_side)


def test_an_image_as_large_as_the_limit_is_no_bomb():
    encoded = saved(Image.new("1", (10_000, 10_000)), "PNG")  # PIL would warn of it
    assert decode(check_image(encoded, 64)).shape == (64, 64, 3)


SEEDS = [*KEPT.values(), *(saved(photo(24, 32), kind) for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF"))]


@given(st.binary(max_size=300))
def test_random_bytes_are_rejected(encoded):
    with pytest.raises(Rejected):
        check_image(encoded, 16)


@settings(max_examples=400)
@given(st.data())
def test_damaged_images_are_rejected_or_stored_whole(data):
    encoded = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    encoded = encoded[: data.draw(st.integers(0, 2 * len(encoded)))]
    try:
        stored = check_image(bytes(encoded), data.draw(st.sampled_from([None, 16])))
    except Rejected:
        return
    image = opened(stored)
    assert image.format in ("JPEG", "MPO")
    assert decode(stored).shape == (image.height, image.width, 3)


def test_a_kept_image_costs_about_a_millisecond():
    encoded = saved(photo(256, 341), quality=90)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        check_image(encoded, 256)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.005  # s; 0.6 ms where nothing else runs
