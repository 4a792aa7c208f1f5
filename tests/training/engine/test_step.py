"""Two workers train as one: the same examples, the same parameters, the same coefficients.

Shapes: B noisy examples, K classes.
"""

import os
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import training.engine.collectives
from training.engine.batch import normalised
from training.engine.optimiser import Sgd, kernels
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.interface import Alone
from training.objectives.registry import METHODS

aten = torch.ops.aten

SCRIPT = Path(__file__).parents[1] / "ranks.py"
ROOT = Path(__file__).parents[3]
RANKS = runpy.run_path(str(SCRIPT), run_name="ranks")  # the script's names, in this process
GLOBAL = RANKS["GLOBAL"]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """What each of two processes found, on gloo over loopback; one start for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=150)[0] for worker in workers]
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # the copies it made, too
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(printed)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict:
    """The same cases on one worker."""
    return RANKS["run"](0, 1)


def relative(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    gap = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return (gap / sum(float(value.square().sum()) for value in right.values())) ** 0.5


def in_group_order(parts: list[torch.Tensor], group: int) -> torch.Tensor:
    """The global batch's column from each rank's: group g is on rank g mod 2."""
    return torch.stack([part.reshape(-1, group) for part in parts], 1).flatten()


@pytest.mark.parametrize(
    ("case", "tolerance"), [*((case, 1e-10) for case in (*GLOBAL, "adamw", "adamw of winnow")), ("float32", 1e-6)]
)
def test_two_workers_train_as_one(case, tolerance, both, alone):
    one, two = alone[case], [worker["runs"][case] for worker in both]
    for key in ("parameters", "averaged"):
        assert all(torch.equal(two[0][key][name], two[1][key][name]) for name in two[0][key])
    assert relative(two[0]["parameters"], one["parameters"]) <= tolerance
    if RANKS["CASES"][case][0].average_parameters:
        assert relative(two[0]["averaged"], one["averaged"]) <= tolerance
    for step in range(RANKS["STEPS"]):
        assert (two[0]["totals"][step] + two[1]["totals"][step]) / 2 == pytest.approx(
            one["totals"][step], rel=10 * tolerance
        )
        for column, expected_B in one["said"][step].items():
            found_B = in_group_order([worker["said"][step][column] for worker in two], RANKS["GROUP"])
            assert found_B.dtype == expected_B.dtype
            torch.testing.assert_close(found_B, expected_B, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("case", [case for case, objective in GLOBAL.items() if objective.remembers])
def test_memory_is_the_same_on_both_workers_and_on_one(case, both, alone):
    one, two = alone[case]["memory"], [worker["runs"][case]["memory"] for worker in both]
    assert one.keys() == two[0].keys() == two[1].keys()
    for name, expected in one.items():
        if "running" in name or "tracked" in name:  # batch-norm statistics of a second network, which nothing reads
            continue
        torch.testing.assert_close(two[0][name], two[1][name], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(two[0][name], expected, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_gather_is_in_the_order_of_ranks(both):
    for worker in both:
        found = worker["gather"]
        for place, gathered in enumerate(found["gathered"]):
            assert torch.equal(gathered, torch.cat([other["gather"]["kept"][place] for other in both]))
            assert not gathered.requires_grad
        assert (found["traffic"]["reductions"], found["traffic"]["bytes"]) == (3, 2 * 4 + 2 * 8 + 1)


@pytest.mark.parametrize("preset", ["reference", "paper", "reweight"])
def test_second_order_equals_forward_mode_on_two_workers(preset, both):
    exact = both[0]["runs"]["second_order" if preset == "reference" else f"second_order of {preset}"]
    assert relative(exact["parameters"], both[0]["runs"][preset]["parameters"]) <= 1e-10


def test_cases_differ_where_they_should(both, alone):
    """Training moved, workers saw different examples, and no case is another in disguise."""
    runs = both[0]["runs"]
    assert both[0]["runs"]["reference"]["totals"] != both[1]["runs"]["reference"]["totals"]
    names = ["supervised", "reweight", "reference", "paper", "winnow", "threshold"]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert relative(runs[first]["parameters"], runs[second]["parameters"]) > 1e-4
    for step in alone["threshold"]["said"]:
        assert 0 < (step["weight_B"] >= 1).sum() < len(step["weight_B"])  # T = 1/16 of 16 examples


def test_replica_scope_depends_on_the_workers(both, alone):
    assert relative(alone["replica"]["parameters"], alone["reference"]["parameters"]) == 0
    assert relative(both[0]["runs"]["replica"]["parameters"], alone["replica"]["parameters"]) > 1e-4
    for worker in both:  # normalised over the replica's own batch
        for step in worker["runs"]["replica"]["said"]:
            assert float(step["weight_B"].mean()) == pytest.approx(1, abs=1e-2)
    first = [worker["runs"]["reference"]["said"][0]["weight_B"].mean().item() for worker in both]
    assert sum(first) / 2 == pytest.approx(1, abs=1e-2)
    assert abs(first[0] - first[1]) > 1e-2


@pytest.mark.parametrize("case", ["mean", "buckets"])
def test_mean_and_its_backward(case, both):
    for worker in both:
        found = worker[case]
        inputs = [other[case]["input"] for other in both]
        mean = (inputs[0] + inputs[1]) / 2
        assert found["size"] == 2
        assert torch.equal(found["means"][0], mean)
        assert torch.equal(found["means"][1], torch.full((2, 1), 5.0, dtype=torch.float64))
        # Losses 1·Σm³ and 3·Σm³, whose mean is the objective: dL/dx is 2·3m², a worker's share of it without the ½.
        torch.testing.assert_close(found["gradient"], 2 * 3 * mean**2)
        # each worker then differentiates Σ gradient again: 2·6m, averaged over both alike
        torch.testing.assert_close(found["curvature"], 2 * 6 * mean)


def test_buckets_cost_no_more_bytes(both):
    for worker in both:
        whole, cut = worker["mean"]["traffic"], worker["buckets"]["traffic"]
        # Forward, backward and both backwards of that, of 2 + 2 numbers: in one bucket or in two, where backward
        # passes only through the first.
        assert (whole["reductions"], whole["bytes"]) == (4, 4 * 4 * 8)
        assert (cut["reductions"], cut["bytes"]) == (5, 4 * 4 * 8 - 3 * 2 * 8)
        found = worker["buckets"]
        assert [mean.dtype for mean in found["mixed"]] == [torch.float64, torch.float32, torch.float32]
        assert all(torch.equal(mean, torch.full_like(mean, 0.5)) for mean in found["mixed"])
        assert torch.equal(found["lone"][0], torch.tensor([1.5]))
        assert found["none"] == []
    rank = both[1]["buckets"]["kept"]  # the arguments are as they were
    assert [value.tolist() for value in rank] == [[1, 1], [1, 1], [1, 1], [2]]


def test_buckets_are_runs_of_one_dtype_within_the_size(monkeypatch):
    monkeypatch.setattr(training.engine.collectives, "BUCKET_BYTES", 16)
    sizes = [(1, torch.float32), (3, torch.float32), (1, torch.float32), (9, torch.float32), (1, torch.float64)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    cut = [[id(tensor) for tensor in bucket] for bucket in training.engine.collectives.buckets(tensors)]
    first, second, third, long, double = map(id, tensors)
    assert cut == [[first, second], [third], [long], [double]]
    assert list(training.engine.collectives.buckets([])) == []


TRAFFIC = {  # all-reduces of parameter size in a step, and the numbers in each small one
    "supervised": (1, []),
    "reweight": (2, [1]),  # the sum of ω
    "reference": (3, [2, 1, 2, 2]),  # logit norm of the views, ω, logit norm of the mixed blocks and its backward
    "paper": (3, [1]),
    "winnow": (3, [4, 1, 1]),  # the average answer (K), the pace, ω
    "second_order": (3, [2, 1, 2, 2]),
    "replica": (1, []),
    "float32": (3, [2, 1, 2, 2]),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_a_step_reduces_at_most_two_more_copies_of_the_parameters(case, both):
    large, small = TRAFFIC[case]
    assert large <= 3
    for worker in both:
        found = worker["runs"][case]
        parameters = found["parameters"].values()
        assert sum(value.nbytes for value in parameters) < training.engine.collectives.BUCKET_BYTES
        count = sum(value.numel() for value in parameters)
        size = next(iter(parameters)).element_size()
        assert found["traffic"]["reductions"] == RANKS["STEPS"] * (large + len(small))
        assert found["traffic"]["bytes"] == RANKS["STEPS"] * size * (large * count + sum(small))
        assert found["traffic"]["seconds"] > 0


@pytest.mark.parametrize("name", RANKS["LOSSES"])
def test_who_is_left_names_who_is_lost(name, both):
    how, lost, before = RANKS["LOSSES"][name]
    left, at = 1 - lost, RANKS["LOST_AT"]
    whom = f"rank 1 (last seen at step {at - (before == 0)})" if lost else "rank 0, which no longer serves the others"
    found = both[left]["losses"][name]
    said = re.match(rf"rank {left} of 2 waited (\d+\.\d) s at step {at} for {re.escape(whom)}", found["error"])
    assert said, found["error"]
    assert "\n" not in found["error"]
    if how != "killed":
        assert float(said[1]) >= RANKS["TIMEOUT"] - 0.1
    assert found["seconds"] < RANKS["TIMEOUT"] + 5


class NoWaiting(TorchDispatchMode):
    """Raises where the host would have to wait for a number that a GPU computes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten._unique2), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [name for name, make in METHODS.items() if not make().remembers])
