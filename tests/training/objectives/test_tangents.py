"""The short rules of forward mode against PyTorch's own.

Shapes: B images, C channels; linear layers as PyTorch has them.
"""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.objectives.tangents import FusedTangents, Recorded

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


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (F.linear, [(6, 4), (5, 4), (5,)]),
        (F.linear, [(2, 6, 4), (5, 4), (5,)]),
        (lambda *values: F.conv2d(*values, 2, 1, groups=2), [(2, 4, 6, 6), (6, 2, 3, 3), (6,)]),
        (lambda *values: F.conv2d(*values, stride=2, padding="valid"), [(2, 4, 6, 6), (6, 4, 3, 3), (6,)]),
    ],
)
def test_linear_layers_move_as_pytorch_says(layer, shapes, moves, known):
    values = [draw(*shape, seed=place) for place, shape in enumerate(shapes)]
    with Recorded(keeps=True) as recorded:
        layer(*values)
    expected = tangents_of(layer, values, moves, mode=False)
    with torch.no_grad(), dual_level(), FusedTangents(recorded.calls if known else ()):
        inputs = [
            make_dual(value, draw(*value.shape, seed=9 + place)) if moving else value
            for place, (value, moving) in enumerate(zip(values, moves, strict=True))
        ]
        found = tuple(unpack_dual(layer(*inputs)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    """A convolution whose output is changed in place, one whose output is not, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.convolutions[0](x), inplace=True)
        return self.head(torch.tanh(self.convolutions[1](x)).mean((2, 3)))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_moves_as_pytorch_says_and_lies_in_memory_as_without_tangents(masked, known):
    values = [draw(2, 5, 3, 4, seed=place).transpose(1, 2) for place in range(3)] + masked * [draw(2, 1, 5, 5, seed=3)]
    attention = F.scaled_dot_product_attention
    with torch.no_grad(), Recorded(keeps=True) as recorded:
        plain = attention(*values)
    moving = [draw(*value.shape, seed=9 + place) for place, value in enumerate(values)]
    with torch.no_grad(), dual_level():
        with sdpa_kernel(SDPBackend.MATH):
            other, expected = unpack_dual(attention(*map(make_dual, values, moving)))
        with FusedTangents(recorded.calls if known else ()):
            found = unpack_dual(attention(*map(make_dual, values, moving)))
    assert found.primal.stride() == plain.stride() != other.stride()
    torch.testing.assert_close(found.primal, plain, rtol=0, atol=0)
    torch.testing.assert_close(found.tangent, expected, rtol=1e-12, atol=1e-12)


def test_attention_that_drops_draws_once():
    values = [draw(2, 3, 5, 4, seed=place) for place in range(3)]

    def drop(*values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(*values, dropout_p=0.5)

    with torch.no_grad(), dual_level(), FusedTangents():
        found = unpack_dual(drop(*(make_dual(value, value) for value in values)))
        after = torch.rand(())
    torch.testing.assert_close(found.primal, drop(*values))
    torch.testing.assert_close(after, torch.rand(()))


def test_what_was_changed_in_place_is_computed_again():
    torch.manual_seed(0)
    model, x = Twice().double(), draw(2, 3, 5, 5, seed=0)
    with Recorded(keeps=True) as recorded:
        model(x)
    assert [call.output is None for call in recorded.calls] == [True, False, False]
    tangents = []
    for mode in (FusedTangents(recorded.calls), FusedTangents(), None):
        with torch.no_grad(), dual_level():
            moving = {n: make_dual(v.detach(), draw(*v.shape, seed=5)) for n, v in model.named_parameters()}
            with mode or torch.no_grad():
                tangents.append(unpack_dual(torch.func.functional_call(model, moving, (x,))).tangent)
    for tangent in tangents[:2]:
        torch.testing.assert_close(tangent, tangents[2], rtol=1e-12, atol=1e-12)


LAYERS = {
    "linear (3×5, 5×5, float64)": (nn.Linear(5, 5).double(), draw(3, 5, seed=1)),
    "linear (3×6, 5×6, float64)": (nn.Linear(6, 5).double(), draw(3, 6, seed=1)),
    "linear (3×5, 5×5, float32)": (nn.Linear(5, 5), draw(3, 5, seed=1).float()),
    "conv2d (3×5×1×1, 5×5×1×1, float64)": (nn.Conv2d(5, 5, 1).double(), draw(3, 5, 1, 1, seed=1)),
}
LINEAR, WIDE, SINGLE, CONVOLUTION = LAYERS


@pytest.mark.parametrize(
    ("first", "then", "expected", "found"),
    [
        ([LINEAR], [CONVOLUTION], LINEAR, CONVOLUTION),
        ([CONVOLUTION], [LINEAR], CONVOLUTION, LINEAR),
        ([LINEAR], [WIDE], LINEAR, WIDE),
        ([LINEAR], [SINGLE], LINEAR, SINGLE),
        ([LINEAR, WIDE], [WIDE, LINEAR], LINEAR, WIDE),
        ([LINEAR], [LINEAR, WIDE], "nothing", WIDE),
        ([LINEAR, WIDE], [LINEAR], WIDE, "nothing"),
    ],
)
def test_a_pass_that_calls_other_layers_is_refused(first, then, expected, found):
    """All outputs are 3×5, so that nothing else would notice."""

    def passing(names):
        for layer, x in map(LAYERS.get, names):
            layer(x)

    with Recorded(keeps=True) as recorded:
        passing(first)
    message = f"forward mode called {found} where the pass that it repeats called {expected}: a network must"
    with pytest.raises(ValueError, match=re.escape(message)), torch.no_grad(), FusedTangents(recorded.calls):
        passing(then)
    with torch.no_grad(), FusedTangents(recorded.calls):
        passing(first)
