"""Where a run's figures go beside its own files: TensorBoard, MLflow or Weights & Biases."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline import storage
from pipeline.dataset import InputError
from training.recipe import Recipe, publishable

RUN_ID = "mlflow_run_id"  # file in the run's folder


class Tracker:
    """Log rank 0's rows. Raises ModuleNotFoundError, naming the fix, where the tracker is not installed."""

    def __init__(self, recipe: Recipe, folder: str) -> None:
        self.kind = recipe.tracker
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # Event files grow by appending, which object stores cannot do: they are copied whole after every row.
            self.scratch, self.folder = tempfile.TemporaryDirectory(), f"{folder}/tensorboard"
            self.writer = SummaryWriter(self.scratch.name)
            return
        require(self.kind)
        if self.kind == "mlflow":
            import mlflow

            mlflow.set_experiment("winnow")
            mlflow.start_run(run_id=_run_id(folder), run_name=recipe.name)
            _note_run_id(folder, mlflow.active_run().info.run_id)
            mlflow.log_dict(publishable(recipe), "recipe.json")
        else:
            import wandb

            # A start of the run goes on in what the one before has logged.
            run_id = hashlib.sha256(folder.encode()).hexdigest()[:16]
            wandb.init(project="winnow", name=recipe.name, id=run_id, resume="allow", config=publishable(recipe))

    def log(self, row: Mapping[str, float]) -> str:
        """Log every figure of `row`, at its step; return "", or what went wrong, which is no reason to stop a run."""
        try:
            self._log(row)
        except Exception as error:  # servers and disks fail in many ways
            return f"figures of step {row['step']:.0f} were not logged: {str(error).splitlines()[0]}"
        return ""

    def _log(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        figures = {name: value for name, value in row.items() if name != "step"}
        if self.kind == "tensorboard":
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
            fs, path = storage.connect(self.folder)
            for file in Path(self.scratch.name).iterdir():
                storage.commit(fs, str(file), storage.join(path, file.name))
        elif self.kind == "mlflow":
            import mlflow

            mlflow.log_metrics(figures, step=step)
        else:
            import wandb

            wandb.log(figures, step=step)

    def close(self) -> None:
        """Finish the tracker's own run."""
        if self.kind == "tensorboard":
            self.writer.close()
            self.scratch.cleanup()
        elif self.kind == "mlflow":
            import mlflow

            mlflow.end_run()
        else:
            import wandb

            wandb.finish()


def _run_id(folder: str) -> str | None:
    fs, path = storage.connect(folder)
    try:
        return storage.read(fs, storage.join(path, RUN_ID)).decode()
    except FileNotFoundError:
        return None


def _note_run_id(folder: str, run_id: str) -> None:
    fs, path = storage.connect(folder)
    storage.write(fs, storage.join(path, RUN_ID), run_id.encode())


def require(kind: str) -> None:
    """Raise ModuleNotFoundError where the tracker's package is missing, InputError where it has nowhere to write."""
    import importlib.util

    if kind == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        raise InputError("--tracker mlflow needs a server: set MLFLOW_TRACKING_URI to its address")
    if kind != "tensorboard" and importlib.util.find_spec(kind) is None:
        raise ModuleNotFoundError(f"--tracker {kind} needs a package that is not here: pip install -e '.[trackers]'")
