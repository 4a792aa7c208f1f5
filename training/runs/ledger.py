"""The ledger: what every step decided about each of its examples, as Parquet keyed by example id.

Shapes: B noisy examples of this worker in one step.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import storage
from pipeline.dataset import InputError
from training.objectives.interface import Coefficients

FOLDER = "ledger"
PART_ROWS = 1 << 17  # rows of one worker that make a file: 3 MB, some minutes of a fast GPU's work
MOST_PARTS = 64  # files that may wait until storage takes them: 200 MB
FEW_VALUES = ["step", "epoch", "label", "trust", "pseudo_label"]  # columns that a dictionary makes small


class Ledger:
    """Hold one worker's rows. They stay where they were computed until a thread writes them: a step waits for neither.

    Two parts are held at most while storage takes them as fast as they come; where it is slower, training waits for it.
    """

    def __init__(self, folder: str, rank: int) -> None:
        self.folder, self.rank = f"{folder}/{FOLDER}", rank
        self.known: list[dict[str, np.ndarray]] = []  # what the stream gave: step, epoch, id, label
        self.decided: list[dict[str, Tensor]] = []  # what the step decided
        self.rows = 0  # of these
        self.waiting: deque[tuple[str, bytes]] = deque()  # files, by name, that storage has not taken: the thread's own
        self.thread = ThreadPoolExecutor(1)
        self.last: Future[str] | None = None

    def add(self, step: int, known: dict[str, np.ndarray], decided: Coefficients) -> None:
        """Add the rows of one step; `known` has the stream's id, epoch and label, B each.

        Raises InputError where storage has taken none of the last MOST_PARTS parts.
        """
        self.known.append({"step": np.full(len(known["id"]), step), **known})
        self.decided.append(
            {
                "weight": decided.weight_B,
                "trust": decided.trust_B,
                "pseudo_label": decided.pseudo_label_B,
                "confidence": decided.confidence_B,
                "loss": decided.loss_B,
            }
        )
        self.rows += len(known["id"])
        if self.rows >= PART_ROWS:
            self._begin()

    def flush(self) -> str:
        """Wait until all rows so far are written; return "", or why they could not be.

        Rows that could not be written are kept for the next time.
        """
        return self._begin().result()

    def close(self) -> None:
        """Wait for what is being written; other rows are not written."""
        self.thread.shutdown(wait=True)

    def _begin(self) -> Future[str]:
        # Have the thread write all rows so far.
        if self.last:
            self.last.result()
        self.last = self.thread.submit(self._write, self.known, self.decided)
        self.known, self.decided, self.rows = [], [], 0
        return self.last

    def _write(self, known: list[dict[str, np.ndarray]], decided: list[dict[str, Tensor]]) -> str:
        if known:
            name = f"steps-{known[0]['step'][0]:08d}-{known[-1]['step'][0]:08d}-rank-{self.rank:04d}.parquet"
            self.waiting.append((name, _encoded(known, decided)))
        fs, path = storage.connect(self.folder)
        while self.waiting:
            name, data = self.waiting[0]
            try:
                storage.write(fs, storage.join(path, name), data)
            except (InputError, OSError) as error:
                first, last = Part.of(name).first, Part.of(name).last
                problem = f"ledger rows of steps {first} to {last} are held back: {error}"
                if len(self.waiting) > MOST_PARTS:
                    raise InputError(problem) from None
                return problem
            self.waiting.popleft()
        return ""


def _encoded(known: list[dict[str, np.ndarray]], decided: list[dict[str, Tensor]]) -> bytes:
    columns: dict[str, np.ndarray] = {name: np.concatenate([part[name] for part in known]) for name in known[0]}
    for name in decided[0]:
        column = torch.cat([part[name] for part in decided]).cpu().numpy()
        columns[name] = column.astype(np.float32) if column.dtype.kind == "f" else column
    file = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), file, compression="zstd", use_dictionary=FEW_VALUES, write_statistics=False)
    return file.getvalue().to_pybytes()


@dataclass(frozen=True, order=True)
class Part:
    """Name one file: the rows of one worker from step `first` to step `last`."""

    first: int
    last: int
    path: str

    @staticmethod
    def of(path: str) -> Part:
        """Return the part that is at `path`, by its name."""
        _, first, last, *_ = path.rsplit("/", 1)[-1].split("-")
        return Part(int(first), int(last), path)


def parts(folder: str) -> list[Part]:
    """Return the files of the run in `folder`, by step; none where it has no ledger."""
    fs, path = storage.connect(f"{folder}/{FOLDER}")
    try:
        names = storage.attempt(fs, path, lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(Part.of(name) for name in names if name.endswith(".parquet"))


def forget(folder: str, step: int) -> None:
    """Remove the files of steps from `step` on: a run that resumes there, on any number of workers, repeats them."""
    fs, path = storage.connect(f"{folder}/{FOLDER}")
    old = [part.path for part in parts(folder) if part.first >= step]
    if old:
        storage.attempt(fs, path, lambda: fs.rm(old))


def read(folder: str) -> pa.Table:
    """Return all rows of the run in `folder`, by step.

    The columns are step, epoch, id, label, weight, trust, pseudo_label, confidence and loss. Raises FileNotFoundError
    where there is no ledger.
    """
    fs, _ = storage.connect(folder)
    tables = [pq.read_table(pa.BufferReader(storage.read(fs, part.path))) for part in parts(folder)]
    if not tables:
        raise FileNotFoundError(f"{folder} holds no ledger: train there first")
    return pa.concat_tables(tables).sort_by("step")
