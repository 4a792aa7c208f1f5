import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

from training.engine.optimiser import Sgd, kernels
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.baselines.supervised import Supervised
from training.objectives.interface import Alone
from training.objectives.registry import ABLATIONS, METHODS


def new_state(model, *, average=True, momentum=0.9, weight_decay=0.1, decayed=None, memory=None) -> TrainState:
    decays = kernels if decayed is None else lambda _: decayed
    optimiser = Sgd(model, memory or nn.Module(), momentum=momentum, weight_decay=weight_decay, decays=decays)
    return TrainState(model, optimiser, average=average, memory=memory)


def test_kernels_are_convolutions_and_linear_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert kernels(model) == {"0.weight", "3.weight"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decayed", [frozenset(), frozenset({"weight"}), frozenset({"weight", "bias"})])
def test_sgd_is_momentum_with_coupled_decay_on_chosen_names(momentum, decayed):
    model = nn.Linear(3, 2).double()
    state = new_state(model, momentum=momentum, decayed=decayed)
    assert state.optimiser.descent().velocity == {}
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in expected.items()}
    rng = torch.Generator().manual_seed(0)
    for lr in (0.1, 0.03, 0.2):
        for name, value in model.named_parameters():
            value.grad = torch.randn(value.shape, generator=rng, dtype=torch.float64)
            decay = 0.1 * expected[name] if name in decayed else 0.0
            velocity[name] = momentum * velocity[name] + value.grad + decay
            expected[name] = expected[name] - lr * velocity[name]
        state.apply_gradients(lr)
        torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=1e-13, atol=1e-15)
        if momentum:
            torch.testing.assert_close(state.optimiser.descent().velocity, velocity, rtol=1e-13, atol=1e-15)
    assert state.step == 3


def test_average_follows_its_closed_form():
    model = nn.Linear(1, 1, bias=False).double()
    state = new_state(model, momentum=0.0, weight_decay=0.0)
    expected = model.weight.item()
    for t in range(6):
        model.weight.grad = torch.full_like(model.weight, 1.0 + t)
        state.apply_gradients(0.5)
        decay = (1 + t) / (10 + t)
        expected = decay * expected + (1 - decay) * model.weight.item()
        assert state.averaged["weight"].item() == pytest.approx(expected, rel=1e-12)
    # from step 8,990 on the decay stays at 0.999
    for step in (8_989, 8_990, 9_000, 10**6):
        state.step, before = step, state.averaged["weight"].item()
        model.weight.grad = torch.ones_like(model.weight)
        state.apply_gradients(1.0)
        share = (state.averaged["weight"].item() - before) / (model.weight.item() - before)
        assert share == pytest.approx(1 - min(0.999, (1 + step) / (10 + step)), rel=1e-8)


@pytest.mark.parametrize("average", [True, False])
def test_predictions_use_averages_and_live_statistics(problem, average):
    state = new_state(problem.model, average=average)
    for _ in range(3):
        update(state, Supervised(), problem.batch, lr=0.1, workers=Alone())
    image_BCHW = problem.batch.probe_MCHW
    separate = copy.deepcopy(problem.model)
    if average:
        with torch.no_grad():
            for name, value in separate.named_parameters():
                assert not torch.equal(value, state.averaged[name])
                value.copy_(state.averaged[name])
    before = copy.deepcopy(state.state_dict())
    with torch.no_grad():
        expected_BK = separate.eval()(image_BCHW)
    predicted_BK = state.predict(image_BCHW)
    torch.testing.assert_close(predicted_BK, expected_BK, rtol=1e-12, atol=1e-12)
    assert state.model.training
    assert not predicted_BK.requires_grad
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)
    # one image alone gets the same answer: nothing in it depends on the batch
    torch.testing.assert_close(state.predict(image_BCHW[:1]), expected_BK[:1], rtol=1e-10, atol=1e-10)

    exported = copy.deepcopy(problem.model).eval()
    exported.load_state_dict(state.inference_weights())
    with torch.no_grad():
        torch.testing.assert_close(exported(image_BCHW), expected_BK, rtol=1e-12, atol=1e-12)


def test_a_memory_is_trained_like_the_model_and_not_exported():
    model, memory = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    memory.load_state_dict(model.state_dict())
    state = new_state(model, memory=memory)
    for lr in (0.1, 0.2):
        for value, kept in zip(model.parameters(), memory.parameters(), strict=True):
            value.grad = torch.randn(value.shape, dtype=torch.float64)
            kept.grad = value.grad.clone()
        state.apply_gradients(lr)
    torch.testing.assert_close(memory.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert set(state.optimiser.descent().velocity) == {"weight", "bias"}
    assert set(state.inference_weights()) == {"weight", "bias"}
    assert len(state.trained()) == 4
    assert state.finite()
    memory.bias.data[0] = torch.nan
    assert not state.finite()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ABLATIONS])
def test_a_saved_run_continues_bit_for_bit(problem, method):
    objective = METHODS[method]()

    def train(state, steps):
        for step in steps:
            row_B = (problem.batch.row_B + 5 * step) % 40
            batch = dataclasses.replace(problem.batch, row_B=row_B, group_keys=(2 * step, 2 * step + 1))
            update(state, objective, batch, lr=0.05, workers=Alone(), steps=4)

    def started(model):
        memory = objective.memory(model, 40, problem.batch.classes)
        return new_state(model, average=objective.average_parameters, memory=memory)

    whole = started(problem.fresh().model)
    train(whole, range(2))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    train(whole, range(2, 4))

    other = problem.fresh().model
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1)
    resumed = started(other)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == 2
    train(resumed, range(2, 4))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "other",
    [
        lambda: new_state(nn.Linear(4, 2)),  # another shape
        lambda: new_state(nn.Sequential(nn.Linear(3, 2))),  # other names
        lambda: new_state(nn.Linear(3, 2), average=False),  # no averages
        lambda: new_state(nn.Linear(3, 2), decayed=frozenset({"weight", "bias"})),  # other decay
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(other):
    with pytest.raises(ValueError, match=r"does not fit this recipe .*use another name or storage"):
        other().load_state_dict(new_state(nn.Linear(3, 2)).state_dict())


def test_a_checkpoint_without_a_part_is_refused():
    state = new_state(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"does not fit this recipe .*averaged"):
        state.load_state_dict({name: part for name, part in state.state_dict().items() if name != "averaged"})


@pytest.mark.parametrize("average", [True, False])
def test_a_run_starts_from_another_ones_weights_alone(problem, average):
    other = new_state(problem.fresh().model, average=True)
    update(other, Supervised(), problem.batch, lr=0.1, workers=Alone())
    state = new_state(problem.fresh().model, average=average)
    state.load_weights(other.inference_weights())
    assert state.step == 0
    assert not state.optimiser.descent().velocity
    torch.testing.assert_close(state.inference_weights(), other.inference_weights(), rtol=0, atol=0)
    torch.testing.assert_close(dict(state.model.named_parameters()), other.averaged, rtol=0, atol=0)
    update(state, Supervised(), problem.batch, lr=0.1, workers=Alone())  # into no memory that `other` holds
    assert not any(torch.equal(value, other.averaged[name]) for name, value in state.model.named_parameters())


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"weights to start from do not fit this network \(size mismatch"):
        new_state(nn.Linear(3, 2)).load_weights(nn.Linear(4, 2).state_dict())
