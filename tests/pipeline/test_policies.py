import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

from pipeline.policies import CIFAR_POLICY, IMAGENET_POLICY, LEVELS, OPS, apply_policy, below, magnitude

ORACLE = AutoAugment(AutoAugmentPolicy.CIFAR10)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(224, 224), (32, 32), (16, 16), (9, 20), (2, 1), (1, 1)])
@pytest.mark.parametrize("values", [(0, 256), (100, 140), (7, 8)], ids=["full", "narrow", "flat"])
def test_operations_equal_torchvisions(name, shape, values):
    magnitudes, signed = ORACLE._augmentation_space(LEVELS, shape)[name]
    image = generator().integers(*values, (*shape, 3), dtype=np.uint8)
    before = image.copy()
    for level in range(LEVELS) if magnitudes.ndim else [0]:
        for sign in (1, -1) if signed else [1]:
            value = sign * float(magnitudes[level] if magnitudes.ndim else magnitudes)
            # torchvision's table is float32
            assert magnitude(name, level, *shape, sign) == pytest.approx(value, rel=1e-6)
            expected = _apply_op(Image.fromarray(image), name, value, InterpolationMode.NEAREST, None)
            np.testing.assert_array_equal(OPS[name](image, value), np.asarray(expected))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("policy", "name"), [(CIFAR_POLICY, AutoAugmentPolicy.CIFAR10), (IMAGENET_POLICY, AutoAugmentPolicy.IMAGENET)]
)
def test_policies_equal_torchvisions(policy, name):
    theirs = [tuple((op, p, level or 0) for op, p, level in ops) for ops in AutoAugment(name).policies]
    assert list(policy) == theirs


def test_signs_of_operations_are_drawn_evenly(monkeypatch):
    drawn = []
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda image, value, name=name: drawn.append((name, value)) or image)
    rng = generator()
    for _ in range(4000):
        apply_policy(np.zeros((32, 32, 3), np.uint8), "random", CIFAR_POLICY, rng)
    for name in OPS:
        values = [value for drawn_name, value in drawn if drawn_name == name]
        negative = np.mean([value < 0 for value in values])
        signed = ORACLE._augmentation_space(LEVELS, (32, 32))[name][1]
        # a tenth of the draws is level 0, which has no sign
        assert negative == pytest.approx(0.45 if signed else 0.0, abs=0.1)
        assert len(values) == pytest.approx(8000 / len(OPS), rel=0.2)


@pytest.mark.parametrize("learned", [CIFAR_POLICY, IMAGENET_POLICY], ids=["cifar", "imagenet"])
def test_learned_policies_apply_each_operation_as_often_as_they_say(learned, monkeypatch):
    drawn = []
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda image, value, name=name: drawn.append(name) or image)
    image, rng, draws = np.zeros((32, 32, 3), np.uint8), generator(), 4000
    assert apply_policy(image, "none", learned, rng) is image
    assert not drawn
    for _ in range(draws):
        apply_policy(image, "autoaugment", learned, rng)
    for name in OPS:
        expected = sum(p for ops in learned for op, p, _ in ops if op == name) * draws / len(learned)
        # five standard deviations of a count; a pair may hold the same operation twice
        assert drawn.count(name) == pytest.approx(expected, abs=5 * np.sqrt(2 * expected))


def test_below_reaches_every_number_equally():
    rng = generator()
    count = np.bincount([below(5, rng) for _ in range(5000)], minlength=5)
    assert count == pytest.approx(1000, abs=5 * np.sqrt(1000))
