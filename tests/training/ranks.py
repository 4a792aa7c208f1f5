"""What test_step.py runs as one of two workers, a script for each rank; `run` trains its cases alone too.

Shapes: B noisy examples of this worker, M probe examples, K classes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import training.engine.collectives
from training.engine import networks
from training.engine.adamw import AdamW
from training.engine.clipping import Clipped
from training.engine.collectives import Processes, WorkersError
from training.engine.optimiser import Sgd
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.baselines.reweight import Reweight
from training.objectives.ieg import paper, reference, winnow
from training.objectives.interface import Alone, Batch
from training.objectives.registry import METHODS

CLASSES, GROUPS, GROUP, PROBE, STEPS = 4, 4, 4, 3, 4
EXAMPLES = 40  # of the training set: an epoch is 2.5 steps, and a batch can have a row twice
TIMEOUT = 3.0  # s, of an all-reduce in `lose`
LOST_AT, REDUCTIONS = 2, 7  # the step at which a worker is lost in `lose`, and the all-reduces of each step there
LOSSES = {  # how which worker is lost, and before which all-reduce of the step
    "stopped before the step": ("stopped", 1, 0),
    "killed in the step": ("killed", 1, 2),
    "killed in backward": ("killed", 1, 5),
    "rank 0 killed": ("killed", 0, 2),
    "rank 0 frozen": ("frozen", 0, 2),
}
GLOBAL = {  # on two workers they are what they are on one
    **{name: make() for name, make in METHODS.items()},
    "threshold": replace(reference(), threshold=1 / 16),
    "last_block": replace(winnow(), meta_scope="last_block"),
    "second_order": replace(reference(), engine="second_order"),
    "second_order of paper": replace(paper(), engine="second_order"),
    "second_order of reweight": Reweight(engine="second_order"),
}


def batch_of(step: int, rank: int, world: int, dtype: torch.dtype) -> Batch:
    """The groups that `rank` holds of one global batch: those whose number is rank modulo world."""
    rng = torch.Generator().manual_seed(100 + step)
    weak = torch.randn(GROUPS, GROUP, 3, 8, 8, generator=rng, dtype=torch.float64)
    strong = weak + 0.5 * torch.randn(weak.shape, generator=rng, dtype=torch.float64)
    row = torch.randint(EXAMPLES, (GROUPS, GROUP), generator=rng)
    label = (row * row + row // 3) % CLASSES
    probe = torch.randn(GROUPS, PROBE, 3, 8, 8, generator=rng, dtype=torch.float64)
    probe_label = torch.randint(CLASSES, (GROUPS, PROBE), generator=rng)
    mine = list(range(rank, GROUPS, world))
    return Batch(
        weak_BCHW=weak[mine].flatten(0, 1).to(dtype),
        strong_BCHW=strong[mine].flatten(0, 1).to(dtype),
        label_B=label[mine].flatten(),
        row_B=row[mine].flatten(),
        probe_MCHW=probe[mine].flatten(0, 1).to(dtype),
        probe_label_M=probe_label[mine].flatten(),
        group_keys=tuple(1000 * step + group for group in mine),
        classes=CLASSES,
    )


def sgd(model, memory):
    return Sgd(model, memory, momentum=0.9, weight_decay=0.01)


def adamw(model, memory):
    """Of clipped gradients, whose norm all workers must agree on."""
    inner = AdamW(model, memory, momentum=0.9, weight_decay=0.01)
    return Clipped(inner, [*model.parameters(), *memory.parameters()], norm=0.5)


def new_state(objective, dtype: torch.dtype, make: Callable = sgd) -> TrainState:
    """The same on every worker."""
    model = networks.build("wrn-10-1:group", 3, CLASSES, seed=1).to(dtype)
    memory = objective.memory(model, EXAMPLES, CLASSES)
    return TrainState(model, make(model, memory), average=objective.average_parameters, memory=memory)


def train(objective, dtype: torch.dtype, make: Callable, rank: int, world: int) -> dict:
    """Parameters, averages, memory, every step's coefficients and total, and the traffic, after STEPS steps."""
    state = new_state(objective, dtype, make)
    workers = Processes() if world > 1 else Alone()
    said, totals = [], []
    for step in range(STEPS):
        batch = batch_of(step, rank, world, dtype)
        outcome = update(state, objective, batch, lr=0.05, workers=workers, steps=STEPS)
        said.append(dict(vars(outcome.coefficients)))
        totals.append(outcome.total.item())
    parameters = {name: value.detach() for name, value in state.model.named_parameters()}
    traffic = dict(vars(workers.traffic)) if world > 1 else {}
    return {
        "parameters": parameters, "averaged": state.averaged, "memory": dict(state.memory.state_dict()), "said": said,
        "totals": totals, "traffic": traffic,
    }  # fmt: skip


CASES = {
    **{name: (objective, torch.float64, sgd) for name, objective in GLOBAL.items()},
    "replica": (replace(reference(), scope="replica"), torch.float64, sgd),
    "float32": (reference(), torch.float32, sgd),
    "adamw": (reference(), torch.float64, adamw),
    "adamw of winnow": (winnow(), torch.float64, adamw),
}


