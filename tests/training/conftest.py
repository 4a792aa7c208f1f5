"""Small problems on which objectives can be checked to the last digit.

Shapes: B noisy examples, M probe examples, K classes.
"""

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from training.engine import networks
from training.engine.optimiser import SgdDescent, kernels
from training.objectives.interface import Batch, Moment

torch.set_num_threads(1)

CLASSES, GROUPS, EXAMPLES = 5, 2, 40


@dataclass(frozen=True)
class Problem:
    """A network in the middle of training, and its next batch."""

    model: nn.Module
    batch: Batch
    moment: Moment

    def fresh(self) -> "Problem":
        """The same with a model of its own."""
        return dataclasses.replace(self, model=copy.deepcopy(self.model))

    def with_velocity(self, velocity: dict[str, torch.Tensor]) -> "Problem":
        """The same after other updates."""
        descent = dataclasses.replace(self.moment.descent, velocity=velocity)
        return dataclasses.replace(self, moment=dataclasses.replace(self.moment, descent=descent))


def build_problem(
    network: str = "wrn-10-1", *, dtype: torch.dtype = torch.float64, noisy: int = 12, probe: int = 10, size: int = 8
) -> Problem:
    """Nothing sits at a special value: norms, running statistics and momentum are random; decay acts on kernels."""
    rng = torch.Generator().manual_seed(7)
    model = networks.build(network, 3, CLASSES, seed=3).to(dtype)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn(value.shape, generator=rng, dtype=torch.float64), alpha=0.2)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape, generator=rng, dtype=torch.float64))

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, 3, size, size, generator=rng, dtype=torch.float64).to(dtype)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(CLASSES, (count,), generator=rng)

    weak_BCHW = images(noisy)
    batch = Batch(
        weak_BCHW=weak_BCHW,
        strong_BCHW=weak_BCHW + 0.5 * images(noisy),
        label_B=labels(noisy),
        row_B=torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(7))[:noisy],
        probe_MCHW=images(probe),
        probe_label_M=labels(probe),
        group_keys=(11, 2**100 + 5),
        classes=CLASSES,
    )
    moment = Moment(
        lr=0.05,
        descent=SgdDescent(
            momentum=0.9,
            weight_decay=0.03,
            decayed=kernels(model),
            velocity={
                name: 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64).to(dtype)
                for name, value in model.named_parameters()
            },
        ),
    )
    return Problem(model, batch, moment)


@pytest.fixture(scope="session")
def _pristine() -> Problem:
    return build_problem()


@pytest.fixture
def problem(_pristine: Problem) -> Problem:
    """A wide residual network with batch norm in float64; 12 noisy and 10 probe images of 8 px in 2 groups, K = 5."""
    return _pristine.fresh()
