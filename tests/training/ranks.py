"""Trains every case of test_step.py as one of `world` workers; run as a script for each rank, or `run` alone.

Shapes: B noisy examples of this worker, M probe examples, K classes.
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from training import networks
from training.objectives.ieg import paper, reference
from training.objectives.interface import Alone, Batch
from training.objectives.reweight import Reweight
from training.objectives.supervised import Supervised
from training.state import TrainState
from training.step import Processes, update

CLASSES, GROUPS, GROUP, PROBE, STEPS = 4, 4, 4, 3, 4
GLOBAL = {
    "supervised": Supervised(),
    "reweight": Reweight(),
    "reference": reference(),
    "paper": paper(),
    "threshold": replace(reference(), threshold=1 / 16),
    "second_order": replace(reference(), engine="second_order"),
    "second_order of paper": replace(paper(), engine="second_order"),
    "second_order of reweight": Reweight(engine="second_order"),
}
CASES = {
    **{name: (objective, torch.float64) for name, objective in GLOBAL.items()},
    "replica": (replace(reference(), scope="replica"), torch.float64),
    "float32": (reference(), torch.float32),
}


def batch_of(step: int, rank: int, world: int, dtype: torch.dtype) -> Batch:
    """The groups that `rank` holds of one global batch: those whose number is rank modulo world."""
    rng = torch.Generator().manual_seed(100 + step)
    weak = torch.randn(GROUPS, GROUP, 3, 8, 8, generator=rng, dtype=torch.float64)
    strong = weak + 0.5 * torch.randn(weak.shape, generator=rng, dtype=torch.float64)
    label = torch.randint(CLASSES, (GROUPS, GROUP), generator=rng)
    probe = torch.randn(GROUPS, PROBE, 3, 8, 8, generator=rng, dtype=torch.float64)
    probe_label = torch.randint(CLASSES, (GROUPS, PROBE), generator=rng)
    mine = list(range(rank, GROUPS, world))
    return Batch(
        weak_BCHW=weak[mine].flatten(0, 1).to(dtype),
        strong_BCHW=strong[mine].flatten(0, 1).to(dtype),
        label_B=label[mine].flatten(),
        probe_MCHW=probe[mine].flatten(0, 1).to(dtype),
        probe_label_M=probe_label[mine].flatten(),
        group_keys=tuple(1000 * step + group for group in mine),
        classes=CLASSES,
    )


def train(objective, dtype: torch.dtype, rank: int, world: int) -> dict:
    """Parameters, averages and every step's coefficients and total, after STEPS steps."""
    model = networks.build("wrn-10-1:group", 3, CLASSES, seed=1).to(dtype)
    state = TrainState(
        model,
        momentum=0.9,
        weight_decay=0.01,
        decayed=frozenset(name for name, _ in model.named_parameters()),
        average=objective.average_parameters,
    )
    workers = Processes() if world > 1 else Alone()
    said, totals = [], []
    for step in range(STEPS):
        batch = batch_of(step, rank, world, dtype)
        outcome = update(state, objective, batch, lr=0.05, workers=workers)
        said.append(dict(vars(outcome.coefficients)))
        totals.append(outcome.total.item())
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return {"parameters": parameters, "averaged": state.averaged, "said": said, "totals": totals}


def run(rank: int, world: int) -> dict:
    """All cases."""
    return {name: train(objective, dtype, rank, world) for name, (objective, dtype) in CASES.items()}


def check_mean(rank: int) -> dict:
    """What Processes.mean makes of tensors of several shapes, and its backward and double backward."""
    first = torch.tensor([1.0 + rank, 5.0 * rank], dtype=torch.float64, requires_grad=True)
    second = torch.full((2, 1), 10.0 * rank, dtype=torch.float64)
    mean_first, mean_second = Processes().mean([first, second])
    loss = (1 + 2 * rank) * (mean_first**3).sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), first)
    return {
        "size": Processes().size,
        "means": [mean_first.detach(), mean_second],
        "gradient": gradient.detach(),
        "curvature": curvature,
        "input": first.detach(),
    }


if __name__ == "__main__":
    rendezvous, output, this = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=this, world_size=2)
    torch.save({"runs": run(this, 2), "mean": check_mean(this)}, output)
    dist.destroy_process_group()
