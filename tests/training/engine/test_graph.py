"""A step that is replayed is the step, whatever has changed since it was captured.

Without a GPU a tape stands in for the CUDA graph: the operations of one step, done again on the same tensors.
"""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from training.engine import graph
from training.engine.optimiser import Sgd, kernels
from training.engine.passes import compiled, recompute
from training.engine.passes import network as passes
from training.engine.state import TrainState
from training.engine.step import differentiate, update
from training.objectives.baselines.reweight import Reweight
from training.objectives.ieg import paper
from training.objectives.interface import Alone
from training.objectives.registry import METHODS

STEADY = {name: make() for name, make in METHODS.items() if make().steady}
STEADY["paper of one step size"] = dataclasses.replace(paper(), lookahead_lr=0.1)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Tape(TorchDispatchMode):
    """What PyTorch has computed, below autograd, so that it can be computed again of what the inputs hold then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map_only(torch.Tensor, Tensor.detach, (args, kwargs or {}, out))))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def taped(work, statistics):
    """`graph.capture` on a CPU, where to capture is to compute: what this does to batch norm's statistics is undone."""
    before = [buffer.clone() for buffer in statistics]
    with Tape() as tape:
        result = work()
    for buffer, value in zip(statistics, before, strict=True):
        buffer.copy_(value)
    return result, tape.replay


@pytest.fixture(params=DEVICES)
def model(request, monkeypatch, problem):
    model = copy.deepcopy(problem.model).to(request.param)
    if request.param == "cpu":
        monkeypatch.setattr(graph, "capture", lambda work: taped(work, list(model.buffers())))
        monkeypatch.setattr(graph, "aside", lambda work: work())
    return model


def train(model, problem, objective, by, steps=7):
    """State and outcomes of some steps, each with another batch, learning rate and mixing."""
    device, said = next(model.parameters()).device, []
    state = TrainState(model, Sgd(model, nn.Module(), momentum=0.9, weight_decay=0.03, decays=kernels), average=True)
    for step in range(steps):
        moved = {
            name: value.roll(step, 0).to(device)
            for name, value in vars(problem.batch).items()
            if isinstance(value, Tensor)
        }
        batch = dataclasses.replace(problem.batch, **moved, group_keys=(step, 99 + step))
        said.append(update(state, objective, batch, lr=0.1 / (1 + step), workers=Alone(), steps=steps, by=by))
        state.optimiser.zero_grad()
    return state, said


def both(model, problem, objective):
    """State and outcomes of the same steps, replayed and one by one."""
    plain = train(copy.deepcopy(model), problem, objective, differentiate)
    return train(model, problem, objective, graph.StepGraph()), plain


def assert_same(found, expected):
    tolerance = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found[0].state_dict(), expected[0].state_dict(), **tolerance)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(vars(one.coefficients), vars(other.coefficients), **tolerance)
        for field in ("total", "parts", "prediction_BK"):
            torch.testing.assert_close(getattr(one, field), getattr(other, field), **tolerance)


@pytest.mark.parametrize("name", STEADY)
def test_replayed_steps_are_the_steps(name, model, problem):
    assert_same(*both(model, problem, STEADY[name]))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"chunks": 2}, {"chunks": 1, "compiled": True}, {"chunks": 1, "recompute": True}])
@pytest.mark.parametrize("name", ["winnow", "supervised"])
def test_replayed_steps_in_parts_or_compiled_are_the_steps(name, how, model, problem, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # no C++ compiler
    model = passes.Passes(model, dtype=torch.float64, channels_last=False, **how)
    assert_same(*both(model, problem, METHODS[name]()))
    torch._dynamo.reset()


@pytest.mark.parametrize("objective", [METHODS["paper"](), Reweight()], ids=["paper", "reweight"])
def test_of_an_unsteady_objective_they_would_not_be(objective, model, problem):
    assert not objective.steady
    with pytest.raises(AssertionError, match="not close"):
        assert_same(*both(model, problem, objective))


def test_random_layers_are_refused(model, problem):
    model.blocks.append(torch.nn.Dropout(0.5))
    with pytest.raises(ValueError, match="random layers, such as dropout: leave cuda_graph out"):
        train(model, problem, METHODS["winnow"](), graph.StepGraph())


def test_in_a_capture_no_random_state_is_read(problem, monkeypatch):
    """It is the graph's own there, and CUDA forbids it."""
    kept = []
    plain = recompute.checkpoint
    monkeypatch.setattr(
        recompute, "checkpoint", lambda *args, **how: (kept.append(how["preserve_rng_state"]), plain(*args, **how))[1]
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("the state was read"))
    model = passes.Passes(problem.fresh().model, chunks=2, dtype=torch.float64, channels_last=False)
    train(model, problem, METHODS["winnow"](), differentiate, steps=1)
    assert kept
    assert not any(kept)
