"""A sweep on real Ray Tune: killed and resumed, with trials that fail, and with a test set that nobody may read."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray import tune
from rich.console import Console

from pipeline.dataset import Dataset, Examples, InputError
from pipeline.digits import Digits
from training import digits, launch
from training.engine.schedule import Schedule
from training.recipe import Recipe, parse
from tuning import digits as tuned
from tuning import search
from tuning.search import Sweep

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sealed:
    """A test set that ends the program of whoever looks at it before `until` is there."""

    inside: Examples
    until: str

    def opened(self) -> Examples:
        assert Path(self.until).exists(), "the test set was read during the sweep"
        return self.inside

    def __len__(self) -> int:
        return len(self.opened())

    @property
    def row_groups(self) -> np.ndarray:
        return self.opened().row_groups

    @property
    def digest(self) -> str:
        return self.opened().digest

    def take(self, rows: np.ndarray) -> Examples:
        return self.opened().take(rows)


@dataclass(frozen=True)
class SealedDigits(Digits):
    """Digits whose test set is sealed until a best recipe is found."""

    until: str = ""

    def load(self, url: str, seed: int) -> Dataset:
        dataset = super().load(url, seed)
        return replace(dataset, tests={"test": Sealed(dataset.tests["test"], self.until)})


def recipe(method: str) -> Recipe:
    """A run of two cycles of three steps."""
    return replace(
        digits.recipe(method),
        dataset=Digits(probe_per_class=6),
        network="wrn-10-1",
        schedule=Schedule(lr=0.1, first_cycle=3, cycles=2, t_mul=1),
        workers=0,
        actors=1,
        evaluate_every=0,
    )


def run(sweep: Sweep, space: dict | None = None) -> str:
    output = io.StringIO()
    first = [sweep.recipe]
    base = replace(digits.recipe("winnow"), dataset=sweep.recipe.dataset)
    search.run(sweep, space or {}, first, "winnow", base, Console(file=output, width=300))
    return output.getvalue()


def test_failed_trials_are_told_and_the_test_set_is_read_in_the_end_only(local_ray, tmp_path, capsys):
    best = tmp_path / "digits-sweep" / "best.yaml"
    sealed = SealedDigits(probe_per_class=6, until=str(best))
    sweep = Sweep(
        replace(recipe("winnow"), dataset=sealed, storage=str(tmp_path)),
        algorithm="grid",
        search=("schedule.lr=0.1,1e30", "schedule.first_cycle=3,6"),
        parallel=2,
    )
    output = run(sweep)
    rows = pq.read_table(best.parent / "sweep.parquet").to_pylist()
    assert sorted((row["schedule.lr"], row["schedule.first_cycle"]) for row in rows) == [
        (0.1, 3),
        (0.1, 6),
        (1e30, 3),
        (1e30, 6),
    ]
    for row in rows:
        if row["schedule.lr"] == 1e30:
            assert row["state"] == "failed"
            assert "the loss is" in row["reason"]
            assert "Lower schedule.lr" in row["reason"]
        else:
            assert row["state"] in ("finished", "stopped")
    assert any(row["state"] == "finished" and row["steps"] == 6 for row in rows)
    assert "Lower schedule.lr" in output
    assert (
        len(re.findall(r"^trial ./4 .*: failed: the loss is .*Lower schedule.lr", capsys.readouterr().out, re.M)) == 2
    )
    result = json.loads((best.parent / "result.json").read_text())
    assert result["steps"] == sum(row["steps"] for row in rows)
    assert result["steps_without_early_stopping"] == 4 * 6
    assert len(result["test_top1"]) == 1
    assert (best.parent / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="holds a sweep: go on with it by --resume"):
        run(replace(sweep, resume=False))
    with pytest.raises(InputError, match="another algorithm"):
        run(replace(sweep, resume=True, algorithm="random"))


def test_the_seal_holds(tmp_path):
    test = SealedDigits(until=str(tmp_path / "never")).load("", 0).tests["test"]
    for look in (len, lambda sealed: sealed.digest, lambda sealed: sealed.take(np.arange(3))):
        with pytest.raises(AssertionError, match="was read during the sweep"):
            look(test)


def command(storage: Path) -> list[str]:
    """The tuning script, and what it is told."""
    short = ["--schedule.first-cycle", "3", "--schedule.cycles", "2", "--schedule.t-mul", "1", "--network", "wrn-10-1"]
    asked = ["tuning/digits.py", "--storage", str(storage), "--trials", "3", "--parallel", "1"]
    return [*asked, "--seeds", "0", *short]


def start(storage: Path) -> subprocess.Popen:
    """The script in a process group of its own, with Ray of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, *command(storage)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_killed_sweep_resumes_with_its_trials(local_ray, tmp_path, monkeypatch):
    killed = start(tmp_path)
    assert killed.stdout is not None
    lines = []
    for line in killed.stdout:
        lines.append(line)
        if re.match(r"trial 2/3 .* at step", line):  # the second trial has trained a cycle
            break
    assert any(re.match(r"trial 1/3 .*: (finished|stopped early)", line) for line in lines), lines
    time.sleep(2.5)  # Tune keeps its state every second
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    folder = tmp_path / "digits-sweep"
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "trials").glob("*/model.safetensors")}
    started = {path.name for path in (folder / "trials").iterdir()}
    models = {path: path.stat().st_mtime_ns for path in (folder / "trials").glob("*/step_*/state.pt")}
    assert len(started) >= 2

    # The same command again, in this process: what it needs of the sweep that was killed is in the folder.
    monkeypatch.setattr(sys, "argv", [*command(tmp_path), "--resume"])
    search.main(tuned.recipe, digits.recipe, tuned.SPACE)
    rows = pq.read_table(folder / "sweep.parquet").to_pylist()
    assert {row["trial"] for row in rows} == {path.name for path in (folder / "trials").iterdir()}
    assert started <= {row["trial"] for row in rows}
    assert len(rows) == 3
    for path, changed in models.items():  # what was trained was not trained again
        assert not path.exists() or path.stat().st_mtime_ns == changed, path
    assert before or models

    made = parse(digits.recipe, ["--recipe", str(folder / "best.yaml"), "--storage", str(tmp_path), "--name", "again"])
    assert made.dataset == Digits(probe_per_class=15)
    assert made.schedule == Schedule(lr=made.schedule.lr, first_cycle=3, cycles=2, t_mul=1)
    result = launch.run(replace(made, workers=0, evaluate_every=0, actors=1), Console(file=io.StringIO()))
    assert result.history[-1]["step"] == 6


