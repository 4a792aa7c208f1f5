"""The short rules of forward mode against PyTorch's own.

Shapes: B images, C channels.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from training.objectives.tangents import FusedTangents

C = 3
MOVES = [moves for moves in itertools.product([True, False], repeat=3) if any(moves)]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tangents_of(call, values, moves, mode) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad(), dual_level():
        inputs = [
            make_dual(value, draw(*value.shape, seed=9 + place)) if moving else value
            for place, (value, moving) in enumerate(zip(values, moves, strict=True))
        ]
        if not mode:
            return tuple(unpack_dual(call(*inputs)))
        with FusedTangents():
            return tuple(unpack_dual(call(*inputs)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("shape", [(4, C, 5, 5), (6, C)])
def test_batch_norm_moves_as_pytorch_says(shape, moves, training):
    values = draw(*shape, seed=0), draw(C, seed=1), draw(C, seed=2)
    found, expected = [], []
    for told, mode in ((found, True), (expected, False)):
        mean_C, variance_C = draw(C, seed=3), draw(C, seed=4).square() + 0.5

        def norm(x, gamma_C, beta_C, mean_C=mean_C, variance_C=variance_C):
            return F.batch_norm(x, mean_C, variance_C, gamma_C, beta_C, training, 0.2, 1e-3)

        told += [*tangents_of(norm, values, moves, mode), mean_C, variance_C]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_batch_norm_without_parameters_or_statistics():
    def norm(x):
        return F.batch_norm(x, None, None, training=True)

    both = [tangents_of(norm, [draw(4, C, 2, 2, seed=0)], [True], mode) for mode in (True, False)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_moves_where_nothing_moved():
    with torch.no_grad(), dual_level(), FusedTangents():
        assert unpack_dual(F.batch_norm(draw(4, C, seed=0), None, None, training=True)).tangent is None
