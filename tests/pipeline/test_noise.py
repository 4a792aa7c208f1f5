import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import InputError
from pipeline.noise import CIFAR10_CONFUSIONS, Noise, asymmetric, noise_note, open_set, read_label_array, uniform

RATES = st.floats(0, 1)
LABELS = st.lists(st.integers(0, 9), max_size=60).map(lambda labels: np.array(labels, np.int64))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def within_binomial(measured: float, expected: float, count: int) -> bool:
    return abs(measured - expected) <= 4 * math.sqrt(max(expected * (1 - expected), 1e-9) / count)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("classes", [10, 100])
def test_uniform_redraws_from_all_classes(rate, classes):
    clean = np.arange(40_000) % classes
    noisy = uniform(clean, classes, rate, generator())
    assert within_binomial(np.mean(noisy != clean), rate * (1 - 1 / classes), len(clean))
    assert noisy.dtype == np.int64
    # the wrong ones spread evenly over the other classes
    offsets = np.bincount((noisy - clean)[noisy != clean] % classes, minlength=classes)[1:]
    assert offsets.max() - offsets.min() <= 8 * math.sqrt(offsets.mean())


@given(label=LABELS, rate=RATES, seed=st.integers(0, 2**32))
def test_uniform_is_pure(label, rate, seed):
    before = label.copy()
    noisy = uniform(label, 10, rate, generator(seed))
    np.testing.assert_array_equal(noisy, uniform(label, 10, rate, generator(seed)))
    np.testing.assert_array_equal(label, before)
    assert noisy.shape == label.shape
    assert np.all((noisy >= 0) & (noisy < 10))


@given(label=LABELS, rate=RATES, seed=st.integers(0, 2**32))
def test_asymmetric_changes_mapped_classes_to_their_target_only(label, rate, seed):
    before = label.copy()
    noisy = asymmetric(label, CIFAR10_CONFUSIONS, rate, generator(seed))
    np.testing.assert_array_equal(label, before)
    for given_label, now in zip(label.tolist(), noisy.tolist(), strict=True):
        assert now in (given_label, CIFAR10_CONFUSIONS.get(given_label, given_label))


def test_asymmetric_rate_holds_in_every_mapped_class():
    clean = np.arange(50_000) % 10
    noisy = asymmetric(clean, CIFAR10_CONFUSIONS, 0.4, generator())
    for k in range(10):
        changed = np.mean(noisy[clean == k] != k)
        assert within_binomial(changed, 0.4 if k in CIFAR10_CONFUSIONS else 0.0, 5000)
    everything = asymmetric(clean, CIFAR10_CONFUSIONS, 1.0, generator())
    np.testing.assert_array_equal(everything[clean == 3], 5)
    np.testing.assert_array_equal(everything[clean == 5], 3)


@pytest.mark.parametrize("others", [2, 30])
def test_open_set_replaces_the_share_asked(others):
    images = np.zeros((20, 8, 8, 3), np.uint8)
    other = np.stack([np.full((16, 12, 3), 1 + m, np.uint8) for m in range(others)])
    mixed, replaced = open_set(images, other, 0.35, generator())
    assert replaced.sum() == 7
    assert mixed.shape == images.shape
    assert not images.any()
    np.testing.assert_array_equal(mixed.any(axis=(1, 2, 3)), replaced)
    # none is used twice while there are enough
    assert len(np.unique(mixed[replaced][:, 0, 0, 0])) == (7 if others >= 7 else 2)


def test_label_arrays_are_read_from_npy_npz_and_any_filesystem(tmp_path):
    label = np.array([3, 1, 2], np.uint8)
    np.save(tmp_path / "labels.npy", label)
    np.savez(tmp_path / "labels.npz", worse=label, aggre=label + 1)
    np.testing.assert_array_equal(read_label_array(f"{tmp_path}/labels.npy"), label)
    read = read_label_array(f"file://{tmp_path}/labels.npz:aggre")
    np.testing.assert_array_equal(read, label + 1)
    assert read.dtype == np.int64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.npy", "no label array at .*absent.npy: check the path"),
        ("labels.npz:wurst", r"no label array wurst in .*\(worse, aggre\)"),
        ("labels.npz", r"several label arrays in .*\(worse, aggre\)"),
        ("objects.npy", "cannot read label array .*allow_pickle=False"),
        ("text.npy", "cannot read label array"),
        ("empty.npz:worse", "cannot read label array"),
        ("floats.npy", "give whole numbers in one row"),
        ("square.npy", "give whole numbers in one row"),
        ("nowhere://labels.npy", "cannot read label array"),
    ],
)
def test_label_array_errors_are_one_line(tmp_path, name, message):
    label = np.array([3, 1, 2])
    np.savez(tmp_path / "labels.npz", worse=label, aggre=label)
    np.save(tmp_path / "objects.npy", np.array([{}, {}], object))
    np.save(tmp_path / "floats.npy", label * 0.5)
    np.save(tmp_path / "square.npy", label[:, None])
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "empty.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=message) as error:
        read_label_array(name if "://" in name else f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "uniform", "rate": 1.5}, "rate is 1.5"),
        ({"kind": "uniform", "rate": -0.1}, "rate is -0.1"),
        ({"kind": "uniform", "rate": float("nan")}, "rate is nan"),
        ({"rate": 0.8}, "kind none has no rate"),
        ({"kind": "labels"}, "labels needs a source"),
        ({"kind": "open_set", "rate": 0.2}, "open_set needs a source"),
        ({"kind": "uniform", "source": "a.npy"}, "reads no source"),
    ],
)
def test_noise_refuses_fields_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=message):
        Noise(**fields)


def test_note_states_the_rate_asked_and_measured():
    clean = np.zeros(1000, np.int64)
    noisy = np.where(np.arange(1000) < 724, 1, 0)
    assert noise_note(Noise("uniform", 0.8), noisy, clean) == "noise: uniform 0.80 asked, 72.4 % of labels really wrong"
    note = noise_note(Noise("labels", source="n.npz:worse"), noisy, clean)
    assert note == "noise: labels n.npz:worse, 72.4 % of labels really wrong"
