"""One update of the model, alone or together with other workers through torch.distributed.

Shapes: B noisy examples of this worker, M probe examples, images H×W×C in storage and C×H×W in networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers
from training.state import TrainState


class _Mean(torch.autograd.Function):
    """Average over the workers. Backward averages too: each worker's loss is a share of their mean."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        total = flat.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Mean.apply(gradients[0])


class Processes:
    """The workers of the torch.distributed process group."""

    def __init__(self) -> None:
        self.size = dist.get_world_size()

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor averaged over the workers, in one all-reduce of them all; autograd goes through it."""
        flat = _Mean.apply(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def normalised(image_NHWC: Tensor) -> Tensor:
    """uint8 0…255 to float −1…1, N×C×H×W (channels last in memory)."""
    return image_NHWC.permute(0, 3, 1, 2).to(torch.get_default_dtype()).div_(127.5).sub_(1)


def average_statistics(state: TrainState, workers: Workers) -> None:
    """Make every worker's batch-norm running statistics their mean, so that all evaluate and export one model."""
    running = [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]
    if running and workers.size > 1:
        for buffer, mean in zip(running, workers.mean(running), strict=True):
            buffer.copy_(mean)


def update(state: TrainState, objective: Objective, batch: Batch, *, lr: float, workers: Workers) -> Outcome:
    """One step of SGD on the workers' mean loss; `state` moves on by one step."""
    moment = Moment(lr, state.momentum, state.weight_decay, state.decayed, state.momentum_buffers())
    state.optimizer.zero_grad(set_to_none=True)
    outcome = objective(state.model, batch, moment, workers)
    outcome.total.backward()
    parameters = [value for value in state.model.parameters() if value.grad is not None]
    averaged = workers.mean([value.grad for value in parameters if value.grad is not None])
    for value, gradient in zip(parameters, averaged, strict=True):
        value.grad = gradient
    state.apply_gradients(lr)
    return outcome
