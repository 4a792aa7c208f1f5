"""A run that was stopped anywhere and started again ends to the bit as one that was not: weights, ledger, history."""

import contextlib
import hashlib
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray.train
import timm
import torch
from rich.console import Console

from pipeline import storage
from pipeline.dataset import InputError
from tests.training.test_launch import recipe, weights
from training import launch
from training.engine import loop, worker
from training.engine.chronicle import Chronicle
from training.engine.schedule import Schedule
from training.objectives.registry import METHODS
from training.recipe import Recipe
from training.runs import checkpoint, ledger, model_file, notes, recipe_file

pytestmark = pytest.mark.slow  # whole runs, again and again

ORDER = [("step", "ascending"), ("id", "ascending")]


def run(made: Recipe) -> tuple[launch.Result, str]:
    """The run, and what it printed."""
    output = io.StringIO()
    return launch.run(made, Console(file=output, width=300)), output.getvalue()


def short(storage_path: Path, **changes) -> Recipe:
    """16 steps with batch norm in float32, evaluated after 5, 8, 10, 15 and 16, a checkpoint every 3."""
    schedule = Schedule(lr=0.05, first_cycle=8, cycles=2, t_mul=1.0)
    settings = {"network": "wrn-10-1", "schedule": schedule, "precision": "float32", "evaluate_every": 5}
    return recipe(storage_path, checkpoint_steps=3, **settings, **changes)


