"""What breaks a run from within, for the table of benchmarks.resilience, and the notes that a run leaves of itself.

Data actors import this file, so it does without torch, as they do. A strike is called by every worker before each of
its steps, with the folder of the notes, the step and the rank.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.dataset import Dataset, Examples, Split
from pipeline.digits import Digits
from pipeline.views import CifarViews, DigitsViews

STRIKE = 37  # the step at which faults strike: some after a checkpoint, some before one with an evaluation
ACTOR_STRIKE = 10  # the step done at which an actor dies: they work ahead
PAIR_SECONDS = 0.002  # what two views of a photograph may take: actors are at work for most of the run
SLOW_STEPS, SLOW_SECONDS = 25, 0.3
FULL_UNTIL = 63  # the step at which a full disk gets space again: an evaluation and three checkpoints later
ALONE_AT = 57  # the step at which a worker left alone waits for another
POISONED_ROW = 100

# ---- notes -----------------------------------------------------------------------------------------------------------


def note(folder: str, name: str, line: object) -> None:
    """Add a line to one of a run's notes; several processes do."""
    with open(f"{folder}/{name}", "a") as file:
        file.write(f"{line}\n")


def notes(folder: str, name: str) -> list[str]:
    """Return the lines of a note."""
    path = Path(folder, name)
    return path.read_text().splitlines() if path.exists() else []


def once(folder: str) -> bool:
    """Return whether this is the first call for the run, in whatever process; notes the time of the fault."""
    try:
        with open(f"{folder}/fault", "x") as file:
            file.write(f"{time.time()}")
    except FileExistsError:
        return False
    return True


def die(folder: str) -> None:
    """Kill this process, as the kernel does, where the fault has not struck yet."""
    if once(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def done(folder: str) -> int:
    """Return the last step done so far; −1 for none."""
    return max((int(line.split()[0]) for line in notes(folder, "steps") if line), default=-1)


@cache
def note_place(folder: str, who: str) -> None:
    """Note, once a process, on which node it is: the process id of the node's raylet."""
    note(folder, "places", f"{who} {os.environ['RAY_RAYLET_PID']}")


def ranks_started(folder: str, rank: int) -> int:
    """Return how many processes have been worker `rank` of the run."""
    return sum(line.startswith(f"rank {rank} ") for line in notes(folder, "places"))


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlowViews(DigitsViews):
    """Make views of digits that take as long as those of photographs, and let a fault strike."""

    fault: str
    folder: str

    def pair(self, image_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """See `Views`."""
        time.sleep(PAIR_SECONDS)
        note_place(self.folder, "actor")
        if self.fault == "data_actor_out_of_memory" and done(self.folder) >= ACTOR_STRIKE:
            die(self.folder)
        return super().pair(image_HWC, rng)


@dataclass(frozen=True)
class SlowDigits(Digits):
    """Load digits with slow views."""

    fault: str = ""
    folder: str = ""

    @property
    def views(self) -> SlowViews:
        """See `Source`."""
        return SlowViews(self.fault, self.folder)


@dataclass(frozen=True)
class EncodedDigits(Digits):
    """Load digits stored as PNG, one of them broken, or grey in its place."""

    broken: bool = True

    @property
    def views(self) -> CifarViews:  # type: ignore[override]
        """See `Source`; those of digits have one channel, and decoded images three."""
        return CifarViews()

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Source`."""
        return 8, 8, 3

    def load(self, url: str, seed: int) -> Dataset:
        """See `Source`."""
        plain = super().load(url, seed)
        poison = b"no image" if self.broken else png(np.full((8, 8, 1), 128, np.uint8))
        tests: dict[str, Split] = {name: encoded(test) for name, test in plain.tests.items()}
        train = encoded(plain.train, {POISONED_ROW: poison})
        return replace(plain, train=train, probe=encoded(plain.probe), tests=tests)


def png(image_HW1: np.ndarray) -> bytes:
    """Return a grey image's file."""
    return bytes(cv2.imencode(".png", image_HW1)[1].tobytes())


def encoded(split: Split, instead: dict[int, bytes] | None = None) -> Examples:
    """Return the examples with encoded images, some rows of them with other bytes `instead`."""
    examples = split.take(np.arange(len(split)))
    files = [(instead or {}).get(row) or png(examples.image(row)) for row in range(len(examples))]
    return replace(examples, image_N=pa.array(files, pa.binary()))


# ---- strikes ---------------------------------------------------------------------------------------------------------


def nothing(folder: str, step: int, rank: int) -> None:
    """Disturb nothing."""


def kill_in_step(folder: str, step: int, rank: int) -> None:
    """Rank 1 dies."""
    if (step, rank) == (STRIKE, 1):
        die(folder)


def kill_in_evaluation(folder: str, step: int, rank: int) -> None:
    """Rank 1 dies when it looks at the first image of the next evaluation."""

    def test(self: DigitsViews, image_HWC: np.ndarray) -> np.ndarray:
        die(folder)
        return image_HWC

    if (step, rank) == (STRIKE, 1):
        SlowViews.test = test  # type: ignore[method-assign]


def kill_in_checkpoint(folder: str, step: int, rank: int) -> None:
    """Rank 0 dies when the next checkpoint's state is written and its commit is not."""
    write = storage.write

    def cut_off(fs: Any, path: str, data: bytes) -> None:
        if path.endswith("commit.json"):
            die(folder)
        write(fs, path, data)

    if (step, rank) == (STRIKE, 0):
        storage.write = cut_off


def stop_for_good(folder: str, step: int, rank: int) -> None:
    """Rank 1 stands still, and lives."""
    if (step, rank) == (STRIKE, 1) and once(folder):
        note(folder, "stopped", os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP)


def slow_down(folder: str, step: int, rank: int) -> None:
    """Rank 1 takes longer than the others, for a while."""
    if rank == 1 and STRIKE <= step < STRIKE + SLOW_STEPS:
        once(folder)
        time.sleep(SLOW_SECONDS)


def stand_alone(folder: str, step: int, rank: int) -> None:
    """Let a worker left alone stand still until the run takes another in, which ends it."""
    while step == ALONE_AT and ranks_started(folder, 1) < 2:
        time.sleep(0.1)


def refuse_writes(folder: str, step: int, rank: int) -> None:
    """Refuse to write local files, for a while: what stands for a full disk where nothing can be mounted."""
    if step != STRIKE or not Path(folder, "stand_in").exists():
        return
    once(folder)
    pipe, put = LocalFileSystem.pipe_file, LocalFileSystem.put_file

    def unless_full(act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*arguments: Any, **named: Any) -> Any:
            if done(folder) < FULL_UNTIL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return act(*arguments, **named)

        return acting

    LocalFileSystem.pipe_file, LocalFileSystem.put_file = unless_full(pipe), unless_full(put)
