"""A step on a GPU: all that it computes is there, and its host does not wait for it.

Without a GPU the meta device stands in: it refuses to mix with the CPU, as a GPU does, and has no numbers to look at.
What is sent there must not be waited for, either.
"""

import dataclasses
import re
import traceback

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import VARIANTS
from training.engine.optimiser import Sgd
from training.engine.passes.network import Passes
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.interface import Alone
from training.objectives.memory import seen
from training.objectives.registry import METHODS

OBJECTIVES = {**{name: make() for name, make in METHODS.items()}, **VARIANTS}
DEVICES = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    yield request.param
    allow_waiting(request.param, True)


def allow_waiting(device, allowed):
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default" if allowed else "error")


class Upload(TorchDispatchMode):
    """Refuses to send what the host would wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sent = func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.device.type == "meta"
        assert not sent or kwargs.get("non_blocking"), "the host waits for what it sends"
        return out


def steps(problem, objective, device, *, passes=lambda network: network, warm_up=1):
    """Steps on the device; after the warm-up, in which libraries are loaded, the host may not wait."""
    model = passes(problem.fresh().model).to(device, torch.float32)
    memory = objective.memory(model, 40, problem.batch.classes).to(device)
    optimiser = Sgd(model, memory, momentum=0.9, weight_decay=0.0)
    state = TrainState(model, optimiser, average=objective.average_parameters, memory=memory)
    tensors = {
        name: value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in vars(problem.batch).items()
        if isinstance(value, Tensor)
    }
    batch = dataclasses.replace(problem.batch, **tensors)
    for step in range(2):
        allow_waiting(device, step < warm_up)
        with Upload():
            update(state, objective, batch, lr=0.1, workers=Alone(), steps=10)


def what_stops(problem, objective, device) -> RuntimeError | None:
    """None where nothing does."""
    try:
        steps(problem, objective, device)
    except RuntimeError as error:
        return error
    return None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_waits_for_a_gpu(name, device, problem):
    """But for what takes rows once each: it counts how many different ones a batch has (`memory.seen`)."""
    error = what_stops(problem, OBJECTIVES[name], device)
    if error is not None:
        assert re.search("unique|synchroniz", str(error)), error
        assert OBJECTIVES[name].remembers
        assert seen.__code__ in {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}


def test_waiting_is_noticed(device, problem):
    """It would be on a GPU: else the test above would prove little."""
    with pytest.raises(RuntimeError, match=r"unique|synchroniz"):
        steps(problem, OBJECTIVES["elr"], device, warm_up=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["winnow", "second_order", "supervised"])
def test_nothing_waits_in_parts_and_bf16(name, dtype, device, problem):
    def passes(network):
        return Passes(network, chunks=2, dtype=dtype, channels_last=True)

    steps(problem, OBJECTIVES[name], device, passes=passes)
