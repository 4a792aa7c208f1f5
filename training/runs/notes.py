"""What one start of a run leaves for the next in the run's folder: why it ended, and at which steps it began."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

from pipeline import storage
from pipeline.dataset import InputError

FAILURE, LAST_ERROR, STARTS, ENDED = NOTES = ("failure.json", "last_error.json", "starts.json", "ended.json")
MOST_STARTS = 8  # at one step: a run that gets no further than that is not going to


def read(folder: str, name: str) -> Any:
    """Return what a note says; "" where there is none."""
    fs, path = storage.connect(folder)
    with contextlib.suppress(FileNotFoundError):
        return json.loads(storage.read(fs, storage.join(path, name)))
    return ""


def write(folder: str, name: str, text: Any) -> None:
    """Leave a note for the next start; where that fails, what it would report fails again."""
    fs, path = storage.connect(folder)
    with contextlib.suppress(InputError, OSError):
        storage.write(fs, storage.join(path, name), json.dumps(text).encode())


def clear(folder: str) -> None:
    """Remove the notes of an earlier launch: a person has come since."""
    fs, path = storage.connect(folder)
    for name in NOTES:
        with contextlib.suppress(FileNotFoundError):
            storage.attempt(fs, path, functools.partial(fs.rm_file, storage.join(path, name)))


def count_start(folder: str, step: int) -> bool:
    """Note a start at `step` and return whether it is the first one since the launch.

    Raises InputError where a run starts at one step again and again.
    """
    before = read(folder, STARTS)
    starts = [*(each for each in before if each == step), step]
    write(folder, STARTS, starts)
    if len(starts) > MOST_STARTS:
        why = read(folder, LAST_ERROR) or "its workers were killed"
        raise InputError(
            f"the run started {MOST_STARTS} times at step {step} and came to no checkpoint ({why}): "
            "fix that, or lower checkpoint_steps where machines leave too soon"
        )
    return not before


def ends_again(folder: str, error: str) -> bool:
    """Note the error that ends this start, and return whether it has ended the one before at the same step."""
    starts = read(folder, STARTS)
    before = read(folder, ENDED)
    write(folder, ENDED, {"error": error, "starts": starts})
    return before == {"error": error, "starts": starts[:-1]}
