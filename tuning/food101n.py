"""What to search on Food-101N."""

from __future__ import annotations

from ray import tune

from training import food101n
from training.recipe import Recipe
from tuning import search, space

SPACE = {
    **space.METHOD,
    **space.SCHEDULE,
    "schedule.first_cycle": tune.lograndint(1_000, 8_000),  # half an epoch to four
}


def recipe(method: str) -> Recipe:
    """A sweep on Food-101N: half of the trusted photographs of each class, at most 50, validate.

    python tuning/food101n.py --data gs://b/food101n --trials 40 --workers 4 --actors 32 --parallel 4
    python training/food101n.py --data gs://b/food101n --recipe runs/food101n-sweep/best.yaml
    """
    return food101n.recipe(method)


if __name__ == "__main__":
    search.main(recipe, food101n.recipe, SPACE)
