"""CIFAR-10 and CIFAR-100 with synthetic, semantic or human label noise: the paper's Tables 1–4 and 6–9."""

from __future__ import annotations

from pipeline.cifar import Cifar
from pipeline.noise import Noise
from training.engine.schedule import Schedule
from training.launch import main
from training.objectives.registry import METHODS
from training.recipe import Recipe


def recipe(method: str) -> Recipe:
    """Train on CIFAR-10, 40 % uniform noise, 10 trusted images a class, WRN-28-10 (Table 1: 95.9 %).

    python training/cifar.py --data /path/to/cifar --dataset.noise.rate 0.8      a GPU day
    ResNet-29 instead: --network resnet29 --weight-decay 2e-4 --decay kernels     (Table 1: 92.5 %)
    CIFAR-100:         --dataset.classes 100
    human labels:      --dataset.noise.kind labels --dataset.noise.rate 0 --dataset.noise.source labels.npz:worse
    """
    without_policy = method in ("M-1", "M-2", "M-7")  # Table 9, column PA, as docs/method.md, "Ablations", reads it
    dataset = Cifar(
        noise=Noise("uniform", 0.4),
        probe_per_class=1 if method == "M-10" else 10,
        policy="none" if without_policy else "autoaugment",
    )
    return Recipe(
        name="cifar",
        dataset=dataset,
        objective=METHODS[method](),
        network="wrn-28-10",  # §5.2
        schedule=Schedule(
            lr=0.1, first_cycle=500, cycles=11
        ),  # one epoch of 50,000; 200 epochs are read at step 85,498
        batch=100,
        probe_batch=100,
        group=25,
        weight_decay=5e-4,
        evaluate_every=2_000,
    )


if __name__ == "__main__":
    main(recipe)
