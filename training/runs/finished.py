"""A finished run, as its folder shows it: for those who look back at what it learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.dataset import Dataset, InputError
from training.engine.schedule import Schedule
from training.recipe import source_of
from training.runs import ledger, model_file, recipe_file


@dataclass(frozen=True)
class Run:
    """Hold a finished run."""

    folder: str
    recipe: dict[str, Any]  # recipe.json
    schedule: Schedule
    model: model_file.ModelFile

    @staticmethod
    def open(folder: str) -> Run:
        """Open the run in `folder`; raises InputError where there is none that has finished."""
        recipe = recipe_file.read(folder)
        if not ledger.parts(folder):
            raise InputError(f"{folder} holds no ledger: copy it with the run, or train again")
        return Run(folder, recipe, Schedule(**recipe["schedule"]), model_file.read(folder))

    def load(self, data: str) -> Dataset:
        """Load the data set at `data`; raises InputError where it is not the one that the run was trained on."""
        dataset = source_of(self.recipe["dataset"]).load(data, self.recipe["seed"])
        self.model.require(dataset.class_names, data or "the data set")
        if dataset.digest != self.recipe[recipe_file.DATA]:
            raise InputError(f"{data or 'the data set'} is not what {self.folder} was trained on: give that --data")
        return dataset
