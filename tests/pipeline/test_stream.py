"""The stream through real Ray Data: same rows, same views, same order, whatever the number of workers and actors."""

import numpy as np
import pytest
import ray

from pipeline.dataset import Examples
from pipeline.plan import Plan
from pipeline.stream import groups, make_group, preserved_order, stream
from pipeline.views import DigitsViews


@pytest.fixture(scope="module")
def examples() -> Examples:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 8, 8, 1), np.uint8)
    return Examples(np.arange(37) * 10, rng.integers(0, 10, 37), image)


def test_a_group_depends_on_seed_and_number_only(examples):
    plan = Plan(37, seed=3, batch=20, group=5, start=0, stop=9, chunk=2)
    later = Plan(37, seed=3, batch=20, group=5, start=4, stop=30, chunk=7)
    first, again = make_group(examples, DigitsViews(), plan, 17), make_group(examples, DigitsViews(), later, 17)
    other = make_group(examples, DigitsViews(), Plan(37, 4, 20, 5, 0, 9, 2), 17)
    for column in first:
        np.testing.assert_array_equal(first[column], again[column])
    assert not np.array_equal(first["strong"], other["strong"])
    np.testing.assert_array_equal(first["label"], examples.label_N[first["id"] // 10])


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_gets_its_lanes_in_plan_order(examples, local_ray, workers):
    plan = Plan(37, seed=3, batch=20, group=5, start=2, stop=9, chunk=3)
    dataset = stream(ray.put(examples), DigitsViews(), plan, actors=2)
    dataset.context.execution_options = preserved_order()
    shards = dataset.streaming_split(workers, equal=True)

    @ray.remote(num_cpus=0)
    def consume(shard):
        return [
            [{name: np.array(column) for name, column in group.items()} for group in step]
            for step in plan.by_step(groups(shard, plan), workers)
        ]

    received = ray.get([consume.remote(shard) for shard in shards])
    for rank, steps in enumerate(received):
        assert len(steps) == 7
        for step, held in enumerate(steps, start=2):
            expected = [step * 4 + lane for lane in range(rank, 4, workers)]
            assert [int(group["group"][0]) for group in held] == expected
            for number, group in zip(expected, held, strict=True):
                for column, values in make_group(examples, DigitsViews(), plan, number).items():
                    np.testing.assert_array_equal(group[column], values)
