import threading
import uuid

import fsspec
import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.dataset import InputError
from training.objectives.interface import Coefficients
from training.runs import ledger
from training.runs.ledger import Ledger

COLUMNS = ["step", "id", "epoch", "label", "weight", "trust", "pseudo_label", "confidence", "loss"]


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    url = f"memory://{uuid.uuid4().hex}/run"
    yield url
    memory = fsspec.filesystem("memory")
    for path in memory.find(url):
        memory.rm(path)


def step_rows(step: int, size: int = 3, shift: float = 0.0):
    """What the stream and the step say about `size` examples."""
    ids = np.arange(size) + 100 * step
    known = {"id": ids, "epoch": ids // 150, "label": ids % 7}
    values = torch.arange(size, dtype=torch.float64) / 8 + step + shift
    said = Coefficients(values, (values > 2).double(), torch.from_numpy(ids % 5), values / 64, values + 0.5)
    return known, said


def test_round_trip(folder):
    first, second = Ledger(folder, 0), Ledger(folder, 1)
    for step in (0, 1, 2):
        first.add(step, *step_rows(step))
    second.add(0, *step_rows(7))  # the other rank's examples of step 0
    first.flush()
    second.flush()
    first.add(3, *step_rows(3, size=2))
    first.flush()
    first.flush()  # nothing new: nothing is written
    table = ledger.read(folder)
    assert sorted(table.column_names) == sorted(COLUMNS)
    assert table["step"].to_pylist() == sorted([0] * 6 + [1] * 3 + [2] * 3 + [3] * 2)
    rows = {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == 14
    for step, size, said_at in ((1, 3, 1), (0, 3, 7), (3, 2, 3)):
        known, said = step_rows(said_at, size)
        for i, example in enumerate(known["id"]):
            row = rows[example]
            assert (row["step"], row["epoch"], row["label"]) == (step, known["epoch"][i], known["label"][i])
            assert row["pseudo_label"] == int(said.pseudo_label_B[i])
            for name, column in (
                ("weight", said.weight_B),
                ("trust", said.trust_B),
                ("confidence", said.confidence_B),
                ("loss", said.loss_B),
            ):
                assert row[name] == float(column[i])  # eighths: exact in float32
    assert {str(table.schema.field(name).type) for name in ("weight", "trust", "confidence", "loss")} == {"float"}
    assert {str(table.schema.field(name).type) for name in ("step", "id", "label", "pseudo_label")} == {"int64"}


def test_a_resumed_run_overwrites_what_it_replays(folder):
    for shift in (0.0, 0.25):
        replayed = Ledger(folder, 0)
        replayed.add(4, *step_rows(4, shift=shift))
        replayed.add(5, *step_rows(5, shift=shift))
        replayed.flush()
    table = ledger.read(folder)
    assert table["id"].to_pylist() == [400, 401, 402, 500, 501, 502]
    assert table["weight"].to_pylist() == [4.25, 4.375, 4.5, 5.25, 5.375, 5.5]


def test_a_run_that_resumes_on_fewer_workers_forgets_what_it_replays(folder):
    for rank in range(2):
        for first in (2, 4):
            part = Ledger(folder, rank)
            part.add(first, *step_rows(first))
            part.flush()
    ledger.forget(folder, 4)
    assert sorted(set(ledger.read(folder)["step"].to_pylist())) == [2]


def test_an_empty_folder_says_so(folder):
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        ledger.read(folder)
    Ledger(folder, 0).flush()
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        ledger.read(folder)


# ---- between checkpoints ---------------------------------------------------------------------------------------------


def steps_of(folder: str) -> list[tuple[int, int]]:
    return [(part.first, part.last) for part in ledger.parts(folder)]


def test_rows_are_written_while_training_goes_on(folder, monkeypatch):
    monkeypatch.setattr(ledger, "PART_ROWS", 6)
    rows = Ledger(folder, 0)
    for step in range(5):
        rows.add(step, *step_rows(step))
        assert rows.rows == len(rows.known) * 3 < 6
    rows.close()
    assert steps_of(folder) == [(0, 1), (2, 3)]  # step 4 was not asked for, and is lost with its worker
    assert ledger.read(folder)["id"].to_pylist() == [100 * step + i for step in range(4) for i in range(3)]


def test_a_flush_leaves_no_row_behind(folder, monkeypatch):
    monkeypatch.setattr(ledger, "PART_ROWS", 6)
    rows = Ledger(folder, 0)
    for step in range(5):
        rows.add(step, *step_rows(step))
    assert rows.flush() == ""
    assert steps_of(folder) == [(0, 1), (2, 3), (4, 4)]
    ledger.forget(folder, 2)
    assert steps_of(folder) == [(0, 1)]


def test_training_waits_for_storage_that_is_slower(folder, monkeypatch):
    monkeypatch.setattr(ledger, "PART_ROWS", 3)
    write, may_go_on = storage.write, threading.Event()
    monkeypatch.setattr(storage, "write", lambda *what: may_go_on.wait() and write(*what))
    rows, added = Ledger(folder, 0), []

    def train() -> None:
        for step in range(4):
            rows.add(step, *step_rows(step))
            added.append(step)

    training = threading.Thread(target=train)
    training.start()
    training.join(0.3)
    assert training.is_alive()
    assert added == [0]  # its part is on the way, and the next one waits
    may_go_on.set()
    training.join()
    rows.flush()
    assert steps_of(folder) == [(step, step) for step in range(4)]


class Full:
    """Storage that refuses its first `refusals` writes, some of which it has carried out all the same."""

    def __init__(self, refusals: int, *, landed: bool) -> None:
        self.write, self.refusals, self.landed = storage.write, refusals, landed

    def __call__(self, fs, path, data) -> None:
        self.refusals -= 1
        if self.refusals < 0 or self.landed:
            self.write(fs, path, data)
        if self.refusals >= 0:
            raise InputError(f"cannot use {path} (No space left on device): free some space there")


@pytest.mark.parametrize("landed", [False, True])
def test_parts_that_storage_refused_are_written_later_and_once(folder, monkeypatch, landed):
    monkeypatch.setattr(ledger, "PART_ROWS", 3)
    monkeypatch.setattr(storage, "write", Full(4, landed=landed))
    rows = Ledger(folder, 0)
    for step in range(3):
        rows.add(step, *step_rows(step))
    assert rows.flush().startswith("ledger rows of steps 0 to 0 are held back: cannot use")
    assert rows.flush() == ""
    assert ledger.read(folder)["id"].to_pylist() == [100 * step + i for step in range(3) for i in range(3)]


def test_rows_do_not_pile_up_without_limit(folder, monkeypatch):
    monkeypatch.setattr(ledger, "PART_ROWS", 3)
    monkeypatch.setattr(ledger, "MOST_PARTS", 5)
    monkeypatch.setattr(storage, "write", Full(99, landed=False))
    rows = Ledger(folder, 0)
    for step in range(6):
        rows.add(step, *step_rows(step))
    with pytest.raises(InputError, match=r"rows of steps 0 to 0 are held back: .*No space left"):
        rows.add(6, *step_rows(6))
