"""The ledger: what every step decided about each of its examples, as Parquet keyed by example id.

Shapes: B noisy examples of this worker in one step.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import storage
from pipeline.dataset import InputError
from training.objectives.interface import Coefficients

FOLDER = "ledger"


class Ledger:
    """One worker's rows. They stay where they were computed until `flush`, so a step never waits for them."""

    def __init__(self, folder: str, rank: int) -> None:
        self.folder, self.rank = f"{folder}/{FOLDER}", rank
        self.known: list[dict[str, np.ndarray]] = []  # what the stream said: step, epoch, id, label
        self.decided: list[dict[str, Tensor]] = []  # what the step said
        self.doubtful: list[str] = []  # files that may be there, although writing them failed

    def add(self, step: int, known: dict[str, np.ndarray], said: Coefficients) -> None:
        """The rows of one step; `known` has the stream's id, epoch and label, B each."""
        self.known.append({"step": np.full(len(known["id"]), step), **known})
        self.decided.append(
            {
                "weight": said.weight_B,
                "trust": said.trust_B,
                "pseudo_label": said.pseudo_label_B,
                "confidence": said.confidence_B,
                "loss": said.loss_B,
            }
        )

    def flush(self) -> str:
        """Write all rows so far as one file, named by its steps; returns "", or why they could not be written.

        Rows that could not be written are kept for the next time.
        """
        if not self.known:
            return ""
        columns: dict[str, np.ndarray] = {
            name: np.concatenate([part[name] for part in self.known]) for name in self.known[0]
        }
        for name in self.decided[0]:
            column = torch.cat([part[name] for part in self.decided]).cpu().numpy()
            columns[name] = column.astype(np.float32) if column.dtype.kind == "f" else column
        first, last = columns["step"][0], columns["step"][-1]
        file = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), file)
        fs, path = storage.connect(self.folder)
        name = f"steps-{first:08d}-{last:08d}-rank-{self.rank:04d}.parquet"
        try:
            storage.write(fs, storage.join(path, name), file.getvalue().to_pybytes())
            for doubtful in self.doubtful:
                with contextlib.suppress(FileNotFoundError):
                    storage.attempt(fs, path, functools.partial(fs.rm_file, storage.join(path, doubtful)))
        except (InputError, OSError) as error:
            self.doubtful.append(name)
            return f"ledger rows of steps {first} to {last} are held back: {error}"
        self.known, self.decided, self.doubtful = [], [], []
        return ""


def forget(folder: str, step: int) -> None:
    """Remove the files of steps from `step` on: a run that resumes there, on any number of workers, repeats them."""
    fs, path = storage.connect(f"{folder}/{FOLDER}")
    old = [part for part in _parts(fs, path) if int(part.rsplit("/", 1)[-1].split("-")[1]) >= step]
    if old:
        storage.attempt(fs, path, lambda: fs.rm(old))


def read(folder: str) -> pa.Table:
    """All rows of the run in `folder`: step, epoch, id, label, weight, trust, pseudo_label, confidence, loss."""
    fs, path = storage.connect(f"{folder}/{FOLDER}")
    parts = _parts(fs, path)
    if not parts:
        raise FileNotFoundError(f"{folder} holds no ledger: train there first")
    tables = [pq.read_table(pa.BufferReader(storage.read(fs, part))) for part in parts]
    return pa.concat_tables(tables).sort_by("step")


def _parts(fs: Any, path: str) -> list[str]:
    try:
        names = storage.attempt(fs, path, lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name.endswith(".parquet"))
