"""What a sweep is: where it starts, how much it tries, and how; the recipe at any of its points."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from pipeline import storage
from training.recipe import Recipe, override


@dataclass(frozen=True)
class Sweep:
    """Search for the fields of a recipe that do best on held-out trusted examples."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """Where the search starts; its name, with -sweep, is the sweep's folder under storage."""
    trials: int = 20
    """Trials, in all; a grid has as many as it has points."""
    algorithm: Literal["optuna", "random", "grid"] = "optuna"
    """How points are chosen: Optuna's TPE learns from the trials before; all have early stopping (ASHA)."""
    search: tuple[str, ...] = ()
    """What is searched instead of this script's SPACE: PATH=LOW..HIGH, PATH=log:LOW..HIGH or PATH=A,B,C."""
    metric: Literal["top1", "top5"] = "top1"
    """What is maximised, on the validation examples."""
    validation: int = 0
    """Trusted examples of each class that validate and do not train; 0: half of the smallest class's, at most 50."""
    seeds: int = 1
    """Seeds that the best recipe is retrained on, with all trusted examples, before the test set is read."""
    parallel: int = 0
    """Trials at a time; 0: as many as fit."""
    resume: bool = False
    """Go on with a sweep that was stopped."""

    def __post_init__(self) -> None:
        for name, least in {"trials": 1, "validation": 0, "seeds": 0, "parallel": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {least} or more")

    @property
    def folder(self) -> str:
        """Return the absolute path or URL of everything the sweep writes."""
        where = self.recipe.storage if "://" in self.recipe.storage else os.path.abspath(self.recipe.storage)
        return storage.join(where, f"{self.recipe.name}-sweep")

    def at(self, point: Mapping[str, Any]) -> Recipe:
        """Return the recipe with the fields of `point`, and a schedule whose whole cycles fill the sweep's steps."""
        recipe = override(self.recipe, point)
        return replace(recipe, schedule=recipe.schedule.filling(self.recipe.schedule.steps))
