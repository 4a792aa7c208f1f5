"""Checkpoints of a run: whole or not at all, on any storage, written beside the training.

    step_00001200/state.pt       what torch.load(weights_only=True) reads
    step_00001200/commit.json    bytes and SHA-256 of state.pt, accuracy: written last; without it nothing counts

Of all, the newest and the best by accuracy are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline import storage
from pipeline.dataset import InputError

OWNER = "owner"  # file that names the writer whose folder it is
KEPT = 2  # newest checkpoints, so that there is one before a damaged one


@dataclass(frozen=True)
class Commit:
    """Hold the record of a finished checkpoint."""

    step: int
    bytes: int
    sha256: str
    top1: float | None  # of the evaluation at this step, where there was one


def commits(folder: str) -> list[Commit]:
    """List the finished checkpoints in a run's folder, oldest first; a record that cannot be read is none."""
    fs, path = storage.connect(folder)
    try:
        names = storage.attempt(fs, path, lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        if name.rstrip("/").rpartition("/")[2].startswith("step_"):
            try:
                found.append(Commit(**json.loads(storage.read(fs, f"{name.rstrip('/')}/commit.json"))))
            except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, TypeError):
                continue  # never finished
    return sorted(found, key=lambda commit: commit.step)


class DamagedError(RuntimeError):
    """Report a checkpoint that is not what its commit record says: part of it is lost, or has changed."""


def newest_step(folder: str) -> int:
    """Return the step of the newest finished checkpoint by its record, without reading it; 0 where there is none."""
    done = commits(folder)
    return done[-1].step if done else 0


def load(folder: str, commit: Commit) -> dict[str, Any]:
    """Return what a checkpoint holds; raises DamagedError where it is not whole."""
    fs, path = storage.connect(folder)
    name, data = f"{_name(commit.step)}/state.pt", b""
    with contextlib.suppress(FileNotFoundError):
        data = storage.read(fs, storage.join(path, name))
    if (len(data), hashlib.sha256(data).hexdigest()) != (commit.bytes, commit.sha256):
        raise DamagedError(f"checkpoint {folder}/{name} is damaged: going on from the one before it")
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def latest(folder: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Return what the newest whole checkpoint holds; `warn` hears of a damaged one, and the one before it is taken."""
    for commit in reversed(commits(folder)):
        try:
            return load(folder, commit)
        except DamagedError as error:  # noqa: PERF203 — one checkpoint in a lifetime
            warn(str(error))
    return None


def drop_after(folder: str, step: int) -> None:
    """Remove the checkpoints of later steps, which proved to be damaged."""
    for commit in commits(folder):
        if commit.step > step:
            _remove(folder, commit)


class Writer:
    """Save checkpoints in a thread: training goes on while one is uploaded. Only one worker has a writer.

    The run's folder is its own from now on: what another one, of an earlier start, still has on the way is refused.
    """

    def __init__(self, folder: str) -> None:
        """Take over a folder."""
        self.folder, self.token = folder, uuid.uuid4().hex
        fs, path = storage.connect(folder)
        storage.write(fs, storage.join(path, OWNER), self.token.encode())
        self.thread = ThreadPoolExecutor(1)
        self.last: Future[str] | None = None

    def save(self, state: dict[str, Any], top1: float | None) -> str:
        """Begin to save `state`, of which a copy is taken now; return what went wrong with the one before, or "".

        A checkpoint that could not be written is not made up for: the next one comes soon, and older ones stay.
        """
        problem = self.wait()
        copy = io.BytesIO()
        torch.save(state, copy)
        self.last = self.thread.submit(self._write, int(state["step"]), copy.getvalue(), top1)
        return problem

    def wait(self) -> str:
        """Wait until all is saved; return what went wrong, or ""."""
        last, self.last = self.last, None
        try:
            return last.result() if last else ""
        except (InputError, OSError) as error:
            return f"no checkpoint was written: {error}"

    def close(self) -> None:
        """Wait until all is saved."""
        self.thread.shutdown(wait=True)

    def _write(self, step: int, data: bytes, top1: float | None) -> str:
        # Returns what went wrong once the checkpoint was safe, or "".
        fs, path = storage.connect(self.folder)
        place = storage.join(path, _name(step))
        storage.write(fs, f"{place}/state.pt", data)
        if storage.read(fs, storage.join(path, OWNER)) != self.token.encode():
            raise InputError("another start of this run has taken over its folder: stop this one")
        commit = Commit(step, len(data), hashlib.sha256(data).hexdigest(), top1)
        storage.write(fs, f"{place}/commit.json", json.dumps(asdict(commit)).encode())
        done = commits(self.folder)
        measured = [each for each in done if each.top1 is not None]
        best = max(measured, key=lambda each: (each.top1, each.step), default=None)
        try:
            for old in done[:-KEPT]:
                if old != best:
                    _remove(self.folder, old)
        except (InputError, OSError) as error:
            return f"old checkpoints could not be removed: {error}"
        return ""


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _remove(folder: str, commit: Commit) -> None:
    fs, path = storage.connect(folder)
    storage.attempt(fs, path, lambda: fs.rm(storage.join(path, _name(commit.step)), recursive=True))