def test_what_cannot_work_is_said_before_a_trial_starts(local_ray, tmp_path):
    plain = replace(recipe("winnow"), storage=str(tmp_path))
    space = {"objective.p": tune.loguniform(0.1, 10)}
    with pytest.raises(InputError, match="holds no sweep to resume"):
        run(Sweep(plain, resume=True), space)
    with pytest.raises(InputError, match="want 15 CPUs each, and the cluster has 6 at most"):
        run(Sweep(replace(plain, name="a", workers=2, actors=12)), space)
    with pytest.raises(InputError, match="a class has 6 trusted examples, too few to hold out 6"):
        run(Sweep(replace(plain, name="b"), validation=6), space)
    with pytest.raises(InputError, match="a grid combines values"):
        run(Sweep(replace(plain, name="c"), algorithm="grid"), space)
    with pytest.raises(InputError, match="is an empty range"):
        run(Sweep(replace(plain, name="d"), search=("objective.p=5..1",)), space)
    with pytest.raises(SystemExit):
        run(Sweep(replace(plain, name="e"), search=("objective.kll=1..5",)), space)
    assert not list(tmp_path.glob("*/*"))


def test_a_sweep_of_no_trials_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trials is 0: it must be 1 or more"):
        Sweep(recipe("winnow"), trials=0)
