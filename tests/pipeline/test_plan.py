import itertools
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import BLOCK_BYTES, BLOCK_ROWS, Plan, Purpose, chunk_of, generator, key, probe_rows

SEEDS = st.integers(0, 2**32 - 1)


def in_steps(plan: Plan) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(epoch, row) of every group of the plan, by group number."""
    found = {}
    for block in range(plan.blocks):
        for group, epoch_G, row_G in zip(plan.groups_of(block), *plan.rows_of(block), strict=True):
            assert group not in found
            found[group] = (epoch_G, row_G)
    return dict(sorted(found.items()))


@given(draws=st.sets(st.tuples(SEEDS, st.sampled_from(Purpose), st.integers(0, 2**40)), min_size=2, max_size=50))
def test_keys_are_distinct_and_fit_philox(draws):
    keys = [key(*draw) for draw in draws]
    assert len(set(keys)) == len(draws)
    assert all(0 <= each < 2**128 for each in keys)


def test_keys_of_neighbouring_counters_are_distinct():
    draws = list(itertools.product(range(8), Purpose, range(300)))
    assert len({key(*draw) for draw in draws}) == len(draws)
    assert len(set(Purpose)) == 6
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
    lambda places, group, start, length, chunk, row_groups: Plan(
        np.array(row_groups), 5, places * group, group, 0, start, start + length, chunk
    ),
    places=st.sampled_from([1, 2, 3, 4, 6]),
    group=st.integers(1, 4),
    start=st.integers(0, 30),
    length=st.integers(0, 25),
    chunk=st.integers(1, 9),
    row_groups=st.lists(st.integers(1, 5), min_size=1, max_size=12),
)


@given(plan=PLANS)
def test_blocks_cover_every_group_once(plan):
    groups = [group for block in range(plan.blocks) for group in plan.groups_of(block)]
    assert sorted(groups) == list(range(plan.start * plan.groups, plan.stop * plan.groups))
    for block in range(plan.blocks):
        held = plan.groups_of(block)
        assert 1 <= len(held) <= plan.chunk
        assert len({group % plan.groups for group in held}) == 1  # one place a block


@given(plan=PLANS, epochs=st.integers(1, 3))
def test_every_row_once_an_epoch(plan, epochs):
    whole = replace(plan, start=0, stop=-(-epochs * plan.examples // plan.batch))
    groups = in_steps(whole).values()
    epoch, row = (np.concatenate(column) for column in zip(*groups, strict=True))
    # The stream's places e·N … e·N + N − 1 are epoch e, whatever the batch and the block.
    np.testing.assert_array_equal(epoch, np.arange(len(epoch)) // plan.examples)
    for e in range(epochs):
        np.testing.assert_array_equal(np.sort(row[epoch == e]), np.arange(plan.examples))


@given(plan=PLANS, later=st.integers(0, 25), beyond=st.integers(0, 9))
def test_a_plan_resumed_later_or_run_longer_reads_the_same_rows(plan, later, beyond):
    resumed = replace(plan, start=min(plan.start + later, plan.stop), stop=plan.stop + beyond)
    before, after = in_steps(plan), in_steps(resumed)
    for group in before.keys() & after.keys():
        for one, other in zip(before[group], after[group], strict=True):
            np.testing.assert_array_equal(one, other)
    assert set(after) == set(range(resumed.start * plan.groups, resumed.stop * plan.groups))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        plan = Plan(np.full(10, 3), seed, 10, 5, 0, 3 * epoch, 3 * epoch + 3, 1)
        return tuple(np.concatenate([row_G for _, row_G in in_steps(plan).values()]))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_each_row_leads_an_epoch_equally_often():
    epochs = 3_000
    plan = Plan(np.full(6, 5), 0, 30, 30, 0, 0, epochs, 1)
    first = [int(plan.rows_of(block)[1][0, 0]) for block in range(epochs)]
    counts = np.bincount(first, minlength=30)  # 100 each, ± 5 standard deviations
    assert abs(counts - 100).max() < 5 * np.sqrt(100 * 29 / 30)


def test_a_row_group_is_read_by_one_block_or_two_at_an_edge():
    plan = Plan(np.full(256, 16), 3, batch=128, group=32, probe=0, start=0, stop=32, chunk=4)
    readers: dict[int, set[int]] = {}
    for block in range(plan.blocks):
        for group in np.unique(plan.rows_of(block)[1] // 16):
            readers.setdefault(int(group), set()).add(block)
    assert max(map(len, readers.values())) == 1  # 128 rows a block are 8 whole row groups
    uneven = replace(plan, row_groups=np.full(400, 10), stop=31)
    read = sum(len(np.unique(uneven.rows_of(block)[1] // 10)) for block in range(uneven.blocks))
    assert read <= 31 * 128 / 10 + uneven.blocks + 1


def test_neighbours_in_a_row_group_are_mixed_over_steps():
    plan = Plan(np.full(256, 16), 3, batch=128, group=32, probe=0, start=0, stop=32, chunk=4)
    step = np.concatenate([row_G for group, (_, row_G) in in_steps(plan).items() if group < 4])
    # 128 rows come from the 32 row groups of four blocks, four of each on average, never most of one.
    assert len(np.unique(step // 16)) > 25
    assert np.bincount(step // 16).max() <= 12


@pytest.mark.slow
def test_a_million_rows_are_planned_and_resumed_at_once():
    rows, batch = 1_000_000, 256
    tracemalloc.start()
    started = time.perf_counter()
    plan = Plan(np.full(rows // 16, 16), 0, batch, 32, 32, 0, rows // batch, 4)
    seen = np.zeros(rows + batch, np.int32)
    for block in range(plan.blocks):
        np.add.at(seen, plan.rows_of(block)[1].reshape(-1), 1)
    assert (seen[:rows] == 1).sum() == plan.stop * batch
    resumed = replace(plan, start=700_000 // batch)
    block = plan.blocks - resumed.blocks
    np.testing.assert_array_equal(resumed.rows_of(0)[1], plan.rows_of(block)[1][resumed.start % 4 :])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6
    print(f"\nplanned an epoch of a million rows in {time.perf_counter() - started:.2f} s, {peak / 1e6:.0f} MB")


@given(plan=PLANS, workers=st.sampled_from([1, 2, 3, 6]))
def test_by_step_puts_round_robin_blocks_back_into_step_order(plan, workers):
    if plan.groups % workers:
        workers = plan.groups
    for worker in range(workers):
        stream = [group for block in range(worker, plan.blocks, workers) for group in plan.groups_of(block)]
        mine = [
            [step * plan.groups + place for place in range(worker, plan.groups, workers)]
            for step in range(plan.start, plan.stop)
        ]
        left = iter(stream)
        assert list(plan.by_step(left, workers)) == mine
        assert not list(left)


def test_a_block_is_bounded_in_rows_and_bytes():
    assert chunk_of(50, 3 * 64) == BLOCK_ROWS // 50
    assert chunk_of(32, 3 * 224 * 224 * 3) * 32 * 3 * 224 * 224 * 3 <= BLOCK_BYTES
    assert chunk_of(32, 3 * 224 * 224 * 3) == 4
    assert chunk_of(5_000, 1) == chunk_of(1, 1 << 40) == 1


@pytest.mark.parametrize("field", ["row_groups", "chunk"])
def test_plans_are_frozen(field):
    with pytest.raises(AttributeError):
        setattr(Plan(np.ones(1, np.int64), 0, 1, 1, 0, 0, 1, 1), field, 2)
