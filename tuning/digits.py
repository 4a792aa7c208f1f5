"""What to search on digits: the sweep that two cores can do, and where to start one for data of your own."""

from __future__ import annotations

from dataclasses import replace

from pipeline.digits import Digits
from training import digits
from training.engine.schedule import Schedule
from training.recipe import Recipe
from tuning import search, space

SPACE = {**space.METHOD, "schedule.lr": space.SCHEDULE["schedule.lr"]}


def recipe(method: str) -> Recipe:
    """A sweep on handwritten digits with 80 % label noise: 15 trusted images a class, of which 7 validate.

    python tuning/digits.py --trials 12 --seeds 3
    """
    return replace(
        digits.recipe(method),
        dataset=Digits(probe_per_class=15),
        schedule=Schedule(lr=0.1, first_cycle=57, cycles=3, t_mul=2),  # ends at 57, 171 and 399: rungs a factor apart
        workers=0,  # in the trial's own process
        actors=1,
        evaluate_every=0,
    )


if __name__ == "__main__":
    search.main(recipe, digits.recipe, SPACE)
