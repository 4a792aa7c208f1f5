"""One update of the model, alone or together with other workers.

Shapes: B noisy examples of this worker, M probe examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from training.engine.collectives import Processes
from training.engine.state import TrainState
from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers


def moment_of(state: TrainState, lr: float, steps: int) -> Moment:
    """Return where training stands, of `steps` in the whole run."""
    return Moment(lr, state.optimiser.descent(), step=state.step, steps=steps, memory=state.memory)


Differentiate = Callable[[TrainState, Objective, Batch, Moment, Workers], Outcome]


def differentiate(state: TrainState, objective: Objective, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
    """Return what comes of the batch, its graph gone; the gradients are in the parameters."""
    state.optimiser.zero_grad()
    outcome = objective(state.model, batch, moment, workers)
    outcome.total.backward()
    return replace(outcome, total=outcome.total.detach())


def update(
    state: TrainState,
    objective: Objective,
    batch: Batch,
    *,
    lr: float,
    workers: Workers,
    steps: int = 1,
    by: Differentiate = differentiate,
) -> Outcome:
    """Make one update, of `steps` in the whole run, on the workers' mean loss; `state` moves on by one step.

    `by` gives outcome and gradients: kernel by kernel, or as one CUDA graph (`training.engine.graph`).
    """
    if isinstance(workers, Processes):
        workers.step = state.step
    outcome = by(state, objective, batch, moment_of(state, lr, steps), workers)
    parameters = [value for value in state.trained() if value.grad is not None]
    averaged = workers.mean([value.grad for value in parameters if value.grad is not None])
    for value, gradient in zip(parameters, averaged, strict=True):
        value.grad = gradient
    state.apply_gradients(lr)
    return outcome
