"""What to search on Clothing1M."""

from __future__ import annotations

from ray import tune

from training import clothing1m
from training.recipe import Recipe
from tuning import search, space

SPACE = {
    **space.METHOD,
    **space.SCHEDULE,
    "schedule.first_cycle": tune.lograndint(2_000, 16_000),  # a quarter of an epoch to two
}


def recipe(method: str) -> Recipe:
    """A sweep on Clothing1M: 50 trusted photographs of each class validate.

    python tuning/clothing1m.py --data gs://b/clothing1m --trials 40 --workers 4 --actors 32 --parallel 4
    python training/clothing1m.py --data gs://b/clothing1m --recipe runs/clothing1m-sweep/best.yaml
    """
    return clothing1m.recipe(method)


if __name__ == "__main__":
    search.main(recipe, clothing1m.recipe, SPACE)
