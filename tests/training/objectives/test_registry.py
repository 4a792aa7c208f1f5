"""A new objective is one file and one line of the registry: then every contract test runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.objectives.registry import BASELINES, METHODS

ROOT = Path(__file__).parents[3]
FILE = '''
"""Cross-entropy that grows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from training.objectives.interface import Objective, Outcome
from training.objectives.losses import plain_coefficients


class Count(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=dtype))


@dataclass(frozen=True)
class Toy(Objective):
    average_parameters: bool = True
    staged = True

    def memory(self, model, examples, classes):
        return Count(next(model.parameters()).dtype)

    def __call__(self, model, batch, moment, workers):
        moment.memory.steps += 1
        logits_BK = model(batch.weak_BCHW)
        loss = (1 + moment.progress) * F.cross_entropy(logits_BK, batch.label_B)
        coefficients = plain_coefficients(logits_BK, batch.label_B)
        return Outcome(loss, {"label": loss.detach()}, coefficients, logits_BK.detach().softmax(1))
'''
LINE = '    "toy": baseline("toy", "Toy"),\n'
COLLECT = """
import json, sys
from importlib import util
from pathlib import Path

import pytest
import training.objectives.baselines

folder, files = Path(sys.argv[1]), sys.argv[2:]
training.objectives.baselines.__path__.append(str(folder))  # as if toy.py were in it
spec = util.find_spec("training.objectives.registry")
registry = sys.modules[spec.name] = util.module_from_spec(spec)
exec(compile((folder / "registry.py").read_text(), spec.origin, "exec"), registry.__dict__)


class Collected:
    def pytest_collection_modifyitems(self, items):
        named = [item for item in items if hasattr(item, "callspec")]
        told = [(item.nodeid, [v for v in item.callspec.params.values() if isinstance(v, str)]) for item in named]
        (folder / "collected.json").write_text(json.dumps(told))
        items[:] = [item for item in named if item.path.name == "test_objectives.py" and "toy" in item.callspec.id]


sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[Collected()]))
"""


def run_by(collected: list[tuple[str, list[str]]]) -> dict[str, set[str]]:
    """The methods that each parametrised test runs, as they are or late in a run."""
    methods: dict[str, set[str]] = {}
    for node, values in collected:
        named = {value.removesuffix(" later") for value in values} & {*METHODS, "toy"}
        methods.setdefault(node.partition("[")[0], set()).update(named)
    return methods


def contracts(methods: dict[str, set[str]]) -> set[str]:
    """The tests that run many baselines: at least half of those that have a trait, or of all."""
    traits = [{name for name, make in BASELINES.items() if kept(make())} for kept in (bool, REMEMBERS, STAGED)]
    return {test for test, named in methods.items() if any(2 * len(named & having) >= len(having) for having in traits)}


def REMEMBERS(objective) -> bool:
    return objective.remembers


def STAGED(objective) -> bool:
    return objective.staged


@pytest.fixture(scope="module")
def with_a_toy(tmp_path_factory):
    """What is collected, and the outcome of test_objectives, in a process that has one file and one line more."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(FILE)
    registry = (ROOT / "training/objectives/registry.py").read_text()
    last = next(line for line in registry.splitlines(keepends=True) if line.startswith('    "mixmatch-kl": '))
    (folder / "registry.py").write_text(registry.replace(last, last + LINE))
    files = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "objectives.registry" in file.read_text()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(folder), *files],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (folder / "collected.json").exists(), done.stdout + done.stderr
    return json.loads((folder / "collected.json").read_text()), done


def test_every_contract_test_runs_a_new_objective(with_a_toy):
    methods = run_by(with_a_toy[0])
    found = contracts(methods)
    assert sorted(test for test in found if "toy" not in methods[test]) == []
    names = {test.rpartition("::")[2] for test in found}
    assert {
        "test_loss_is_finite_and_every_parameter_learns",
        "test_every_baseline_gets_further_than_cross_entropy",
        "test_two_workers_train_as_one",
        "test_memory_is_the_same_on_both_workers_and_on_one",
        "test_a_saved_run_continues_bit_for_bit",
        "test_nothing_waits_for_a_gpu",
        "test_chunks_and_bf16_serve_every_objective",
        "test_every_method_is_a_fresh_frozen_objective",
    } <= names


def test_a_new_objective_keeps_the_contract(with_a_toy):
    assert with_a_toy[1].returncode == 0, with_a_toy[1].stdout
    assert " passed" in with_a_toy[1].stdout


def test_a_list_of_its_own_would_be_noticed():
    listed = [(f"test_x.py::test_own[{name}]", [name]) for name in BASELINES]
    few = [(f"test_x.py::test_claim[{name}]", [name]) for name in ("winnow", "gce", "M-1")]
    methods = run_by([*listed, *few])
    assert contracts(methods) == {"test_x.py::test_own"}
    assert "toy" not in methods["test_x.py::test_own"]
    remembering = [(f"test_x.py::test_own[{name} later]", [f"{name} later"]) for name in BASELINES][5:15]
    assert contracts(run_by(remembering)) == {"test_x.py::test_own"}
