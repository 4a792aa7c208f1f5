import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

from pipeline.views import (
    CIFAR_POLICY,
    CUTOUT_FILL,
    LEVELS,
    OPS,
    CifarViews,
    DigitsViews,
    apply_policy,
    cutout,
    flip,
    magnitude,
    shift_crop,
)

ORACLE = AutoAugment(AutoAugmentPolicy.CIFAR10)
ALL_VIEWS = [CifarViews("autoaugment"), CifarViews("random"), CifarViews("none"), DigitsViews()]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def random_image(views: object, size: int, rng: np.random.Generator) -> np.ndarray:
    channels = 1 if isinstance(views, DigitsViews) else 3
    return rng.integers(0, 256, (size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(32, 32), (16, 16), (9, 20)])
@pytest.mark.parametrize("values", [(0, 256), (100, 140), (7, 8)], ids=["full", "narrow", "flat"])
def test_operations_equal_torchvisions(name, shape, values):
    magnitudes, signed = ORACLE._augmentation_space(LEVELS, shape)[name]
    for level in range(LEVELS):
        for sign in (1, -1):
            value = float(magnitudes[level]) if magnitudes.ndim else 0.0
            value *= sign if signed else 1
            # torchvision's table is float32
            assert magnitude(name, level, *shape, sign) == pytest.approx(value, rel=1e-6)
            image = Image.fromarray(generator(level).integers(*values, (*shape, 3), dtype=np.uint8))
            expected = _apply_op(image, name, value, InterpolationMode.NEAREST, None)
            np.testing.assert_array_equal(np.asarray(OPS[name](image, value)), np.asarray(expected))


def test_policy_equals_torchvisions():
    theirs = [tuple((name, p, level or 0) for name, p, level in ops) for ops in ORACLE.policies]
    assert list(CIFAR_POLICY) == theirs


def test_importing_views_does_not_import_torch():
    code = "import sys, pipeline.views; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("views", ALL_VIEWS, ids=repr)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([8, 16, 32]))
def test_views_keep_shape_and_type_and_depend_on_the_key_alone(views, seed, size):
    image = random_image(views, size, generator(seed))
    before = image.copy()
    for view in (*views.pair(image, generator(seed)), views.weak(image, generator(seed))):
        assert view.shape == image.shape
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous
    np.testing.assert_array_equal(image, before)
    for first, second in zip(views.pair(image, generator(seed)), views.pair(image, generator(seed)), strict=True):
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(views.pair(image, generator(seed))[0], views.weak(image, generator(seed)))


@pytest.mark.parametrize("views", ALL_VIEWS, ids=repr)
def test_views_differ_from_draw_to_draw(views):
    rng = generator()
    image = random_image(views, 32, rng)
    strong = {views.pair(image, rng)[1].tobytes() for _ in range(50)}
    assert len(strong) > 45


def test_flip_mirrors_half_of_the_images():
    image, rng = np.array([[[0], [1]]], np.uint8), generator()
    mirrored = sum(int(flip(image, rng)[0, 0, 0]) for _ in range(2000))
    assert 900 < mirrored < 1100


@pytest.mark.parametrize(("size", "pad"), [(32, 2), (16, 1), (8, 1)])
def test_weak_shifts_by_up_to_the_scaled_pad(size, pad):
    image = np.zeros((size, size, 3), np.uint8)
    image[size // 2, size // 2] = 255
    rng = generator()
    rows = {int(np.argwhere(CifarViews().weak(image, rng))[0, 0]) - size // 2 for _ in range(300)}
    assert rows == set(range(-pad, pad + 1))


def test_shift_crop_fills_with_zeros_and_reaches_every_place_equally():
    rng = generator()
    tops = [int((shift_crop(np.full((8, 8, 1), 9, np.uint8), 1, rng)[:, 4, 0] == 0).argmax()) for _ in range(900)]
    # no zero row (argmax 0 too) or the top row: 600 of 900; the bottom row: 300
    assert tops.count(7) == pytest.approx(300, abs=60)
    assert set(tops) == {0, 7}


def test_cutout_paints_a_square_that_may_hang_over():
    rng = generator()
    areas = [
        int((cutout(np.zeros((32, 32, 3), np.uint8), 16, CUTOUT_FILL, rng)[:, :, 0] > 0).sum()) for _ in range(2000)
    ]
    assert max(areas) == 16 * 16
    assert min(areas) < 16 * 16 / 2
    # mean side: 16 for the 17 inner centres, 8…15 for the 8 at one border, 15…9 for the 7 at the other
    side = (17 * 16 + sum(range(8, 16)) + sum(range(9, 16))) / 32
    assert np.mean(areas) == pytest.approx(side**2, rel=0.03)


def test_strong_view_cuts_mid_grey_out_at_the_scale_of_the_image():
    rng = generator()
    for size, side in ((32, 16), (16, 8)):
        white = np.full((size, size, 3), 255, np.uint8)
        areas = [int((CifarViews("none").pair(white, rng)[1] == CUTOUT_FILL).all(axis=2).sum()) for _ in range(200)]
        assert max(areas) == side**2


@pytest.mark.parametrize(("size", "furthest"), [(32, 2 + 4), (16, 1 + 2)])
def test_strong_view_shifts_on_top_of_the_weak_one(size, furthest):
    rng, white = generator(), np.full((size, size, 3), 255, np.uint8)
    # the first row with some white left: the cutout never hides a whole row
    tops = {int((CifarViews("none").pair(white, rng)[1] == 255).any((1, 2)).argmax()) for _ in range(1000)}
    assert tops == set(range(furthest + 1))


def test_signs_of_operations_are_drawn_evenly(monkeypatch):
    drawn = []
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda image, value, name=name: drawn.append((name, value)) or image)
    rng = generator()
    for _ in range(4000):
        apply_policy(np.zeros((32, 32, 3), np.uint8), "random", rng)
    for name in OPS:
        values = [value for drawn_name, value in drawn if drawn_name == name]
        negative = np.mean([value < 0 for value in values])
        signed = ORACLE._augmentation_space(LEVELS, (32, 32))[name][1]
        # a tenth of the draws is level 0, which has no sign
        assert negative == pytest.approx(0.45 if signed else 0.0, abs=0.1)
        assert len(values) == pytest.approx(8000 / len(OPS), rel=0.2)


def test_policies_change_as_many_images_as_their_probabilities_say():
    rng = generator()
    image = rng.integers(30, 220, (32, 32, 3), dtype=np.uint8)
    assert apply_policy(image, "none", rng) is image
    changed = np.mean([not np.array_equal(apply_policy(image, "autoaugment", rng), image) for _ in range(1000)])
    untouched = np.mean([(1 - p) * (1 - q) for (_, p, _), (_, q, _) in CIFAR_POLICY])
    assert changed == pytest.approx(1 - untouched, abs=0.06)


def test_digits_strong_view_moves_little():
    image, rng = np.zeros((8, 8, 1), np.uint8), generator()
    image[2:6, 2:6] = 200
    pairs = [DigitsViews().pair(image, rng) for _ in range(500)]
    assert np.mean([strong.mean() for _, strong in pairs]) == pytest.approx(image.mean(), rel=0.25)
    assert np.mean(np.std([strong for _, strong in pairs], axis=0)) > 10
