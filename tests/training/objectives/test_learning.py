"""Every baseline learns from labels of which many are wrong, and tells them apart where its method says that it can.

Shapes: B noisy examples, M probe examples, N of the training set, K classes, D numbers an image.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from training.engine.optimiser import Sgd, kernels
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.interface import Alone, Batch
from training.objectives.registry import BASELINES, METHODS

K, D, N, B, M, STEPS = 4, 16, 320, 64, 32, 100
LEAST = {"forward": 1.3}  # in so few steps its T̂ is not far from the identity
LONGER = {"mlc": 200}  # half of its trusted images teach, so that 16 a step judge


def clusters(seed: int = 0):
    """Images of K overlapping clusters, their classes, and labels of which 45 % were redrawn."""
    rng = np.random.default_rng(seed)
    centre, class_N = rng.normal(size=(K, D)), rng.integers(0, K, 2 * N + M)
    image_NCHW = torch.from_numpy(centre[class_N] + 0.9 * rng.normal(size=(len(class_N), D))).float()[:, :, None, None]
    noisy_N = np.where(rng.random(len(class_N)) < 0.45, rng.integers(0, K, len(class_N)), class_N)
    return image_NCHW, torch.from_numpy(class_N), torch.from_numpy(noisy_N)


def network() -> nn.Module:
    torch.manual_seed(0)
    hidden = nn.Linear(D, 64)
    return nn.Sequential(nn.Flatten(), hidden, nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, K))


@pytest.fixture(scope="module")
def trained():
    image, class_, noisy = clusters()
    train, probe, test = slice(N), slice(N, N + M), slice(N + M, None)
    found = {}

    def run(name: str, steps: int):
        if (name, steps) in found:
            return found[name, steps]
        objective, model, rng = METHODS[name](), network(), np.random.default_rng(1)
        memory = objective.memory(model, N, K)
        optimiser = Sgd(model, memory, momentum=0.9, weight_decay=5e-4, decays=kernels)
        state = TrainState(model, optimiser, average=True, memory=memory)
        rows = np.concatenate([rng.permutation(N) for _ in range(steps * B // N)])
        judged = {"right": [], "wrong": [], "differs": Counter()}
        for step in range(steps):
            row_B = torch.from_numpy(rows[step * B : (step + 1) * B])
            noise = torch.randn(3, B, D, 1, 1, generator=torch.Generator().manual_seed(step))
            weak, strong = (image[train][row_B] + size * each for size, each in zip((0.1, 0.4), noise, strict=False))
            trusted = image[probe] + 0.1 * noise[2][:M]
            batch = Batch(weak, strong, noisy[row_B], row_B, trusted, class_[probe], (2 * step, 2 * step + 1), K)
            lr = 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
            said = update(state, objective, batch, lr=lr, workers=Alone(), steps=steps).coefficients
            if step >= 0.75 * steps:
                right_B = noisy[row_B] == class_[row_B]
                for kind, mask_B in (("right", right_B), ("wrong", ~right_B)):
                    judged[kind].append({name: vars(said)[name][mask_B].mean() for name in ("weight_B", "trust_B")})
                judged["differs"].update(name for name, value_B in vars(said).items() if len(value_B.unique()) > 1)
        accuracy = (state.predict(image[test]).argmax(1) == class_[test]).double().mean()
        found[name, steps] = float(accuracy), judged
        return found[name, steps]

    return run


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "supervised"])
def test_every_baseline_gets_further_than_cross_entropy(name, trained):
    steps = LONGER.get(name, STEPS)
    accuracy, _ = trained(name, steps)
    assert accuracy > max(trained("supervised", steps)[0], 0.8)


@pytest.mark.parametrize("name", BASELINES)
def test_coefficients_that_differ_tell_right_labels_from_wrong_ones(name, trained):
    _, judged = trained(name, LONGER.get(name, STEPS))
    for column in ("weight_B", "trust_B"):
        right_S, wrong_S = ([means[column] for means in judged[kind]] for kind in ("right", "wrong"))
        if judged["differs"][column]:
            assert np.mean(right_S) > LEAST.get(name, 1.5) * np.mean(wrong_S), column
