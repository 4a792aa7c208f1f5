"""Stored features: read back as they were written, by fold, and as groups that a worker makes by itself.

Shapes: N examples, V random views, D numbers of an embedding.
"""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import features, sources, storage
from pipeline.dataset import HeldOut, InputError
from pipeline.digits import Digits
from pipeline.features import ROW_GROUP, Embedded, Features, FeatureViews, Made, of_features
from pipeline.index import FEATURES, NAME, Index, Sharded, Shards
from pipeline.plan import Plan, Purpose, generator
from pipeline.stream import groups_here, make_block
from pipeline.unlabelled import Seen

WIDTH, CLASSES = 6, 3
COUNTS = {"probe": 12, "test": 30, "train": 2 * ROW_GROUP + 45}


def true_of(count: int) -> np.ndarray:
    """The true classes of a split's rows, in no order that folds could follow."""
    return np.random.default_rng(5).permutation(np.arange(count) % CLASSES)


def write(folder: Path | str, looks: int = 2, counts: dict[str, int] | None = None, width: int = WIDTH) -> Index:
    """Write features whose classes lie apart, training labels a third wrong, and their index."""
    os.makedirs(folder, exist_ok=True)
    how = Made("test_resnet", "0" * 64, 32, 0.9, "bicubic", width, looks, 0)
    rng, shards, first = np.random.default_rng(0), [], 0
    centre_KD = 3 * np.random.default_rng(7).standard_normal((CLASSES, width))
    for split, count in (counts or COUNTS).items():
        true_N = true_of(count)
        wrong_N = (split == "train") & (rng.random(count) < 1 / 3)
        label_N = np.where(wrong_N, (true_N + 1) % CLASSES, true_N)
        columns = {
            "id": first + np.arange(count),
            "key": [f"{split}/{number}" for number in range(count)],
            "label": label_N.astype(np.int32),
            "split": [split] * count,
            "trusted": [split != "train"] * count,
        }
        for name in how.columns:
            value_ND = centre_KD[true_N] + rng.standard_normal((count, width))
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(value_ND.astype(np.float16).ravel()), width)
        table = pa.table(columns).cast(how.schema)
        shards.append(features.write_shard(f"{folder}/{split}-00000-of-00001.parquet", table, CLASSES))
        first += count
    index = Index("custom", "0", ("ant", "bee", "cat"), tuple(shards), 0, {FEATURES: asdict(how)}, ROW_GROUP)
    storage.write(*storage.connect(storage.join(str(folder), NAME)), index.as_json().encode())
    return index


def test_a_data_set_of_features_is_what_was_written(tmp_path):
    index = write(tmp_path)
    dataset = of_features(Sharded("custom"), str(tmp_path)).load(str(tmp_path), seed=0)
    assert dataset.class_names == index.class_names
    assert {"train": len(dataset.train), "probe": len(dataset.probe), "test": len(dataset.tests["test"])} == COUNTS
    held = dataset.train.take(np.array([300, 5]))
    assert held.image_N.shape == (2, 1, 3, WIDTH)
    assert held.image_N.dtype == np.float16
    table = index.of(str(tmp_path), "train").table(np.array([300, 5]), ["id", "embedding", "look_2"])
    assert held.id_N.tolist() == table["id"].to_pylist()
    np.testing.assert_array_equal(held.image_N[:, 0, 0], np.array(table["embedding"].to_pylist(), np.float16))
    np.testing.assert_array_equal(held.image_N[:, 0, 2], np.array(table["look_2"].to_pylist(), np.float16))


def test_what_holds_no_such_features_is_refused(tmp_path):
    index = write(tmp_path)
    with pytest.raises(InputError, match="holds 6 numbers an image of custom, not 8 of custom"):
        Features("custom", 8).load(str(tmp_path), 0)
    with pytest.raises(InputError, match="has none of the sets val, only probe, test, train"):
        Features("custom", WIDTH, ("val",)).load(str(tmp_path), 0)
    with pytest.raises(InputError, match="digits has images, not features"):
        of_features(Digits(), str(tmp_path))
    of_images = Index("custom", "0", index.class_names, index.shards)
    storage.write(*storage.connect(f"{tmp_path}/{NAME}"), of_images.as_json().encode())
    with pytest.raises(InputError, match="holds images, not features: make these first"):
        of_features(Sharded("custom"), str(tmp_path))
    with pytest.raises(InputError, match=r"dataset\.fold is 3 of 3"):
        Features("custom", WIDTH, folds=3, fold=3)


