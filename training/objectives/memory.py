"""What objectives that keep something from step to step share (`Objective.memory`).

Shapes: B noisy examples of this worker, U different ones of the global batch, N of the training set, K classes, m
features of a class, D numbers each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.interface import Batch, Workers
from training.objectives.losses import forward_aside

SEED = 0  # of what is made before step 0: the network that it stands beside has the run's own


def seen(row_B: Tensor, values: Sequence[Tensor], workers: Workers) -> tuple[Tensor, list[Tensor]]:
    """Return the rows of the global batch, U, sorted and each once, and the mean of each value over a row's places.

    Where an epoch ends within a batch, a row can be in it twice. The result is the same on all workers, and on any
    number of them.
    """
    rows_U, place = workers.gather(row_B).unique(return_inverse=True)
    count_U = torch.bincount(place, minlength=len(rows_U))
    means = []
    for value in values:
        gathered = workers.gather(value)
        total = gathered.new_zeros(len(rows_U), *gathered.shape[1:]).index_add_(0, place, gathered)
        means.append(total / count_U.reshape(-1, *[1] * (gathered.dim() - 1)))
    return rows_U, means


def epoch_steps(examples: int, batch: Batch, workers: Workers) -> int:
    """Return the steps in which each of N examples has been read, but for what an epoch before it has left over."""
    return math.ceil(examples / (len(batch.label_B) * workers.size))


def fresh_copy(model: nn.Module) -> nn.Module:
    """Return a second network: weights shuffled within each tensor are a new draw of what they were drawn from."""
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for value in other.parameters():
            order = torch.randperm(value.numel(), generator=rng).to(value.device)
            value.copy_(value.flatten()[order].view_as(value))
    return other


@contextmanager
def initialised() -> Iterator[None]:
    """Give modules made inside the same weights, wherever and whenever they are made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def classifier(model: nn.Module, classes: int) -> nn.Linear:
    """Return the last layer of a network: features in, K logits out. Raises ValueError where there is none."""
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes]
    if not linear:
        raise ValueError(
            "this method reads the input of a linear last layer, which the network has not: choose another"
        )
    return linear[-1]


def outer_blocks(model: nn.Module) -> list[str]:
    """Name a network's blocks, in order: the elements with a kernel of the outermost `nn.Sequential`s inside it."""
    found: list[str] = []
    outermost = ""
    for path, module in model.named_modules():
        if path and isinstance(module, nn.Sequential) and not (outermost and path.startswith(outermost)):
            outermost = f"{path}."
            children = module.named_children()
            found += [f"{outermost}{n}" for n, child in children if any(p.dim() > 1 for p in child.parameters())]
    return found


def with_features(model: nn.Module, image_BCHW: Tensor, classes: int, *, aside: bool = False) -> tuple[Tensor, Tensor]:
    """Return logits, and what the classifier made them of, B×D and detached; `aside` is `losses.forward_aside`."""
    collected: list[Tensor] = []  # a tensor a chunk (engine/passes)
    hook = classifier(model, classes).register_forward_pre_hook(lambda _, inputs: collected.append(inputs[0].detach()))
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled network would be compiled anew for every hook
            logits_BK = forward_aside(model, image_BCHW) if aside else model(image_BCHW)
    finally:
        hook.remove()
    return logits_BK, torch.cat(collected).to(logits_BK.dtype)


class FeatureBank(nn.Module):
    """Hold the last m features of the examples labelled as each class, in rings."""

    feature_KmD: Tensor
    count_K: Tensor

    def __init__(self, classes: int, kept: int, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("feature_KmD", torch.zeros(classes, kept, features, dtype=dtype))
        self.register_buffer("count_K", torch.zeros(classes, dtype=torch.int64))  # ever seen

    def add(self, batch: Batch, feature_BD: Tensor, workers: Workers) -> None:
        """Take in the global batch, in the order of rows; of more than m of a class the first m."""
        _, (feature_UD, label_U) = seen(batch.row_B, [feature_BD, batch.label_B], workers)
        label_U = label_U.round().long()
        member_UK = F.one_hot(label_U, len(self.count_K))
        turn_U = (member_UK.cumsum(0) - 1).gather(1, label_U[:, None])[:, 0]
        kept = self.feature_KmD.shape[1]
        fits_U = turn_U < kept
        place_U = (self.count_K[label_U] + turn_U) % kept
        self.feature_KmD[label_U[fits_U], place_U[fits_U]] = feature_UD[fits_U]
        self.count_K += member_UK.sum(0).clamp_max(kept)

    def filled(self) -> Tensor:
        """Tell which places hold a feature, K×m."""
        kept = self.feature_KmD.shape[1]
        return torch.arange(kept, device=self.count_K.device) < self.count_K[:, None]
