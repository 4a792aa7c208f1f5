"""PURE: the order in which examples are read, and the key of every random draw, from counters alone.

The stream is endless: epoch after epoch, each a permutation of the N rows. Step t takes its rows t·B … t·B + B − 1, cut
into groups of G: the same on any number of workers, and resumed anywhere by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Purpose(IntEnum):
    """What a random draw is for: each purpose has its own independent stream."""

    ORDER = 1
    VIEWS = 2
    PROBE = 3
    PROBE_VIEWS = 4
    MIXUP = 5


def key(seed: int, purpose: Purpose, counter: int) -> int:
    """A 128-bit key for a counter-based generator (Philox), distinct for every (seed, purpose, counter)."""
    high, low = np.random.SeedSequence((seed, purpose, counter)).generate_state(2, np.uint64)
    return int(high) << 64 | int(low)


def generator(seed: int, purpose: Purpose, counter: int) -> np.random.Generator:
    """The generator behind `key`."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, counter)))


def rows(count: int, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows `start` … `stop` − 1 of the endless stream over `count` examples: (epoch, row), both int64."""
    position = np.arange(start, stop)
    epoch = position // count
    row = np.empty_like(position)
    for e in np.unique(epoch):
        here = epoch == e
        row[here] = _order(count, seed, int(e))[position[here] % count]
    return epoch, row


@lru_cache(maxsize=2)  # a stream asks for the same epoch group after group
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, Purpose.ORDER, epoch).permutation(count)


def probe_rows(label_N: np.ndarray, size: int, seed: int, step: int) -> np.ndarray:
    """Class-balanced rows of the probe set for one step's whole batch, int64; its groups take equal shares in order.

    Classes take turns from a random start; within a class, rows are drawn without replacement until all were seen.
    A probe set smaller than `size` repeats inside the batch (METHOD: data rules).
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


@dataclass(frozen=True)
class Plan:
    """Which groups a run reads, in which blocks, and which worker gets them.

    A batch of `batch` rows is cut into `lanes` groups of `group` rows. A block holds one lane's groups of up to `chunk`
    consecutive steps, because each block costs Ray Data a fixed 10–20 ms; blocks go to the workers round-robin.
    """

    examples: int
    seed: int
    batch: int
    group: int
    start: int  # first step
    stop: int  # one past the last step
    chunk: int

    @property
    def lanes(self) -> int:
        """Groups a batch."""
        return self.batch // self.group

    @property
    def blocks(self) -> int:
        """Blocks of the whole plan."""
        return -(-(self.stop - self.start) // self.chunk) * self.lanes

    def steps_of(self, chunk: int) -> range:
        """The steps of a chunk, from 0."""
        first = self.start + chunk * self.chunk
        return range(first, min(first + self.chunk, self.stop))

    def groups_of(self, block: int) -> list[int]:
        """The group numbers of a block: group g is lane g mod lanes of step g div lanes."""
        chunk, lane = divmod(block, self.lanes)
        return [step * self.lanes + lane for step in self.steps_of(chunk)]

    def rows_of(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row) of a group's examples."""
        return rows(self.examples, self.seed, group * self.group, (group + 1) * self.group)

    def by_step(self, groups: Iterator[T], workers: int) -> Iterator[list[T]]:
        """Regroup one worker's stream (block after block) into steps: its lanes' groups of each step, in lane order."""
        lanes = self.lanes // workers
        for chunk in range(self.blocks // self.lanes):
            steps = len(self.steps_of(chunk))
            held = [[next(groups) for _ in range(steps)] for _ in range(lanes)]
            for step in range(steps):
                yield [held[lane][step] for lane in range(lanes)]
