from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import Dataset, Examples, HeldOut, InputError, draw_probe
from pipeline.digits import Digits


def examples(ids: range, label: list[int], true: list[int] | None = None) -> Examples:
    images = np.zeros((len(ids), 4, 4, 1), np.uint8)
    return Examples(np.array(ids), np.array(label), images, None if true is None else np.array(true))


def good() -> Dataset:
    return Dataset(
        train=examples(range(4), [0, 1, 2, 0], [0, 1, 1, 1]),
        probe=examples(range(4, 7), [0, 1, 2]),
        tests={"test": examples(range(10, 12), [2, 1])},
        class_names=("ant", "bee", "cat"),
    )


def test_a_good_data_set_passes_and_knows_its_noise():
    data = good()
    assert data.check() is data
    assert data.noise_rate == 0.5
    assert replace(data, train=data.tests["test"]).noise_rate is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ("ant",)}, "1 class; classification needs 2"),
        ({"train": examples(range(0), [])}, "train set is empty"),
        ({"tests": {"test": examples(range(0), [])}}, "test set is empty"),
        ({"train": replace(good().train, id_N=np.array([0, 1, 1, 2]))}, "train set repeats example ids"),
        ({"train": examples(range(2), [0, -1])}, "train set has label -1, outside 0…2"),
        ({"tests": {"test": examples(range(10, 12), [0, 3])}}, "test set has label 3, outside 0…2"),
        ({"probe": examples(range(4, 6), [0, 2])}, "no trusted example of class bee"),
        ({"train": examples(range(1, 5), [0, 1, 2, 0])}, r"1 probe ids are also in the train set \(first: 4\)"),
        ({"tests": {"test": examples(range(6, 8), [0, 1])}}, r"1 probe ids are also in the test set \(first: 6\)"),
    ],
)
def test_check_names_what_is_wrong(change, message):
    with pytest.raises(InputError, match=message):
        replace(good(), **change).check()


def test_take_keeps_rows_together():
    taken = good().train.take(np.array([2, 0]))
    assert taken.id_N.tolist() == [2, 0]
    assert taken.label_N.tolist() == [2, 0]
    assert taken.true_label_N is not None
    assert taken.true_label_N.tolist() == [1, 0]
    assert len(taken) == len(taken.image_N) == 2


@given(per_class=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_draw_probe_is_balanced_sorted_and_repeatable(per_class, seed):
    label = np.random.default_rng(7).permutation(np.arange(15) % 3)
    rows = draw_probe(label, 3, per_class, np.random.default_rng(seed))
    assert np.bincount(label[rows], minlength=3).tolist() == [per_class] * 3
    assert np.all(np.diff(rows) > 0)
    np.testing.assert_array_equal(rows, draw_probe(label, 3, per_class, np.random.default_rng(seed)))


@pytest.mark.parametrize(("per_class", "message"), [(0, "at least 1"), (2, "class 1 has 2 examples, too few")])
def test_draw_probe_refuses_what_it_cannot_draw(per_class, message):
    with pytest.raises(InputError, match=message):
        draw_probe(np.array([0, 0, 0, 1, 1]), 2, per_class, np.random.default_rng(0))


def trusted(per_class: list[int]) -> Dataset:
    label = [k for k, count in enumerate(per_class) for _ in range(count)]
    return replace(good(), probe=examples(range(100, 100 + len(label)), label), class_names=("ant", "bee", "cat"))


@given(st.lists(st.integers(2, 150), min_size=3, max_size=3), st.integers(0, 120), st.integers(0, 100))
def test_held_out_examples_are_trusted_ones_that_train_nothing(per_class, wanted, seed):
    data, expected = trusted(per_class), wanted or min(min(per_class) // 2, 50)
    if expected >= min(per_class):
        with pytest.raises(InputError, match="too few to hold out"):
            data.held_out(wanted, seed)
        return
    held = data.held_out(wanted, seed)
    (validation,) = held.tests.values()
    assert list(held.tests) == ["validation"]
    assert np.bincount(validation.label_N).tolist() == [expected] * 3
    assert sorted([*held.probe.id_N, *validation.id_N]) == data.probe.id_N.tolist()
    assert held.train is data.train
    assert held.digest == data.held_out(wanted, seed).digest


def test_one_trusted_example_of_a_class_validates_nothing():
    with pytest.raises(InputError, match="a class has 1 trusted examples, too few to hold out 1"):
        good().held_out(0, 0)


def test_held_out_wraps_a_source():
    source = HeldOut(Digits(probe_per_class=4), per_class=1)
    held, plain = source.load("", 3), Digits(probe_per_class=4).load("", 3)
    assert (len(held.tests["validation"]), len(held.probe)) == (10, 30)
    assert set(held.tests["validation"].id_N) < set(plain.probe.id_N)
    assert source.views == Digits().views