def test_a_step_never_waits_for_the_device(method, problem):
    objective = METHODS[method]()
    optimiser = Sgd(problem.model, nn.Module(), momentum=0.9, weight_decay=0.03, decays=kernels)
    state = TrainState(problem.model, optimiser, average=True)
    for _ in range(2):  # before and after there is a momentum
        with NoWaiting():
            update(state, objective, problem.batch, lr=0.05, workers=Alone(), steps=2)


def test_waiting_is_noticed():
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(()).item()


class Convolutions(TorchDispatchMode):
    """Counts them, by kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "passes"), [("winnow", 4), ("reference", 4), ("reweight", 2), ("mwn", 2), ("mlc", 3)]
)
def test_nothing_is_computed_twice(method, passes, problem):
    """Of L convolutions: each pass (weak, trusted; strong, joint; taught) forwards L; tangents 2L but for the images,
    which do not move; backward L for each pass and, but with ω0 = 0, for the inner loss.
    """
    layers = sum(isinstance(module, nn.Conv2d) for module in problem.model.modules())
    objective = METHODS[method]()
    memory = objective.memory(problem.model, 40, problem.batch.classes)
    optimiser = Sgd(problem.model, memory, momentum=0.9, weight_decay=0.0)
    state = TrainState(problem.model, optimiser, average=True, memory=memory)
    with Convolutions() as seen:
        update(state, objective, problem.batch, lr=0.05, workers=Alone())
    assert seen.counted[aten.convolution] == (passes + 2) * layers - 1
    inner = 0 if method == "reweight" else 1
    extra = 1 if method == "mlc" else 0  # what teaches is in the inner loss, too
    assert seen.counted[aten.convolution_backward] == (passes + inner + extra) * layers


def test_normalised_is_minus_one_to_one_channels_last():
    image_NHWC = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 8, 2)
    before = image_NHWC.clone()
    image_NCHW = normalised(image_NHWC)
    assert image_NCHW.shape == (2, 2, 8, 8)
    assert image_NCHW.dtype == torch.get_default_dtype()
    assert (image_NCHW.min(), image_NCHW.max()) == (-1, 1)
    torch.testing.assert_close(image_NCHW[1, 0, 3, 4], image_NHWC[1, 3, 4, 0] / 127.5 - 1)
    assert image_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image_NHWC, before)
