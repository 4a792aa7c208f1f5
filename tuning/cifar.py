"""What to search on CIFAR."""

from __future__ import annotations

from ray import tune

from training import cifar
from training.recipe import Recipe
from tuning import search, space

SPACE = {
    **space.METHOD,
    **space.SCHEDULE,
    "schedule.first_cycle": tune.lograndint(250, 2_000),  # half an epoch to four
}


def recipe(method: str) -> Recipe:
    """A sweep on CIFAR: 5 of the 10 trusted images of each class validate.

    python tuning/cifar.py --data /path/to/cifar --trials 40
    python training/cifar.py --data /path/to/cifar --recipe runs/cifar-sweep/best.yaml
    """
    return cifar.recipe(method)


if __name__ == "__main__":
    search.main(recipe, cifar.recipe, SPACE)
