"""Networks whose logits are known, and their batches: what tests of the baselines' equations are made of.

Shapes: B noisy examples, M probe examples, N of the training set, K classes.
"""

import numpy as np
import torch
from scipy import special
from torch import nn

from training.objectives.interface import Alone, Batch, Moment

B, K, N = 12, 4, 30


class Table(nn.Module):
    """A network whose logits are its parameters: the image says which row of the table is meant."""

    def __init__(self, logits_NK: torch.Tensor) -> None:
        super().__init__()
        self.logits_NK = nn.Parameter(logits_NK.clone())

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.logits_NK[image_BCHW[:, 0, 0, 0].long()]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pointers(rows) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.float64).reshape(-1, 1, 1, 1)


def batch_of(rows, label_B, probe_rows=(0, 1), probe_label_M=(0, 1)) -> Batch:
    """Images that point at rows of a table; weak and strong alike."""
    return Batch(
        weak_BCHW=pointers(rows),
        strong_BCHW=pointers(rows),
        label_B=torch.as_tensor(label_B),
        row_B=torch.as_tensor(rows),
        probe_MCHW=pointers(probe_rows),
        probe_label_M=torch.as_tensor(probe_label_M),
        group_keys=(3, 2**90),
        classes=K,
    )


def softmax(table: Table, rows) -> np.ndarray:
    return special.softmax(table.logits_NK.detach().numpy()[list(rows)], 1)


def taken(objective, model, batch, **moment):
    """The outcome, and the gradient of the total in the table."""
    outcome = objective(model, batch, Moment(lr=0.1, **moment), Alone())
    (gradient,) = torch.autograd.grad(outcome.total, model.logits_NK, retain_graph=True)
    return outcome, gradient.numpy()


def of_labels(p_BK: np.ndarray, batch: Batch) -> np.ndarray:
    return p_BK[np.arange(len(p_BK)), batch.label_B.numpy()]


class Plane(nn.Module):
    """A linear network of two pixels, so that mixed images can be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_NK = nn.Parameter(draw(2, K, seed=2))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return image_BCHW.flatten(1) @ self.logits_NK


def plane_batch(probe: int = 6) -> Batch:
    rng = torch.Generator().manual_seed(3)
    weak, strong, trusted = (torch.randn(size, 1, 1, 2, generator=rng, dtype=torch.float64) for size in (B, B, probe))
    keys, rows = (11, 2**100 + 1), torch.arange(B)
    return Batch(weak, strong, rows * 3 % K, rows, trusted, torch.arange(probe) % K, keys, K)


def mixed(parts, key: int, alpha: float, fold: bool) -> list[torch.Tensor]:
    """β·x + (1−β)·x[partner] of each tensor, by the draws of a group's key."""
    rng = np.random.Generator(np.random.Philox(key=key))
    partner, beta = rng.permutation(len(parts[0])), rng.beta(alpha, alpha, len(parts[0]))
    beta = np.maximum(beta, 1 - beta) if fold else beta
    told = []
    for x in parts:
        factor = torch.from_numpy(beta).reshape(-1, *[1] * (x.dim() - 1))
        told.append(factor * x + (1 - factor) * x[torch.from_numpy(partner)])
    return told
