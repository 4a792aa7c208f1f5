"""The one signature of every objective: what it is given and what it gives back.

Shapes: B noisy examples of this worker, M its trusted ("probe") examples, K classes, images C×H×W. A batch is cut into
`len(group_keys)` equal groups, stored one behind the other; random draws are keyed per group, so that they do not
depend on which worker holds it (docs/method.md, "With more than one worker").
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from training.objectives.private_torch import foreach_add


@dataclass(frozen=True)
class Batch:
    """Hold this worker's examples of one step, normalised to [−1, 1]."""

    weak_BCHW: Tensor
    strong_BCHW: Tensor
    label_B: Tensor  # int64, noisy
    row_B: Tensor  # int64, each noisy example's place in the training set, 0 … N−1
    probe_MCHW: Tensor
    probe_label_M: Tensor  # int64, trusted
    group_keys: tuple[int, ...]  # one random key a group, from (seed, step, group)
    classes: int
    drawn: tuple[Tensor, ...] = ()  # what `Objective.draws` gave, where it was asked before the step


class Workers(Protocol):
    """Show an objective the other workers: their number, and averages and rows of all."""

    @property
    def size(self) -> int:
        """Return how many there are."""
        ...

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor averaged over the workers, all in a few large messages; autograd goes through it."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all workers, without a graph; in which order depends on the number of workers."""
        ...


@dataclass(frozen=True)
class Alone:
    """Be the only worker."""

    size: int = 1

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors themselves."""
        return list(tensors)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor.detach()


class Descent:
    """See the optimiser as an objective does: it says where its next update would go. This is plain gradient descent.

    Optimisers that do more have their own (engine/optimiser.py). Values and gradients are parameters of the model, by
    name, all or some of them; results carry the graph of what is given.
    """

    def look_ahead(
        self, values: Mapping[str, Tensor], gradients: Sequence[Tensor], rate: float, *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return the values after an update of size `rate` along gradients in their order, perhaps without momentum."""
        return dict(zip(values, foreach_add(list(values.values()), list(gradients), alpha=-rate), strict=True))

    def pull_back(
        self, direction: Mapping[str, Tensor], gradients: Sequence[Tensor], *, momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return Dᵀ·direction, where `look_ahead` moves by −rate·D·δ when its gradients move by δ; here D = 1."""
        return dict(direction)

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | float:
        """Return what weight decay adds to a loss at these values."""
        return 0.0

    def add_penalty(self, gradients: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients with that of `penalty` at these values."""
        return dict(gradients)

    def to(self, dtype: torch.dtype) -> Descent:
        """Return the same in another precision."""
        return self


@dataclass(frozen=True)
class Moment:
    """Hold where training stands: all that an objective may know of optimiser, schedule and its own past."""

    lr: float
    descent: Descent = field(default_factory=Descent)  # the optimiser's next update
    step: int = 0  # updates done
    steps: int = 1  # of the whole run
    memory: nn.Module = field(default_factory=nn.Module)  # what `Objective.memory` made

    @property
    def progress(self) -> float:
        """Return the share of the run that is done, from 0 to below 1."""
        return self.step / self.steps


@dataclass(frozen=True)
class Coefficients:
    """Hold what a step decided about each noisy example, detached: a row of the ledger each."""

    weight_B: Tensor  # ω relative to 1/B of the global batch: 1 is an ordinary example's weight
    trust_B: Tensor  # λ: 1 where the given label is believed, 0 where the pseudo label is, or how far it is
    pseudo_label_B: Tensor  # int64
    confidence_B: Tensor  # probability of the pseudo label
    loss_B: Tensor  # cross-entropy with the given label


@dataclass(frozen=True)
class Outcome:
    """Hold a step's loss, with its graph, and what is worth knowing about it."""

    total: Tensor  # this worker's share: the mean over workers is the global loss
    parts: dict[str, Tensor]  # unweighted terms of the loss, detached
    coefficients: Coefficients
    prediction_BK: Tensor  # softmax of the weak views, detached: the collapse monitor reads it


def require(objective: Objective, fields: Sequence[str], low: float, high: float = math.inf) -> None:
    """Raise ValueError for a field of the objective below `low` or above `high`."""
    allowed = f"{low:g} or more" if high == math.inf else f"between {low:g} and {high:g}"
    for name in fields:
        value = getattr(objective, name)
        if not low <= value <= high:  # NaN too
            raise ValueError(f"objective.{name} is {value}: it must be {allowed}")


class Objective(ABC):
    """Turn a batch into a loss: a frozen dataclass of hyperparameters with one call."""

    average_parameters: bool  # evaluate the model with an exponential moving average of its parameters
    staged: ClassVar[bool] = False  # does other things early in a run than late, or more of them
    own_weights: ClassVar[bool] = False  # ω says how far an example counts, 0 to 1; else its share of the batch

    def memory(self, model: nn.Module, examples: int, classes: int) -> nn.Module:
        """Return what is kept from step to step beside the model: made once before step 0, alike on all workers.

        Here nothing. Its parameters are trained like the model's: by the same optimiser, on the gradient of
        `Outcome.total`. Its buffers the objective changes itself, by nothing but what all workers know. It is part of
        checkpoints; evaluated and exported is the model alone. `examples` is N.
        """
        return nn.Module()

    @property
    def remembers(self) -> bool:
        """Tell whether there is a `memory`."""
        return type(self).memory is not Objective.memory

    @property
    def steady(self) -> bool:
        """Tell whether all that changes from step to step is in tensors, so that a CUDA graph of one serves all.

        Not so, as here, where a step reads its number or the learning rate, or looks at numbers on the host.
        """
        return False

    @property
    def forward_mode(self) -> bool:
        """Tell whether a step goes through the whole network in forward mode, or by second order; here not."""
        return False

    def draws(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return what a step draws on the host by the batch's keys, for `Batch.drawn`; here nothing."""
        return ()

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """Return the loss of one batch. Batch-norm statistics move once; nothing else of the model changes."""
