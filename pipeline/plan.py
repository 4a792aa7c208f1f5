"""PURE: the order in which examples are read, and the key of every random draw, from counters alone.

The stream is endless: epoch after epoch, each an order of the N rows. Step t takes rows t·B … t·B + B − 1 of it, cut
into groups of G: the same on any number of workers, and resumed anywhere by arithmetic.

Rows are read by whole row groups (a Parquet file's; in memory each row is one), in an order drawn anew for every epoch.
A block of the stream takes its rows from consecutive row groups of that order, so that each is read by one block, at
most two, and mixes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# 2G + P rows, one a view: the G weak ones, the G strong ones, the P of trusted images. `image` is uint8; `group`, `id`,
# `label`, and `epoch` and `row` in the training set (−1 for trusted images) are int64.
Group = Mapping[str, np.ndarray]

BLOCK_ROWS, BLOCK_BYTES = 1024, 64 << 20  # the most of a block: Ray Data pays 10–20 ms for each, and splits 128 MB


class Purpose(IntEnum):
    """Say what a random draw is for: each purpose has its own independent stream."""

    ORDER = 1
    VIEWS = 2
    PROBE = 3
    PROBE_VIEWS = 4
    MIXUP = 5
    MIX = 6


def key(seed: int, purpose: Purpose, counter: int) -> int:
    """Return a 128-bit key for a counter-based generator (Philox), distinct for every (seed, purpose, counter)."""
    high, low = np.random.SeedSequence((seed, purpose, counter)).generate_state(2, np.uint64)
    return int(high) << 64 | int(low)


def generator(seed: int, purpose: Purpose, counter: int) -> np.random.Generator:
    """Return the generator behind `key`."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, counter)))


def probe_rows(label_N: np.ndarray, size: int, seed: int, step: int) -> np.ndarray:
    """Return class-balanced rows of the probe set for one step's whole batch, int64; its groups take equal shares in
    order.

    Classes take turns from a random start; within a class, rows are drawn without replacement until all were seen.
    A probe set smaller than `size` repeats inside the batch (docs/method.md, Data rules).
    """
    rng = generator(seed, Purpose.PROBE, step)
    classes = np.unique(label_N)
    turn = rng.permutation(classes)[np.arange(size) % len(classes)]
    chosen = np.empty(size, np.int64)
    for k in np.unique(turn):
        of_class = np.flatnonzero(label_N == k)
        places = np.flatnonzero(turn == k)
        repeats = -(-len(places) // len(of_class))
        chosen[places] = np.concatenate([rng.permutation(of_class) for _ in range(repeats)])[: len(places)]
    return chosen


def chunk_of(group: int, row_bytes: float) -> int:
    """Return how many steps' groups one block holds, where a row of a group makes `row_bytes` of views."""
    return max(1, min(BLOCK_ROWS // group, int(BLOCK_BYTES // (group * row_bytes))))


@dataclass(frozen=True, eq=False)
class Plan:
    """Say which groups a run reads, in which blocks, and which worker gets them.

    A batch of `batch` rows is cut into `groups` groups of `group` rows. A block holds the groups at one place of up to
    `chunk` consecutive steps; blocks go to the workers round-robin. The order of rows depends on `chunk`, never on
    `start`, `stop` or the number of workers.
    """

    row_groups: np.ndarray  # rows of each, int64
    seed: int
    batch: int
    group: int
    probe: int  # trusted examples beside each group
    start: int  # first step
    stop: int  # one past the last step
    chunk: int

    @property
    def groups(self) -> int:
        """Return the number of groups a batch."""
        return self.batch // self.group

    @property
    def chunks(self) -> range:
        """Return the chunks (stretches of `chunk` steps, counted from step 0) that hold a step of this plan."""
        return range(self.start // self.chunk, -(-self.stop // self.chunk) if self.stop > self.start else 0)

    @property
    def blocks(self) -> int:
        """Return the number of blocks of the whole plan."""
        return len(self.chunks) * self.groups

    def steps_of(self, chunk: int) -> range:
        """Return the plan's steps in a chunk."""
        return range(max(self.start, chunk * self.chunk), min(self.stop, (chunk + 1) * self.chunk))

    def groups_of(self, block: int) -> list[int]:
        """Return the group numbers of a block: group g is the one at place g mod `groups` of step g div `groups`."""
        chunk, place = self._place(block)
        return [step * self.groups + place for step in self.steps_of(chunk)]

    def rows_of(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch, row) of a block's groups, both int64 with a line of G a group."""
        chunk, place = self._place(block)
        first = chunk * self.chunk * self.batch
        position_SPG = np.arange(first, first + self.chunk * self.batch).reshape(self.chunk, self.groups, self.group)
        # Place by place: the rows of one lie next to each other in reading order, so that a row group is in one block.
        position = position_SPG.transpose(1, 0, 2).reshape(-1)
        epoch, reading = position // self.examples, np.empty_like(position)
        for e in np.unique(epoch):
            here = epoch == e
            reading[here] = np.sort(position[here]) - e * self.examples
        mine = slice(place * self.chunk * self.group, (place + 1) * self.chunk * self.group)
        epoch_P, row_P = epoch[mine], np.empty(self.chunk * self.group, np.int64)
        rng = generator(self.seed, Purpose.MIX, chunk * self.groups + place)
        for e in np.unique(epoch_P):
            here = epoch_P == e
            row_P[here] = rng.permutation(_rows_read(self, int(e), reading[mine][here]))
        steps = slice(self.steps_of(chunk).start - chunk * self.chunk, self.steps_of(chunk).stop - chunk * self.chunk)
        return epoch_P.reshape(-1, self.group)[steps], row_P.reshape(-1, self.group)[steps]

    @property
    def examples(self) -> int:
        """Return N, the rows of an epoch."""
        return int(self.row_groups.sum())

    def _place(self, block: int) -> tuple[int, int]:
        chunk, place = divmod(block, self.groups)
        return self.chunks[chunk], place

    def by_step(self, groups: Iterator[T], workers: int) -> Iterator[list[T]]:
        """Regroup one worker's stream (block after block) into steps: its groups of each, in the order of places."""
        places = self.groups // workers
        for chunk in self.chunks:
            steps = len(self.steps_of(chunk))
            held = [[next(groups) for _ in range(steps)] for _ in range(places)]
            for step in range(steps):
                yield [held[place][step] for place in range(places)]


def _rows_read(plan: Plan, epoch: int, reading: np.ndarray) -> np.ndarray:
    # The rows at the places `reading` of an epoch's reading order.
    order, end, first = _order(plan, epoch)
    turn = np.searchsorted(end, reading, side="right")
    group = order[turn]
    return first[group] + reading - (end[turn] - plan.row_groups[group])


@lru_cache(maxsize=2)  # a stream asks for the same epoch block after block
def _order(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # The row groups in the order in which an epoch reads them, where each ends in that order, and each one's first row.
    order = generator(plan.seed, Purpose.ORDER, epoch).permutation(len(plan.row_groups))
    return order, np.cumsum(plan.row_groups[order]), np.cumsum(plan.row_groups) - plan.row_groups
