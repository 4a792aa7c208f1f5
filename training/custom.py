"""Your own images: a folder per class, a manifest or Parquet, with a trusted list."""

from __future__ import annotations

from dataclasses import replace

from pipeline.index import Sharded
from training.engine.schedule import Schedule
from training.launch import main
from training.objectives.registry import METHODS
from training.recipe import Recipe, tuned


def recipe(method: str) -> Recipe:
    """Train on your images and classes, ResNet-50 from random weights at 224 px.

    python -m pipeline.check custom gs://raw/mine --trusted gs://raw/mine/trusted.csv
    python -m pipeline.shards custom gs://raw/mine --trusted gs://raw/mine/trusted.csv --out gs://b/mine
    python training/custom.py --data gs://b/mine --schedule.first-cycle STEPS_OF_AN_EPOCH
    """
    return Recipe(
        name="custom",
        dataset=Sharded("custom"),
        objective=tuned(METHODS[method](), p=1, kl=4),  # the gentle end of what the paper used on web photographs
        network="resnet50",
        schedule=Schedule(lr=0.1, first_cycle=1_000, cycles=6),
        batch=128,
        probe_batch=128,
        group=32,
        weight_decay=4e-4,
        actors=8,
    )


def features(method: str, rows: int = 10_000) -> Recipe:
    """Train a linear layer on stored features of your images, in this process and in minutes.

    python -m pipeline.embed gs://b/mine --network resnet50.a1_in1k --weights pretrained --out gs://b/features
    python training/custom.py --variant features --data gs://b/features

    `rows` is how many training images there are, about: the run has ten epochs, but 600 to 2,000 steps.
    p and rate were chosen on CIFAR-10 with human labels, seed 0.
    """
    batch = 128 if rows < 100_000 else 1024
    made = recipe(method)
    return replace(
        made,
        name="features",
        objective=tuned(made.objective, p=20, kl=4),
        network="linear",
        schedule=Schedule(lr=0.05, first_cycle=min(max(10 * rows // batch, 600), 2_000), cycles=1),
        batch=batch,
        probe_batch=min(batch, 256),  # trusted images are few hundred
        group=batch // 4,
        workers=0,
    )


if __name__ == "__main__":
    main(recipe, features)
