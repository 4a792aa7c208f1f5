"""The passes of a step as one CUDA graph: the host orders them with one call, instead of ten thousand kernels in turn.

Small networks leave a GPU waiting for its host: of a step of ResNet-29 that is three quarters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.engine.state import TrainState
from training.engine.step import differentiate
from training.objectives.interface import Batch, Coefficients, Moment, Objective, Outcome, Workers

Result = TypeVar("Result")
WARM_UPS = 3  # steps before the capture: libraries choose and compile their kernels, the optimiser makes its buffers


class StepGraph:
    """Do `step.differentiate` of one state and objective for batches of one size, replayed from the fourth call on.

    It is for one worker, since collectives report and time out on the host, and for a steady objective (`Objective`).
    The graph keeps the memory of its passes, and writes gradients and results to the same places in every step.

    Raises ValueError where the network draws random numbers, which passes over the same images could not share.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._held: Batch  # what the graph reads
        self._outcome: Outcome  # what it writes
        self._gradients: list[Tensor | None]
        self._replay: Callable[[], None]

    def __call__(
        self, state: TrainState, objective: Objective, batch: Batch, moment: Moment, workers: Workers
    ) -> Outcome:
        """See `step.differentiate`."""
        batch = replace(batch, drawn=objective.draws(batch))
        self._calls += 1
        if self._calls <= WARM_UPS:
            before = random_state(batch.weak_BCHW.device)
            outcome = aside(lambda: differentiate(state, objective, batch, moment, workers))
            if not torch.equal(before, random_state(batch.weak_BCHW.device)):
                raise ValueError("this network has random layers, such as dropout: leave cuda_graph out")
            return outcome
        if self._calls == WARM_UPS + 1:
            self._held = held = _copy(batch)
            self._outcome, self._replay = capture(lambda: differentiate(state, objective, held, moment, workers))
            self._gradients = [value.grad for value in state.trained()]
        for place, value in zip(_tensors(self._held), _tensors(batch), strict=True):
            place.copy_(value)
        self._replay()
        for value, gradient in zip(state.trained(), self._gradients, strict=True):
            value.grad = gradient
        written = self._outcome  # the next step writes over it, and it may be read later
        return Outcome(
            written.total.clone(),
            {name: part.clone() for name, part in written.parts.items()},
            Coefficients(**{name: value.clone() for name, value in vars(written.coefficients).items()}),
            written.prediction_BK.clone(),
        )


def random_state(device: torch.device) -> Tensor:
    """Return the state of the host's generator and the device's own, which random layers draw from."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return torch.cat([torch.get_rng_state(), *on_gpu])


def aside(work: Callable[[], Result]) -> Result:
    """Return what `work` gives, done on another stream, as PyTorch wants it before a capture."""
    stream, here = _other_stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = work()
    here.wait_stream(stream)
    return result


_other_stream = cache(torch.cuda.Stream)  # one, so that all warm-ups use the same memory


def capture(work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
    """Return the tensors that `work` gives, not computed yet, and a call that computes them anew from what it reads."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on with the GPU
        result = work()
    return result, graph.replay


def _copy(batch: Batch) -> Batch:
    copied: dict[str, Any] = {name: x.clone() for name, x in vars(batch).items() if isinstance(x, Tensor)}
    return replace(batch, **copied)  # what is drawn is nobody else's


def _tensors(batch: Batch) -> list[Tensor]:
    return [*(value for value in vars(batch).values() if isinstance(value, Tensor)), *batch.drawn]
