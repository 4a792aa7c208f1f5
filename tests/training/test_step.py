"""Two workers train as one: the same examples, the same parameters, the same coefficients.

Shapes: B noisy examples, K classes.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.step import normalised

SCRIPT = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks() -> dict:
    """The script's names, in this process."""
    return runpy.run_path(str(SCRIPT), run_name="ranks")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """What each of two processes found, on gloo over loopback; one start for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder / "rendezvous"), str(folder / f"{rank}.pt"), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=150)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(printed)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(ranks) -> dict:
    """The same cases on one worker."""
    return ranks["run"](0, 1)


def relative(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    gap = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return (gap / sum(float(value.square().sum()) for value in right.values())) ** 0.5


def in_group_order(parts: list[torch.Tensor], group: int) -> torch.Tensor:
    """The global batch's column from each rank's: group g is on rank g mod 2."""
    return torch.stack([part.reshape(-1, group) for part in parts], 1).flatten()


GLOBAL = [
    "supervised",
    "reweight",
    "reference",
    "paper",
    "threshold",
    "second_order",
    "second_order of paper",
    "second_order of reweight",
]


def test_all_cases_are_compared(ranks):
    assert list(ranks["GLOBAL"]) == GLOBAL


@pytest.mark.parametrize(("case", "tolerance"), [*((case, 1e-10) for case in GLOBAL), ("float32", 1e-6)])
def test_two_workers_train_as_one(case, tolerance, both, alone, ranks):
    one, two = alone[case], [worker["runs"][case] for worker in both]
    for key in ("parameters", "averaged"):
        assert all(torch.equal(two[0][key][name], two[1][key][name]) for name in two[0][key])
    assert relative(two[0]["parameters"], one["parameters"]) <= tolerance
    if case not in ("paper", "second_order of paper"):
        assert relative(two[0]["averaged"], one["averaged"]) <= tolerance
    for step in range(ranks["STEPS"]):
        assert (two[0]["totals"][step] + two[1]["totals"][step]) / 2 == pytest.approx(
            one["totals"][step], rel=10 * tolerance
        )
        for column, expected_B in one["said"][step].items():
            found_B = in_group_order([worker["said"][step][column] for worker in two], ranks["GROUP"])
            assert found_B.dtype == expected_B.dtype
            torch.testing.assert_close(found_B, expected_B, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("preset", ["reference", "paper", "reweight"])
def test_second_order_equals_forward_mode_on_two_workers(preset, both):
    exact = both[0]["runs"]["second_order" if preset == "reference" else f"second_order of {preset}"]
    assert relative(exact["parameters"], both[0]["runs"][preset]["parameters"]) <= 1e-10


def test_cases_differ_where_they_should(both, alone):
    """Training moved, workers saw different examples, and no case is another in disguise."""
    runs = both[0]["runs"]
    assert both[0]["runs"]["reference"]["totals"] != both[1]["runs"]["reference"]["totals"]
    names = ["supervised", "reweight", "reference", "paper", "threshold"]
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


def test_mean_and_its_backward(both):
    for worker in both:
        found = worker["mean"]
        inputs = [other["mean"]["input"] for other in both]
        mean = (inputs[0] + inputs[1]) / 2
        assert found["size"] == 2
        assert torch.equal(found["means"][0], mean)
        assert torch.equal(found["means"][1], torch.full((2, 1), 5.0, dtype=torch.float64))
        # Losses 1·Σm³ and 3·Σm³, whose mean is the objective: dL/dx is 2·3m², a worker's share of it without the ½.
        torch.testing.assert_close(found["gradient"], 2 * 3 * mean**2)
        # each worker then differentiates Σ gradient again: 2·6m, averaged over both alike
        torch.testing.assert_close(found["curvature"], 2 * 6 * mean)


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
