"""Every optimiser tells a meta step where its own next update goes, and goes on from what it has saved.

Each is held against its own update and autograd, in float64; what an update should be, a test of its own says.
"""

import copy

import pytest
import torch
from torch import nn

from training.engine import networks
from training.engine.adamw import AdamW
from training.engine.clipping import Clipped
from training.engine.layers import Frozen, Scaled, scales
from training.engine.optimiser import Sgd, kernels


def clipped(make):
    """An optimiser of clipped gradients; those of the tests have norms of about 5."""

    def made(model, memory, **settings):
        return Clipped(make(model, memory, **settings), [*model.parameters(), *memory.parameters()], norm=2.0)

    return made


FACTORS = {"0.weight": 0.5, "0.bias": 0.5, "2.weight": 1.0, "2.bias": 1.0}


def scaled(make):
    """An optimiser whose first layer has half the rate."""
    return lambda model, memory, **settings: Scaled(make(model, memory, **settings), model, FACTORS)


def frozen(make, steps=0):
    """An optimiser that moves the last layer alone."""
    return lambda model, memory, **settings: Frozen(make(model, memory, **settings), model, classes=2, steps=steps)


def clipped_by_layer(model, memory, **settings):
    """As `setup.new_optimiser` puts them together."""
    inner = Scaled(AdamW(model, memory, **settings), model, FACTORS)
    return Frozen(Clipped(inner, [*model.parameters(), *memory.parameters()], norm=2.0), model, classes=2, steps=2)


OPTIMISERS = [Sgd, AdamW, clipped(Sgd), clipped(AdamW), scaled(Sgd), scaled(AdamW), frozen(AdamW), clipped_by_layer]
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
        outputs = [value + 0 * sum(gradient.sum() for gradient in gradients) for value in ahead.values()]
        exact = torch.autograd.grad(outputs, gradients, [direction[name] for name in ahead])  # of what is frozen, 0
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


def test_each_layer_has_its_multiple_of_the_rate():
    plain, by_layer, gradients = small(), small(), torch.Generator().manual_seed(0)
    by_layer.load_state_dict(plain.state_dict())
    before = values_of(plain)
    for make, model in ((Sgd, plain), (scaled(Sgd), by_layer)):
        optimiser = made(make, model)
        draw_gradients(model, gradients.manual_seed(1))
        optimiser.update(0.1)
    moved, moved_by_layer = values_of(plain), values_of(by_layer)
    for name, factor in FACTORS.items():
        torch.testing.assert_close(moved_by_layer[name] - before[name], factor * (moved[name] - before[name]))


def test_factors_are_timms_of_its_layers():
    network = networks.build("vit_tiny_patch16_224", 3, 5, seed=0, size=32)
    found = scales(network, 0.5)
    assert (found["head.weight"], found["blocks.11.mlp.fc1.weight"], found["blocks.10.mlp.fc1.weight"]) == (
        1,
        0.5,
        0.25,
    )
    assert found["patch_embed.proj.weight"] == 0.5**13
    assert found.keys() == dict(network.named_parameters()).keys()
    with pytest.raises(ValueError, match="layer_decay wants a network of timm, which knows its layers: leave it at 1"):
        scales(networks.build("wrn-10-1", 3, 5, seed=0), 0.5)


def test_what_is_frozen_moves_after_its_steps():
    model, rng = small(), torch.Generator().manual_seed(0)
    optimiser = made(frozen(AdamW, steps=2), model)
    for step in range(4):
        before = values_of(model)
        draw_gradients(model, rng)
        optimiser.update(0.1)
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert moved == ({"2.weight", "2.bias"} if step < 2 else set(before))


def test_batch_norm_stands_still_while_it_is_frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    optimiser, rng = frozen(Sgd, steps=2)(model, nn.Module(), momentum=0.9, weight_decay=0.0), torch.Generator()
    for step in range(4):
        model.train()  # as after an evaluation
        optimiser.zero_grad()
        before = model[1].running_mean.clone()
        model(torch.randn(5, 4, generator=rng, dtype=torch.float64)).sum().backward()
        optimiser.update(0.1)
        assert torch.equal(model[1].running_mean, before) == (step < 2)