def test_a_sweep_s_source_of_features_goes_to_json_and_back(tmp_path):
    write(tmp_path)
    source = of_features(HeldOut(Sharded("custom"), 2), str(tmp_path))
    assert source == HeldOut(Features("custom", WIDTH), 2)
    assert source.direct
    assert sources.from_json(sources.to_json(source)) == source
    assert len(source.load(str(tmp_path), 0).probe) == COUNTS["probe"] - 2 * CLASSES


@given(units=st.lists(st.integers(1, 9), min_size=1, max_size=5), folds=st.integers(2, 5), fold=st.integers(0, 4))
def test_a_fold_and_the_others_are_all_rows_once(units, folds, fold):
    class Rows(Shards):
        def __len__(self):
            return sum(units)

        @property
        def row_groups(self):
            return np.array(units)

    fold %= folds
    inside, outside = (Embedded(Rows("", (), ROW_GROUP), (), folds, fold, inside=inside) for inside in (True, False))
    total, ends = sum(units), np.cumsum(units)
    stored = {True: inside.stored(np.arange(len(inside))), False: outside.stored(np.arange(len(outside)))}
    assert sorted([*stored[True], *stored[False]]) == list(range(total))
    assert all(stored[True] % folds == fold)
    for held, part in ((inside, stored[True]), (outside, stored[False])):
        assert np.all(np.diff(part) > 0)
        np.testing.assert_array_equal(
            held.row_groups, np.bincount(np.searchsorted(ends, part, "right"), minlength=len(units))
        )


@pytest.mark.parametrize("looks", [1, 2, 4])
def test_two_different_looks_are_drawn_where_there_are_two(looks):
    image_HWC, views, pairs = np.arange(looks).reshape(1, looks, 1), FeatureViews(), set()
    for number in range(200):
        weak, strong = views.pair(image_HWC, np.random.default_rng(number))
        assert weak.shape == strong.shape == (1, 1, 1)
        np.testing.assert_array_equal(weak, views.weak(image_HWC, np.random.default_rng(number)))
        pairs.add((int(weak[0, 0, 0]), int(strong[0, 0, 0])))
    expected = {(a, b) for a in range(looks) for b in range(looks) if a != b} or {(0, 0)}
    assert pairs == expected
    assert views.test(image_HWC).item() == 0


def test_a_worker_s_own_groups_are_those_of_the_blocks_in_order(tmp_path):
    write(tmp_path)
    dataset = of_features(Sharded("custom"), str(tmp_path)).load(str(tmp_path), seed=0)
    plan = Plan(dataset.train.row_groups, seed=3, batch=40, group=10, probe=2, start=3, stop=29, chunk=5)
    views, size = FeatureViews(), 22
    for workers in (1, 2):
        for rank in range(workers):
            made = list(groups_here(dataset.train, dataset.probe, views, plan, rank, workers))
            expected = [
                {name: column[start : start + size] for name, column in block.items()}
                for block in (
                    make_block(dataset.train, dataset.probe, views, plan, number)
                    for number in range(rank, plan.blocks, workers)
                )
                for start in range(0, len(block["id"]), size)
            ]
            assert len(made) == len(expected)
            for ours, theirs in zip(made, expected, strict=True):
                for name in theirs:
                    np.testing.assert_array_equal(ours[name], theirs[name])


def test_random_views_depend_on_the_image_alone(tmp_path):
    rng = np.random.default_rng(0)
    image_NHWC = rng.integers(0, 256, (3, 40, 50, 3), np.uint8)
    how = Made("test_resnet", "0" * 64, 16, 0.9, "bilinear", WIDTH, 2, 5)
    ids = pa.table({"row": [0, 1, 2]})

    def read(some: pa.Table):
        for row in some["row"].to_pylist():
            yield Seen(row + 70, str(row), image_NHWC[row], row, "train", False)

    whole, last = features.looks_of(ids, read, how), features.looks_of(ids.slice(2), read, how)
    assert whole["image"].shape == (3, 3, 16, 16, 3)
    np.testing.assert_array_equal(whole["image"][2:], last["image"])
    np.testing.assert_array_equal(whole["image"][1, 0], how.views.test(image_NHWC[1]))
    keyed = generator(5, Purpose.VIEWS, 71)
    np.testing.assert_array_equal(whole["image"][1, 1], how.views.weak(image_NHWC[1], keyed))
    assert not np.array_equal(whole["image"][1, 1], whole["image"][1, 2])
