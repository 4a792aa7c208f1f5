"""What to search on WebVision."""

from __future__ import annotations

from ray import tune

from training import webvision
from training.recipe import Recipe
from tuning import search, space

SPACE = {
    **space.METHOD,
    **space.SCHEDULE,
    "schedule.first_cycle": tune.lograndint(250, 2_000),  # half an epoch of 515 steps to four
}


def recipe(method: str) -> Recipe:
    """A sweep on WebVision: a share of WebVision mini's trusted ImageNet photographs validates.

    python tuning/webvision.py --data gs://b/webvision-mini --trials 40 --workers 4 --actors 32 --parallel 4
    python training/webvision.py --data gs://b/webvision-mini --recipe runs/webvision-sweep/best.yaml
    """
    return webvision.recipe(method)


if __name__ == "__main__":
    search.main(recipe, webvision.recipe, SPACE)
