"""Where a run's figures go beside its own files: TensorBoard, MLflow or Weights & Biases."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline import storage
from pipeline.dataset import InputError
from training.recipe import Recipe, as_json


class Tracker:
    """Logs rank 0's rows. Raises ModuleNotFoundError, naming the mend, where the tracker is not installed."""

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
            mlflow.start_run(run_name=recipe.name)
            mlflow.log_dict(as_json(recipe), "recipe.json")
        else:
            import wandb

            wandb.init(project="winnow", name=recipe.name, config=as_json(recipe))

    def log(self, row: Mapping[str, float]) -> None:
        """Every figure of `row`, at its step."""
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


def require(kind: str) -> None:
    """Raise ModuleNotFoundError where the tracker's package is missing, InputError where it has nowhere to write."""
    import importlib.util

    if kind == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        raise InputError("--tracker mlflow needs a server: set MLFLOW_TRACKING_URI to its address")
    if kind != "tensorboard" and importlib.util.find_spec(kind) is None:
        raise ModuleNotFoundError(f"--tracker {kind} needs a package that is not here: pip install -e '.[trackers]'")
