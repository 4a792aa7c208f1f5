"""Every optimiser tells a meta step where its own next update goes, and goes on from what it has saved.

Each is held against its own update and autograd, in float64; what an update should be, a test of its own says.
"""

import copy

import pytest
import torch
from torch import nn

from training.engine.adamw import AdamW
from training.engine.clipping import Clipped
from training.engine.optimiser import Sgd, kernels


def clipped(make):
    """An optimiser of clipped gradients; those of the tests have norms of about 5."""

    def made(model, memory, **settings):
        return Clipped(make(model, memory, **settings), [*model.parameters(), *memory.parameters()], norm=2.0)

    return made


OPTIMISERS = [Sgd, AdamW, clipped(Sgd), clipped(AdamW)]
RATES = (0.1, 0.03, 0.2)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def made(make, model):
    return make(model, nn.Module(), momentum=0.9, weight_decay=0.1, decays=kernels)


def values_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def draw_gradients(model, rng) -> list[torch.Tensor]:
    """Gives each parameter a gradient, and returns them."""
    for value in model.parameters():
        value.grad = torch.randn(value.shape, generator=rng, dtype=torch.float64)
    return [value.grad.clone() for value in model.parameters()]


@pytest.mark.parametrize("make", OPTIMISERS)
def test_lookahead_at_the_learning_rate_is_the_next_update(make):
    model, rng = small(), torch.Generator().manual_seed(0)
    optimiser = made(make, model)
    for lr in RATES:
        gradients = draw_gradients(model, rng)
        before, saved = values_of(model), copy.deepcopy(optimiser.state_dict())
        ahead = optimiser.descent().look_ahead(before, gradients, lr)
        torch.testing.assert_close(optimiser.state_dict(), saved, rtol=0, atol=0)  # looking leaves no trace
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        optimiser.update(lr)
        torch.testing.assert_close(values_of(model), ahead, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("make", OPTIMISERS)
def test_pull_back_is_how_the_lookahead_moves_with_gradients(make, momentum):
    model, rng = small(), torch.Generator().manual_seed(0)
    optimiser = made(make, model)
    for lr in RATES:
        gradients = [gradient.requires_grad_() for gradient in draw_gradients(model, rng)]
        descent, values = optimiser.descent(), values_of(model)
        direction = {name: torch.randn_like(value) for name, value in values.items()}
        ahead = descent.look_ahead(values, gradients, lr, momentum=momentum)
        exact = torch.autograd.grad(list(ahead.values()), gradients, [direction[name] for name in ahead])
        with torch.no_grad():
            found = descent.pull_back(direction, gradients, momentum=momentum)
        for name, slope in zip(ahead, exact, strict=True):
            torch.testing.assert_close(-lr * found[name], slope, rtol=1e-12, atol=1e-14)
        optimiser.update(lr)


@pytest.mark.parametrize("make", OPTIMISERS)
def test_penalty_and_its_gradient_agree(make):
    model = small()
    descent = made(make, model).descent()
    values = {name: value.requires_grad_() for name, value in values_of(model).items()}
    plain = {name: torch.randn_like(value) for name, value in values.items()}
    total = descent.penalty(values) + sum((plain[name] * value).sum() for name, value in values.items())
    exact = dict(zip(values, torch.autograd.grad(total, list(values.values())), strict=True))
    torch.testing.assert_close(descent.add_penalty(plain, values), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", OPTIMISERS)
def test_a_loaded_state_goes_on_with_the_same_bits(make, tmp_path):
    model, rng = small(), torch.Generator().manual_seed(0)
    optimiser = made(make, model)
    for lr in RATES:
        draw_gradients(model, rng)
        optimiser.update(lr)
    torch.save(optimiser.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    other = made(make, twin)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    gradients = draw_gradients(model, rng)
    for value, gradient in zip(twin.parameters(), gradients, strict=True):
        value.grad = gradient.clone()
    optimiser.update(0.1)
    other.update(0.1)
    torch.testing.assert_close(values_of(twin), values_of(model), rtol=0, atol=0)


def test_a_gradient_below_the_norm_is_as_it_is():
    model, rng = small(), torch.Generator().manual_seed(0)
    gradients, values = draw_gradients(model, rng), values_of(model)
    wide = Clipped(made(Sgd, model), list(model.parameters()), norm=1e3).descent()
    plain = made(Sgd, model).descent()
    torch.testing.assert_close(wide.look_ahead(values, gradients, 0.1), plain.look_ahead(values, gradients, 0.1))
    direction = {name: torch.randn_like(value) for name, value in values.items()}
    torch.testing.assert_close(wide.pull_back(direction, gradients), plain.pull_back(direction, gradients))


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_in_adamw_s_first_step_gradients_of_any_size_but_eps_tell_nothing(eps):
    """D = ε/(|g|+ε)², at most 1/ε: the first step goes by the sign of a gradient alone."""
    model = small()
    descent = AdamW(model, nn.Module(), momentum=0.9, weight_decay=0.0, eps=eps).descent()
    for size in (0.0, eps / 10, eps, 1.0):
        gradients = [torch.full_like(value, size) for value in model.parameters()]
        direction = {name: torch.ones_like(value) for name, value in model.named_parameters()}
        for pulled in descent.pull_back(direction, gradients).values():
            torch.testing.assert_close(pulled, torch.full_like(pulled, eps / (size + eps) ** 2), rtol=1e-6, atol=0)
