"""The stream through real Ray Data: same rows, same views, same order, whatever the number of workers and actors."""

import tracemalloc
from dataclasses import replace

import cv2
import numpy as np
import pyarrow as pa
import pytest
import ray

from pipeline.dataset import Examples
from pipeline.plan import Plan
from pipeline.stream import REJECTED, groups, make_block, preserved_order, stream
from pipeline.views import DigitsViews, PhotoViews
from tests.pipeline.test_index import write

PLAN = Plan(np.ones(37, np.int64), seed=3, batch=20, group=5, probe=2, start=2, stop=9, chunk=3)


@pytest.fixture(scope="module")
def examples() -> Examples:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 8, 8, 1), np.uint8)
    return Examples(np.arange(37) * 10, rng.integers(0, 10, 37), image)


@pytest.fixture(scope="module")
def probe() -> Examples:
    rng = np.random.default_rng(1)
    return Examples(1000 + np.arange(20), np.arange(20) % 10, rng.integers(0, 256, (20, 8, 8, 1), np.uint8))


def groups_of(plan: Plan, examples: Examples, probe: Examples) -> dict[int, dict[str, np.ndarray]]:
    """Every group of the plan by its number, made in this process."""
    size, found = 2 * plan.group + plan.probe, {}
    for number in range(plan.blocks):
        block = make_block(examples, probe, DigitsViews(), plan, number)
        for place, group in enumerate(plan.groups_of(number)):
            rows = slice(place * size, (place + 1) * size)
            found[group] = {name: column[rows] for name, column in block.items()}
            assert set(found[group]["group"]) == {group}
    return found


def test_a_group_depends_on_seed_and_number_only(examples, probe):
    first = groups_of(PLAN, examples, probe)
    again = groups_of(replace(PLAN, start=4, stop=30), examples, probe)
    other = groups_of(replace(PLAN, seed=4), examples, probe)
    for number in range(4 * 4, 9 * 4):
        for column in first[number]:
            np.testing.assert_array_equal(first[number][column], again[number][column])
        assert not np.array_equal(first[number]["image"], other[number]["image"])


def test_a_group_holds_both_views_of_its_rows_and_its_share_of_a_balanced_probe_batch(examples, probe):
    made = groups_of(PLAN, examples, probe)
    for step in range(PLAN.start, PLAN.stop):
        of_step = [made[step * 4 + place] for place in range(4)]
        for group in of_step:
            np.testing.assert_array_equal(group["id"][:5], group["id"][5:10])
            np.testing.assert_array_equal(group["label"][:5], group["label"][5:10])
            np.testing.assert_array_equal(group["label"][:5], examples.label_N[group["id"][:5] // 10])
            np.testing.assert_array_equal(group["label"][10:], probe.label_N[group["id"][10:] - 1000])
            np.testing.assert_array_equal(group["row"][:10], group["id"][:10] // 10)
            assert set(group["epoch"][10:]) == set(group["row"][10:]) == {-1}
            assert not np.array_equal(group["image"][:5], group["image"][5:10])
        trusted = np.concatenate([group["label"][10:] for group in of_step])
        assert sorted(np.bincount(trusted, minlength=10)) == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_encoded_examples_are_decoded_into_the_same_views(examples, probe):
    rng = np.random.default_rng(2)
    image_NHWC = rng.integers(0, 256, (37, 20, 30, 3), np.uint8)
    encoded = pa.array([cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() for image in image_NHWC], pa.binary())
    in_memory, stored = replace(examples, image_N=image_NHWC), replace(examples, image_N=encoded)
    photos = PhotoViews(size=16)
    probe = in_memory.take(np.arange(10))
    ours, theirs = (make_block(each, probe, photos, PLAN, 1) for each in (in_memory, stored))
    for column in ours:
        np.testing.assert_array_equal(ours[column], theirs[column])
    assert ours["image"].shape == (12, 16, 16, 3)  # the first block holds step 2 only


def test_a_poisoned_image_is_grey_and_told_and_nothing_else_moves(probe, capsys, monkeypatch):
    counted = []
    monkeypatch.setattr(REJECTED, "inc", lambda: counted.append(1))
    rng = np.random.default_rng(2)
    images = [cv2.imencode(".png", image)[1].tobytes() for image in rng.integers(0, 256, (37, 20, 30, 3), np.uint8)]
    grey = cv2.imencode(".png", np.full((20, 30, 3), 128, np.uint8))[1].tobytes()
    (_, row_SG), photos = PLAN.rows_of(1), PhotoViews(size=16)
    bad = row_SG[0, 2]  # of the first group of the block
    healthy, greyed, poisoned = (
        Examples(np.arange(37) * 10, np.arange(37) % 10, pa.array([*images[:bad], at_bad, *images[bad + 1 :]]))
        for at_bad in (images[bad], grey, images[bad][:50])
    )
    trusted = healthy.take(np.setdiff1d(np.arange(37), [bad]))
    expected, made = (make_block(each, trusted, photos, PLAN, 1) for each in (greyed, poisoned))
    for column in expected:
        np.testing.assert_array_equal(made[column], expected[column])
    assert (made["image"][2] == 128).all()
    assert capsys.readouterr().out == f"warning: the image of example {bad * 10} is damaged: trained on as plain grey\n"
    assert counted == [1]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_gets_its_groups_in_plan_order(examples, probe, local_ray, workers):
    dataset = stream(ray.put(examples), ray.put(probe), DigitsViews(), PLAN, actors=2)
    dataset.context.execution_options = preserved_order()
    shards = dataset.streaming_split(workers, equal=True)

    @ray.remote(num_cpus=0)
    def consume(shard):
        return [
            [{name: np.array(column) for name, column in group.items()} for group in step]
            for step in PLAN.by_step(groups(shard, PLAN), workers)
        ]

    received = ray.get([consume.remote(shard) for shard in shards])
    made = groups_of(PLAN, examples, probe)
    for rank, steps in enumerate(received):
        assert len(steps) == 7
        for step, held in enumerate(steps, start=2):
            for place, group in zip(range(rank, 4, workers), held, strict=True):
                for column, values in made[step * 4 + place].items():
                    np.testing.assert_array_equal(group[column], values)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path, probe):
    def peak(shards: int) -> int:
        index = write(f"{tmp_path}/{shards}", {"train": [32] * shards}, encoded=photo)
        train = index.of(f"{tmp_path}/{shards}", "train")
        plan = Plan(train.row_groups, 3, batch=16, group=8, probe=2, start=0, stop=2 * shards, chunk=4)
        tracemalloc.start()
        for block in range(plan.blocks):
            make_block(train, pictures, PhotoViews(size=128), plan, block)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    image_NHWC = np.random.default_rng(2).integers(0, 256, (10, 20, 30, 3), np.uint8)
    photo = cv2.imencode(".jpg", image_NHWC[0])[1].tobytes()
    pictures = Examples(np.arange(10), np.arange(10), image_NHWC)
    peak(2)  # whatever is made once
    assert peak(50) < 1.1 * peak(5)
