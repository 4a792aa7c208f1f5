"""Checkpoints are whole or not at all; the newest whole one is found, and the best is kept."""

import json

import pytest
import torch

from pipeline import storage
from pipeline.dataset import InputError
from training.runs import checkpoint
from training.runs.checkpoint import DamagedError, Writer, commits, drop_after, latest, load, newest_step


@pytest.fixture(params=["local", "cloud"])
def folder(request, tmp_path) -> str:
    return f"{tmp_path}/run" if request.param == "local" else request.getfixturevalue("bucket") + "/runs/run"


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((3,), float(step)), "history": [{"step": step, "top1": 0.5}]}


def saved(folder: str, *steps: tuple[int, float | None]) -> list[str]:
    writer = Writer(folder)
    problems = [writer.save(state(step), top1) for step, top1 in steps]
    problems.append(writer.wait())
    writer.close()
    return problems


def test_what_is_saved_is_found(folder):
    assert commits(folder) == []
    assert latest(folder, pytest.fail) is None
    assert saved(folder, (5, None), (10, 0.5)) == ["", "", ""]
    assert [commit.step for commit in commits(folder)] == [5, 10]
    found = latest(folder, pytest.fail)
    assert found["step"] == 10
    assert torch.equal(found["weights"], torch.full((3,), 10.0))


def test_damaged_checkpoints_after_the_one_resumed_from_are_removed(folder):
    saved(folder, (5, None), (20, None), (23, None))
    for step in (20, 23):
        storage.write(*storage.connect(f"{folder}/step_{step:08d}/state.pt"), b"damaged")
    assert newest_step(folder) == 23  # by its record alone
    with pytest.raises(DamagedError, match=r"step_00000023/state\.pt is damaged"):
        load(folder, commits(folder)[-1])
    drop_after(folder, 8)
    assert newest_step(folder) == 0
    writer = Writer(folder)
    assert (writer.save(state(8), None), writer.wait()) == ("", "")
    writer.close()
    assert [commit.step for commit in commits(folder)] == [8]
    assert latest(folder, pytest.fail)["step"] == 8


def test_what_an_earlier_start_has_on_the_way_is_refused(folder):
    old = Writer(folder)
    new = Writer(folder)
    old.save(state(20), None)
    assert "another start of this run has taken over" in old.wait()
    new.save(state(10), None)
    assert new.wait() == ""
    assert [commit.step for commit in commits(folder)] == [10]
    for writer in (old, new):
        writer.close()


def test_a_storage_that_refuses_is_not_a_run_without_checkpoints(folder, monkeypatch):
    saved(folder, (5, None))
    monkeypatch.setattr(storage, "read", lambda *_: (_ for _ in ()).throw(InputError("permission denied")))
    with pytest.raises(InputError, match="permission denied"):
        latest(folder, pytest.fail)


def test_old_checkpoints_that_cannot_be_removed_are_told_and_new_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_remove", lambda *_: (_ for _ in ()).throw(InputError("permission denied")))
    problems = saved(str(tmp_path), (10, None), (20, None), (30, None))
    assert problems[-1] == "old checkpoints could not be removed: permission denied"
    assert [commit.step for commit in commits(str(tmp_path))] == [10, 20, 30]


def test_the_newest_two_and_the_best_are_kept(folder):
    saved(folder, (1, 0.2), (2, 0.9), (3, None), (4, 0.9), (5, 0.3), (6, None), (7, 0.8))
    assert [commit.step for commit in commits(folder)] == [4, 6, 7]  # of two as good the later
    fs, path = storage.connect(folder)
    assert not storage.exists(fs, f"{path}/step_00000002")


def test_a_copy_is_saved_not_what_the_state_becomes(tmp_path):
    weights = torch.zeros(1000)
    writer = Writer(str(tmp_path))
    writer.save({"step": 1, "weights": weights}, None)
    weights += 1
    writer.close()
    assert not latest(str(tmp_path), pytest.fail)["weights"].any()


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "gone"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(folder, harm):
    saved(folder, (5, None), (10, None))
    fs, path = storage.connect(f"{folder}/step_00000010/state.pt")
    data = bytearray(storage.read(fs, path))
    data[len(data) // 2] ^= 1
    if harm == "gone":
        fs.rm(path)
    else:
        storage.write(fs, path, bytes({"cut": data[:100], "bit": data, "empty": b""}[harm]))
    warnings: list[str] = []
    assert latest(folder, warnings.append)["step"] == 5
    assert len(warnings) == 1
    assert "step_00000010/state.pt is damaged" in warnings[0]
    assert "\n" not in warnings[0]


@pytest.mark.parametrize("record", [None, b"", b"{", b"[]", json.dumps({"step": 10}).encode()])
def test_a_half_written_checkpoint_never_counts(folder, record):
    saved(folder, (5, None), (10, None))
    fs, path = storage.connect(f"{folder}/step_00000010/commit.json")
    fs.rm(path)
    if record is not None:
        storage.write(fs, path, record)
    assert latest(folder, pytest.fail)["step"] == 5


def test_a_checkpoint_that_cannot_be_written_is_told_and_older_ones_stay(tmp_path, monkeypatch):
    saved(str(tmp_path), (5, None))
    write, full = storage.write, [True]

    def on_a_full_disk(fs, path, data):
        if full[0] and "step_00000010" in path:
            raise storage.InputError("cannot use there (No space left on device): free some space there")
        write(fs, path, data)

    monkeypatch.setattr(storage, "write", on_a_full_disk)
    problems = saved(str(tmp_path), (10, None), (15, None))
    assert problems[0] == problems[2] == ""
    assert "no checkpoint was written: cannot use there (No space left" in problems[1]
    assert [commit.step for commit in commits(str(tmp_path))] == [5, 15]


def test_nothing_is_unpickled(tmp_path):
    import hashlib
    import pickle

    evil = pickle.dumps(print)
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "state.pt").write_bytes(evil)
    record = {"step": 1, "bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest(), "top1": None}
    (tmp_path / "step_00000001" / "commit.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        latest(str(tmp_path), pytest.fail)
