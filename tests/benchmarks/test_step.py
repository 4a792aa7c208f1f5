import json
import subprocess
import sys

import pytest
import torch

from benchmarks import step
from training.engine.passes import compiled

ON_CPU = [name for name in step.HOW if "compiled" not in name and "graph" not in name]
TINY = ["--networks", "wrn-10-1", "--batch", "8", "--size", "8", "--rounds", "1", "--device", "cpu"]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # no C++ compiler
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def test_every_variant_has_its_time_and_memory(tmp_path, capsys):
    step.main(["--out", str(tmp_path / "out.json"), *TINY, "--dtypes", "float32"])
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == ON_CPU
    for row in rows.values():
        assert set(row) == {"network", "device", "dtype", "batch", "variant", "optimiser", "size", *step.FORMATS}
        assert row["ms"] > 0
    assert rows["vanilla"]["ratio_to_vanilla"] == rows["vanilla"]["memory_ratio"] == 1
    assert rows["second_order"]["memory_ratio"] > rows["exact"]["memory_ratio"] > 1
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_what_is_compiled_is_measured_where_it_is_named(tmp_path):
    named = ["vanilla_compiled", "compiled", "exact"]
    step.main(["--out", str(tmp_path / "out.json"), *TINY, "--variants", *named, "--optimiser", "adamw"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {"vanilla", *named}
    assert {row["optimiser"] for row in rows} == {"adamw"}
    assert all(row["ms"] > 0 for row in rows)


def test_what_fails_keeps_its_row(tmp_path, monkeypatch):
    exact = step.update

    def short_of_memory(state, objective, *args, **kwargs):
        if getattr(objective, "engine", "") == "second_order":
            raise torch.OutOfMemoryError("out of memory")
        return exact(state, objective, *args, **kwargs)

    monkeypatch.setattr(step, "update", short_of_memory)
    step.main(["--out", str(tmp_path / "out.json"), *TINY])
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["second_order"]["error"] == "second_order: out of memory"
    assert all(rows["second_order"][name] is None for name in step.FORMATS)
    assert rows["exact"]["ms"] > 0


def test_a_network_that_is_none_keeps_its_rows(tmp_path):
    step.main(["--out", str(tmp_path / "out.json"), *TINY, "--networks", "wrn-9-1"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == len(ON_CPU)
    assert all(row["ms"] is None and "wrn-9-1" in row["error"] for row in rows)


def test_it_runs_where_only_torch_is_installed():
    absent = "{'ray', 'pipeline', 'tyro', 'timm', 'torchvision', 'pyarrow'}"
    code = f"import sys, benchmarks.step; print(sorted({absent} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
