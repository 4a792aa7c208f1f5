"""Semantic label noise: all training images labelled by a weak network that has seen a few clean ones (§5.2, Table 4).

python -m benchmarks.semantic_noise --data /data/cifar --out /data/cifar/cifar10_labels.npz
python -m benchmarks.semantic_noise --data /data/cifar --out /data/cifar/cifar100_labels.npz --classes 100 --clean 10000
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from pipeline.cifar import Cifar
from pipeline.dataset import Examples
from training import cifar
from training.engine.schedule import Schedule
from training.launch import guarded, run
from training.runs.model_file import read


@dataclass(frozen=True)
class Settings:
    """Say which network labels what."""

    data: str
    """Folder of CIFAR."""
    out: str
    """The .npz that the labels are added to, in training order, as the array semantic_NETWORK."""
    classes: Literal[10, 100] = 10
    """CIFAR-10 or CIFAR-100."""
    clean: int = 2_500
    """Clean images that the network learns from (the paper: 5 % of CIFAR-10, 20 % of CIFAR-100)."""
    network: str = "vgg13"
    """Its name; the paper's is the hardest of DenseNet-100, ResNet and VGG-13."""
    size: int = 32
    """Pixels a side."""
    steps: int = 10_000
    """Steps of 100 images, one cosine cycle."""
    storage: str = "runs"
    """Where the run is kept; the same command goes on with it."""
    seed: int = 0
    """Which clean images, and the network's draws."""


def semantic_labels(settings: Settings, console: Console) -> tuple[np.ndarray, np.ndarray]:
    """Return (what the network says of every training image, its true label), in training order.

    Raises as `launch.run`.
    """
    dataset = Cifar(classes=settings.classes, probe_per_class=1, limit=settings.clean, size=settings.size)
    name = f"semantic-{settings.network}-{settings.classes}-{settings.clean}-{settings.size}-{settings.seed}"
    recipe = replace(
        cifar.recipe("supervised"), name=name, dataset=dataset, network=settings.network, data=settings.data,
        storage=settings.storage, schedule=Schedule(first_cycle=settings.steps, cycles=1), evaluate_every=0,
        workers=0, seed=settings.seed,
    )  # fmt: skip
    model = read(run(recipe, console).folder)
    whole = replace(dataset, limit=0).load(settings.data, settings.seed)
    assert isinstance(whole.train, Examples)
    label_N = np.empty(len(whole.train) + len(whole.probe), np.int64)
    true_N = np.empty_like(label_N)
    for examples in (whole.train, whole.probe):  # ids are rows of the training files
        label_N[examples.id_N] = model.probabilities(examples).argmax(1)
        true_N[examples.id_N] = examples.label_N
    return label_N, true_N


def main() -> None:
    """Train, label, and add the array to the file."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    label_N, true_N = semantic_labels(settings, console)
    arrays = dict(np.load(settings.out, allow_pickle=False)) if Path(settings.out).exists() else {}
    name = f"semantic_{settings.network}".replace("-", "_")
    np.savez_compressed(settings.out, **{**arrays, name: label_N})
    console.print(f"{settings.out}:{name}: {100 * np.mean(label_N != true_N):.1f} % of labels wrong", highlight=False)


if __name__ == "__main__":
    guarded(main)