def run(rank: int, world: int) -> dict:
    """All cases; those that are one and the same under several names, such as some of Table 9, train once."""
    trained = {}
    for case in CASES.values():
        if case not in trained:
            trained[case] = train(*case, rank, world)
    return {name: trained[case] for name, case in CASES.items()}


def check_mean(rank: int) -> dict:
    """What Processes.mean makes of tensors of several shapes, and its backward and double backward."""
    first = torch.tensor([1.0 + rank, 5.0 * rank], dtype=torch.float64, requires_grad=True)
    second = torch.full((2, 1), 10.0 * rank, dtype=torch.float64)
    workers = Processes()
    mean_first, mean_second = workers.mean([first, second])
    loss = (1 + 2 * rank) * (mean_first**3).sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), first)
    return {
        "size": workers.size,
        "means": [mean_first.detach(), mean_second],
        "gradient": gradient.detach(),
        "curvature": curvature,
        "input": first.detach(),
        "traffic": dict(vars(workers.traffic)),
    }


def check_buckets(rank: int) -> dict:
    """The same with a bucket each, two precisions, a tensor alone in the call, and none."""
    whole, training.engine.collectives.BUCKET_BYTES = training.engine.collectives.BUCKET_BYTES, 16
    found = check_mean(rank)
    training.engine.collectives.BUCKET_BYTES = whole
    mixed = [torch.full((2,), float(rank), dtype=dtype) for dtype in (torch.float64, torch.float32, torch.float32)]
    lone = torch.tensor([1.0 + rank])
    return {**found, "mixed": Processes().mean(mixed), "lone": Processes().mean([lone]), "kept": [*mixed, lone],
            "none": Processes().mean([])}  # fmt: skip


def check_gather(rank: int) -> dict:
    """What Processes.gather makes of tensors of several shapes and kinds."""
    workers = Processes()
    kept = [torch.tensor([1.5 + rank, 9.0], requires_grad=True), torch.tensor([[rank, 7]]).T.contiguous().T,
            torch.tensor([bool(rank)])]  # fmt: skip
    gathered = [workers.gather(tensor) for tensor in kept]
    return {"gathered": gathered, "kept": [tensor.detach() for tensor in kept], "traffic": dict(vars(workers.traffic))}


class Losing(Processes):
    """A worker that stops, freezes or is killed before its `fatal` all-reduce of step LOST_AT."""

    how, fatal = "", 0

    def all_reduce(self, flat: torch.Tensor) -> None:
        """See `Processes`."""
        if self.how and self.traffic.reductions == LOST_AT * REDUCTIONS + self.fatal:
            if self.how == "stopped":
                time.sleep(1.5 * TIMEOUT)
            elif self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            else:  # its threads too: the one that serves the notes
                subprocess.Popen(f"sleep {2 * TIMEOUT}; kill -9 {os.getpid()}", shell=True)
                os.kill(os.getpid(), signal.SIGSTOP)
        super().all_reduce(flat)


def lose(rank: int, how: str, lost: int, fatal: int) -> dict:
    """What the worker that is left says, and how many seconds after it began the step."""
    training.engine.collectives.NOTES_SECONDS = 1.0
    state, workers = new_state(reference(), torch.float32), Losing()
    if rank == lost:
        workers.how, workers.fatal = how, fatal
    for step in range(LOST_AT + 1):
        start = time.monotonic()
        try:
            update(state, reference(), batch_of(step, rank, 2, torch.float32), lr=0.05, workers=workers)
        except WorkersError as error:
            return {"error": str(error), "seconds": time.monotonic() - start}
    return {}


def join(folder: Path, rank: int, timeout: float) -> None:
    """As Ray Train does: rank 0 serves the store, the others are told where."""
    folder.mkdir(exist_ok=True)
    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "new").write_text(str(store.port))
        (folder / "new").rename(port)
    else:
        while not port.exists():
            time.sleep(0.05)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout))


def losses(folder: Path, rank: int) -> dict:
    """What `lose` found in each case, in a copy of this process each: it may die, and its group cannot be wound up."""
    found = {}
    for name, what in LOSSES.items():
        if not (copy := os.fork()):
            join(folder / name, rank, TIMEOUT)
            torch.save(lose(rank, *what), folder / name / f"{rank}.pt")
            os._exit(0)
        os.waitpid(copy, 0)
        saved = folder / name / f"{rank}.pt"
        found[name] = torch.load(saved, weights_only=True) if saved.exists() else {}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, this = Path(sys.argv[1]), int(sys.argv[2])
    update(new_state(reference(), torch.float32), reference(), batch_of(0, 0, 1, torch.float32), lr=0, workers=Alone())
    said = {"losses": losses(folder, this)}  # while the process has no group; torch has imported all it needs by now
    join(folder / "whole", this, 120)
    said |= {"runs": run(this, 2), "mean": check_mean(this), "buckets": check_buckets(this)}
    said |= {"gather": check_gather(this)}
    torch.save(said, folder / f"{this}.pt")
    dist.destroy_process_group()
