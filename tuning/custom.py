"""What to search on your own images."""

from __future__ import annotations

from ray import tune

from training import custom
from training.recipe import Recipe
from tuning import search, space

SPACE = {
    **space.METHOD,
    **space.SCHEDULE,
    "schedule.first_cycle": tune.lograndint(200, 5_000),
}


def recipe(method: str) -> Recipe:
    """A sweep on your own images: half of the trusted images of each class, at most 50, validate.

    python tuning/custom.py --data gs://b/mine --trials 40 --workers 4 --actors 32 --parallel 4
    python training/custom.py --data gs://b/mine --recipe runs/custom-sweep/best.yaml
    """
    return custom.recipe(method)


if __name__ == "__main__":
    search.main(recipe, custom.recipe, SPACE)