def assert_same(result: launch.Result, whole: launch.Result) -> None:
    expected, actual = weights(whole.folder), weights(result.folder)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert ledger.read(result.folder).sort_by(ORDER).equals(ledger.read(whole.folder).sort_by(ORDER))

    def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
        clocks = {"images_per_second", "waiting_for_data"}
        return [{name: value for name, value in row.items() if name not in clocks} for row in history]

    assert timeless(result.history) == timeless(whole.history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> launch.Result:
    return run(short(tmp_path_factory.mktemp("whole")))[0]


class Killed(BaseException):
    """Takes no notice of `except Exception`, as a signal does."""


def killed(monkeypatch, where: object, name: str, call: int) -> None:
    """Make the `call`-th call of `where.name` the last one."""
    original, left = getattr(where, name), [call]

    def act(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(where, name, act)


# The step that a start goes on from, and what is killed in it at which call. Each but the first keeps a checkpoint
# before that, so that no later one does the steps anew that an earlier one spoilt.
KILLS = [
    (0, worker, "update", 2),
    (0, ledger.Ledger, "flush", 3),
    (5, checkpoint.Writer, "save", 2),
    (6, worker, "update", 6),
    (10, worker, "evaluate", 1),
    (12, Chronicle, "export", 1),
]


def test_killed_anywhere_and_started_again_and_again(whole, tmp_path, monkeypatch):
    """Rows that were written since the last checkpoint are forgotten, also where they are in files of other steps."""

    def start() -> tuple[launch.Result | None, int]:
        """What it came to, and the step it went on from."""
        output, result = io.StringIO(), None
        with contextlib.suppress(Killed):
            result = launch.run(short(tmp_path), Console(file=output, width=300))
        told = re.search(r"(\d+) of 16 steps are done", output.getvalue())
        return result, int(told[1]) if told else 0

    for step, where, name, call in KILLS:
        with monkeypatch.context() as patched:
            killed(patched, where, name, call)
            if step == 6:
                patched.setattr(ledger, "PART_ROWS", 100)  # a file a step
            assert start() == (None, step)
        if step == 6:
            assert [part.first for part in ledger.parts(f"{tmp_path}/run")] == [0, 3, 5, 6, 7, 8, 9, 10]
    result, step = start()
    assert step == 15
    assert_same(result, whole)


def few(made: Recipe, **changes) -> Recipe:
    """Half as many steps: evaluated after 4, 5 and 8, a checkpoint every 3 too."""
    return replace(made, schedule=replace(made.schedule, first_cycle=4), **changes)


def test_what_an_objective_and_an_optimiser_remember_goes_on_too(tmp_path, monkeypatch):
    changes = {"objective": METHODS["elr"](), "optimiser": "adamw", "clip": 1.0}
    schedule = Schedule(lr=0.003, first_cycle=8, cycles=2, t_mul=1.0)
    made = [few(replace(short(tmp_path / name), schedule=schedule), **changes) for name in ("whole", "killed")]
    with monkeypatch.context() as patched:
        killed(patched, worker, "update", 7)
        with pytest.raises(Killed):
            run(made[1])
    assert_same(run(made[1])[0], run(made[0])[0])


def test_a_pretrained_network_goes_on_without_the_file_it_started_from(tmp_path, monkeypatch):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    made = [
        few(
            short(tmp_path / name),
            objective=METHODS["supervised"](),
            network="resnet10t",
            weights=str(tmp_path / "weights.pth"),
            optimiser="adamw",
            clip=1.0,
            layer_decay=0.8,
            freeze="backbone",
            freeze_steps=3,
        )
        for name in ("whole", "killed")
    ]
    whole, printed = run(made[0])
    assert re.search("starts from resnet10t, .* tensors, sha256 [0-9a-f]{16}; new: fc.bias, fc.weight", printed)
    with monkeypatch.context() as patched:
        killed(patched, worker, "update", 7)
        with pytest.raises(Killed):
            run(made[1])
    sha256 = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    assert recipe_file.read(whole.folder)[recipe_file.WEIGHTS] == sha256
    (tmp_path / "weights.pth").unlink()
    assert_same(run(made[1])[0], whole)
    model = model_file.read(whole.folder)
    assert model.recipe["weights"] == "a file"
    mean = torch.tensor(timm.get_pretrained_cfg("resnet10t").mean).mean()
    std = torch.tensor(timm.get_pretrained_cfg("resnet10t").std).mean()
    network = model.bare_network(torch.float32)
    torch.testing.assert_close(network.input_scale.flatten(), (0.5 / std)[None])
    torch.testing.assert_close(network.input_shift.flatten(), ((0.5 - mean) / std)[None])


@pytest.mark.parametrize("harm", ["state.pt", "commit.json"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(whole, tmp_path, harm):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    (folder / "step_00000016" / harm).write_bytes(b"half a file")
    result, printed = run(short(tmp_path))
    assert ("step_00000016/state.pt is damaged" in printed) == (harm == "state.pt")
    assert "15 of 16 steps are done" in printed
    assert_same(result, whole)


def test_without_any_whole_checkpoint_the_run_begins_anew(whole, tmp_path):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    for state in folder.glob("step_*/state.pt"):
        state.write_bytes(b"half a file")
    result, printed = run(short(tmp_path))
    assert printed.count("is damaged") == 2
    assert_same(result, whole)


def test_workers_that_are_lost_after_the_last_checkpoint_have_nothing_left_to_do(whole, tmp_path, monkeypatch):
    """The launching process still thinks of an earlier step, as it does when a group of workers is started again."""
    shutil.copytree(whole.folder, tmp_path / "run")
    monkeypatch.setattr(launch, "_resume_point", lambda *_: (15, []))
    assert_same(run(short(tmp_path))[0], whole)


def test_a_checkpoint_that_workers_find_damaged_is_not_there_at_the_next_start(whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    (folder / "step_00000016" / "state.pt").write_bytes(b"half a file")
    with monkeypatch.context() as patched:
        patched.setattr(launch, "_resume_point", lambda *_: (15, []))
        with pytest.raises((ray.train.TrainingFailedError, checkpoint.DamagedError), match="step_00000016"):
            run(short(tmp_path))  # workers in processes of their own would be started again
    result, printed = run(short(tmp_path))
    assert "15 of 16 steps are done" in printed
    assert_same(result, whole)


def test_storage_that_fails_for_a_while_loses_nothing(whole, tmp_path, monkeypatch):
    """As on a full disk: rows are held back, checkpoints left out, and the run goes on."""
    write, left = storage.write, [6]

    def on_a_full_disk(fs, path, data):
        if ("ledger" in path or "step_" in path) and left[0]:
            left[0] -= 1
            raise InputError(f"cannot use {path} (No space left on device): free some space there")
        write(fs, path, data)

    monkeypatch.setattr(storage, "write", on_a_full_disk)
    result, printed = run(short(tmp_path))
    assert "ledger rows of steps 0 to 2 are held back" in printed
    assert_same(result, whole)


def test_a_last_checkpoint_that_cannot_be_written_is_no_success(whole, tmp_path, monkeypatch):
    folder, write = shutil.copytree(whole.folder, tmp_path / "run"), storage.write
    shutil.rmtree(folder / "step_00000016")

    def on_a_full_disk(fs, path, data):
        if "step_00000016" in path:
            raise InputError("cannot use there (No space left on device): free some space there")
        write(fs, path, data)

    monkeypatch.setattr(storage, "write", on_a_full_disk)
    with pytest.raises(InputError, match=r"no checkpoint was written: .*No space left"):
        run(short(tmp_path))


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    made = replace(short(tmp_path), checkpoint_steps=0, checkpoint_minutes=1e-6, evaluate_every=0)
    made = replace(made, objective=METHODS["supervised"]())
    seen = []
    save = checkpoint.Writer.save
    monkeypatch.setattr(
        checkpoint.Writer, "save", lambda self, state, top1: seen.append(state["step"]) or save(self, state, top1)
    )
    run(made)
    assert seen == [8, 10, 16]  # looked at every 10 steps; 8 and 16 are cycle ends


def test_what_may_change_between_starts(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    made = replace(short(tmp_path), checkpoint_steps=7, checkpoint_minutes=1.0, timeout=60.0, actors=2)
    assert run(made)[0].history == whole.history


def test_a_run_that_starts_again_and_again_at_one_step_gives_up(tmp_path):
    for _ in range(notes.MOST_STARTS):
        notes.count_start(str(tmp_path), 30)
    notes.count_start(str(tmp_path), 40)
    for _ in range(notes.MOST_STARTS - 1):
        notes.count_start(str(tmp_path), 40)
    notes.write(str(tmp_path), notes.LAST_ERROR, "RuntimeError('so it was')")
    with pytest.raises(InputError, match=r"started 8 times at step 40 and came to no checkpoint .*so it was"):
        notes.count_start(str(tmp_path), 40)


@pytest.mark.parametrize(
    ("error", "starts"),
    [
        (TypeError("conv2d() got 5 arguments"), 1),  # a fault of the program
        (RuntimeError("shape '[2, 3]' is invalid for input of size 7"), 2),  # torch's words for nearly everything
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), None),  # the next start may have another GPU
        (torch.distributed.DistNetworkError("the rendezvous is gone"), None),
        (OSError("no route to host"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_retry_mends_is_not_tried_again_and_again(error, starts, tmp_path, monkeypatch):
    def fail(job, closing):
        notes.count_start(job.folder, 10)
        raise error

    monkeypatch.setattr(loop, "_train", fail)
    config = {"job": loop.RayJob(short(tmp_path), None, (), str(tmp_path), None, {}, ())}
    for start in range(1, 4):
        with pytest.raises(type(error)):
            loop.train(config)
        if start == starts:
            assert loop.train(config) == {"error": repr(error)}
            break
        assert not notes.read(str(tmp_path), notes.FAILURE)
    assert (start == starts) == (starts is not None)


def test_an_error_ends_a_run_again_only_at_the_same_step_and_in_the_next_start(tmp_path):
    folder = str(tmp_path)
    notes.count_start(folder, 10)
    assert not notes.ends_again(folder, "one")
    assert not notes.ends_again(folder, "one")  # by another worker of the same start
    notes.count_start(folder, 20)  # a checkpoint further
    assert not notes.ends_again(folder, "one")
    notes.count_start(folder, 20)
    assert not notes.ends_again(folder, "two")
    notes.count_start(folder, 20)
    notes.count_start(folder, 20)  # killed without an error
    assert not notes.ends_again(folder, "two")
    notes.count_start(folder, 20)
    assert notes.ends_again(folder, "two")
