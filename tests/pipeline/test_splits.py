import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import splits
from pipeline.dataset import InputError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, "train")
            for name in ("train", "TRAIN", "Training", "train2017", "trainset", "X_train", "train_noisy")
        ),
        *(
            (name, "test")
            for name in ("test", "Testing", "pets-test", "ImagesTest", "test-00001-of-00002", "test_images")
        ),
        *((name, "val") for name in ("valid", "Validation_set", "ILSVRC2012_img_val", "valid.2")),
        *((name, "probe") for name in ("probe", "Trusted")),
        *((name, "holdout") for name in ("hold-out", "held_out", "HoldOut", "holdout")),
        *(
            (name, None)
            for name in ("cat", "pretrain", "contest", "latest", "Étrain", "trainval", "a_train_b", "", "00")
        ),
        *((name, None) for name in ("train_test", "trainTest", "train_probe", "val-test")),
    ],
)
def test_a_name_is_the_split_that_its_first_or_last_word_means(name, split):
    assert splits.named(name) == split


@pytest.mark.parametrize(
    ("value", "split"),
    [
        ("Train", "train"),
        (" validation ", "val"),
        ("held-out", "holdout"),
        ("fold 1", "fold 1"),
        ("pets-test", "pets-test"),
    ],
)
def test_a_value_is_a_known_word_or_a_name_of_its_own(value, split):
    assert splits.of_value(value) == split


@pytest.mark.parametrize("value", ["", "n/a", "../up", ".x", "a\\b", "train1", "un-trusted", "x" * 65, "-", "\0"])
def test_what_cannot_be_the_name_of_a_split_is_none(value):
    assert splits.of_value(value) is None


@given(st.text(max_size=70))
def test_a_value_that_is_taken_can_be_part_of_a_file_s_name(value):
    split = splits.of_value(value)
    assert split is None or re.fullmatch(r"[^\W_][^/\\\0\n]*", split)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a", "b"], ["train", "train"]),
        (["train/0", "test/0"], ["train", "test"]),
        (["pets_train_0", "pets_train_1", "dev"], ["train", "train", "dev"]),
        (["train/train-0"], ["train"]),
    ],
)
def test_files_have_the_splits_of_their_names_or_folders(names, found):
    assert splits.of_files(names) == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "more"], "no split can be told from the name more, beside train: rename it after its split"),
        (["train_test"], "train_test is named like two splits"),
        (["train/test-0", "x"], "train/test-0 is named like two splits"),
        (["my_test"], "my_test is named like test, and there is no other"),
    ],
)
def test_files_whose_split_cannot_be_told_are_named(names, message):
    with pytest.raises(InputError, match=message):
        splits.of_files(names)
