"""Every tracker takes the same rows, offline; one that is not installed is named with its fix."""

from dataclasses import replace

import pytest

from pipeline import storage
from pipeline.dataset import InputError
from training.digits import recipe
from training.runs import tracking

ROWS = [{"step": 5, "loss": 2.5, "top1": 0.25}, {"step": 9, "loss": 1.5, "top1": 0.5}]


def log(kind: str, folder: str) -> None:
    tracker = tracking.Tracker(replace(recipe("supervised"), tracker=kind), folder)
    for row in ROWS:
        tracker.log(row)
    tracker.close()


@pytest.mark.parametrize("place", ["local", "cloud"])
def test_tensorboard_event_files(tmp_path, place, request):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = f"{tmp_path}/run" if place == "local" else request.getfixturevalue("bucket") + "/run"
    log("tensorboard", folder)
    fs, path = storage.connect(f"{folder}/tensorboard")
    (name,) = fs.ls(path, detail=False)
    (tmp_path / name.rpartition("/")[2]).write_bytes(storage.read(fs, name))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("top1")] == [(5, 0.25), (9, 0.5)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log("mlflow", str(tmp_path))
    (metric,) = tmp_path.glob("*/*/metrics/top1")
    assert [line.split()[1:] for line in metric.read_text().splitlines()] == [["0.25", "5"], ["0.5", "9"]]
    assert list(tmp_path.glob("*/*/artifacts/recipe.json"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_run(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    log("wandb", str(tmp_path))
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run.stat().st_size > 0


def test_missing_package_is_named_with_the_mend(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    tracking.require("tensorboard")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        tracking.require("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    with pytest.raises(ModuleNotFoundError, match=r"--tracker mlflow .* pip install -e '\.\[trackers\]'"):
        tracking.require("mlflow")
