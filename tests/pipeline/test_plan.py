import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import Plan, Purpose, generator, key, probe_rows, rows

SEEDS = st.integers(0, 2**32 - 1)


@given(count=st.integers(1, 40), seed=SEEDS, epoch=st.integers(0, 10**6), cuts=st.sets(st.integers(1, 79), max_size=4))
def test_any_split_of_the_stream_reads_every_row_once_an_epoch(count, seed, epoch, cuts):
    begin, end = epoch * count, (epoch + 2) * count
    bounds = [begin, *sorted(begin + cut for cut in cuts if begin + cut < end), end]
    parts = [rows(count, seed, start, stop) for start, stop in itertools.pairwise(bounds)]
    epochs, order = (np.concatenate(column) for column in zip(*parts, strict=True))
    np.testing.assert_array_equal(epochs, np.repeat([epoch, epoch + 1], count))
    for half in (order[:count], order[count:]):
        np.testing.assert_array_equal(np.sort(half), np.arange(count))
    whole = rows(count, seed, begin, end)
    np.testing.assert_array_equal(epochs, whole[0])
    np.testing.assert_array_equal(order, whole[1])
    assert epochs.dtype == order.dtype == np.int64


@given(count=st.integers(1, 20), start=st.integers(0, 100))
def test_an_empty_stretch_reads_nothing(count, start):
    assert [column.tolist() for column in rows(count, 0, start, start)] == [[], []]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [rows(30, seed, 30 * epoch, 30 * epoch + 30)[1] for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    first = [rows(30, 0, 30 * epoch, 30 * epoch + 1)[1][0] for epoch in range(3_000)]
    counts = np.bincount(first, minlength=30)  # each row leads an epoch equally often: 100 ± 5 standard deviations
    assert abs(counts - 100).max() < 5 * np.sqrt(100 * 29 / 30)


@given(draws=st.sets(st.tuples(SEEDS, st.sampled_from(Purpose), st.integers(0, 2**40)), min_size=2, max_size=50))
def test_keys_are_distinct_and_fit_philox(draws):
    keys = [key(*draw) for draw in draws]
    assert len(set(keys)) == len(draws)
    assert all(0 <= each < 2**128 for each in keys)


def test_keys_of_neighbouring_counters_are_distinct():
    draws = list(itertools.product(range(8), Purpose, range(300)))
    assert len({key(*draw) for draw in draws}) == len(draws)
    assert len(set(Purpose)) == 5
    assert generator(1, Purpose.VIEWS, 2).integers(2**62) == generator(1, Purpose.VIEWS, 2).integers(2**62)


@given(
    per_class=st.lists(st.integers(1, 6), min_size=2, max_size=8),
    size=st.integers(1, 40),
    seed=SEEDS,
    group=st.integers(0),
)
def test_probe_rows_are_balanced_and_repeat_only_where_they_must(per_class, size, seed, group):
    label_N = np.random.default_rng(0).permutation(np.repeat(np.arange(len(per_class)) * 3, per_class))
    chosen = probe_rows(label_N, size, seed, group % 2**40)
    assert chosen.shape == (size,)
    assert chosen.dtype == np.int64
    counts = [int(np.sum(label_N[chosen] == 3 * k)) for k in range(len(per_class))]
    assert max(counts) - min(counts) <= 1
    for row in range(len(label_N)):
        of_class = int(np.sum(label_N == label_N[row]))
        drawn = int(np.sum(label_N[chosen] == label_N[row]))
        assert drawn // of_class <= np.sum(chosen == row) <= -(-drawn // of_class)


def test_probe_rows_differ_by_group_and_use_every_row():
    label_N = np.repeat(np.arange(4), 5)
    batches = [probe_rows(label_N, 8, 0, group) for group in range(60)]
    assert len({tuple(batch) for batch in batches}) > 55
    assert set(np.concatenate(batches)) == set(range(20))
    np.testing.assert_array_equal(batches[7], probe_rows(label_N, 8, 0, 7))
    # classes that come up once more than others are not always the same
    odd = [label_N[probe_rows(label_N, 1, 0, group)[0]] for group in range(60)]
    assert set(odd) == {0, 1, 2, 3}


PLANS = st.builds(
    lambda lanes, group, start, length, chunk, examples: Plan(
        examples, 5, lanes * group, group, start, start + length, chunk
    ),
    lanes=st.sampled_from([1, 2, 3, 4, 6]),
    group=st.integers(1, 4),
    start=st.integers(0, 30),
    length=st.integers(0, 25),
    chunk=st.integers(1, 9),
    examples=st.integers(1, 30),
)


@given(plan=PLANS)
def test_blocks_cover_every_group_once(plan):
    groups = [group for block in range(plan.blocks) for group in plan.groups_of(block)]
    assert sorted(groups) == list(range(plan.start * plan.lanes, plan.stop * plan.lanes))
    for block in range(plan.blocks):
        held = plan.groups_of(block)
        assert 1 <= len(held) <= plan.chunk
        assert len({group % plan.lanes for group in held}) == 1  # one lane a block


@given(plan=PLANS)
def test_the_groups_of_a_step_are_its_slice_of_the_stream(plan):
    for step in range(plan.start, min(plan.stop, plan.start + 3)):
        parts = [plan.rows_of(step * plan.lanes + lane) for lane in range(plan.lanes)]
        expected = rows(plan.examples, plan.seed, step * plan.batch, (step + 1) * plan.batch)
        for column in (0, 1):
            np.testing.assert_array_equal(np.concatenate([part[column] for part in parts]), expected[column])


@given(plan=PLANS, workers=st.sampled_from([1, 2, 3, 6]))
def test_by_step_puts_round_robin_blocks_back_into_step_order(plan, workers):
    if plan.lanes % workers:
        workers = plan.lanes
    for worker in range(workers):
        stream = [group for block in range(worker, plan.blocks, workers) for group in plan.groups_of(block)]
        mine = [
            [step * plan.lanes + lane for lane in range(worker, plan.lanes, workers)]
            for step in range(plan.start, plan.stop)
        ]
        left = iter(stream)
        assert list(plan.by_step(left, workers)) == mine
        assert not list(left)


@given(plan=PLANS, later=st.integers(0, 25))
def test_a_plan_resumed_later_reads_the_same_groups(plan, later):
    start = min(plan.start + later, plan.stop)
    resumed = Plan(plan.examples, plan.seed, plan.batch, plan.group, start, plan.stop, plan.chunk)

    def steps(of: Plan) -> list[list[int]]:
        return list(of.by_step((group for block in range(of.blocks) for group in of.groups_of(block)), 1))

    assert steps(resumed) == steps(plan)[start - plan.start :]


@pytest.mark.parametrize("field", ["examples", "chunk"])
def test_plans_are_frozen(field):
    with pytest.raises(AttributeError):
        setattr(Plan(1, 0, 1, 1, 0, 1, 1), field, 2)
