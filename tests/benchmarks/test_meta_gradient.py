import json
import subprocess
import sys

import pytest
import torch

from benchmarks import meta_gradient

NAMES = {"engine", "network", "device", "dtype", "batch", *meta_gradient.FORMATS}
TINY = ["--networks", "wrn-10-1", "--batch", "8", "--size", "8", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_engine_has_its_costs_and_its_distance_from_the_oracle(tmp_path, capsys):
    meta_gradient.main(["--out", str(tmp_path / "out.json"), *TINY, "--dtypes", "float64", "float32"])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["threads"] == 1
    assert written["torch"] == torch.__version__
    assert written["device"]
    assert not written["tf32"]
    rows = {(row["engine"], row["dtype"]): row for row in written["rows"]}
    assert set(rows) == {(engine, dtype) for engine in meta_gradient.ENGINES for dtype in ("float64", "float32")}
    for row in rows.values():
        assert set(row) == NAMES
        assert (row["network"], row["device"], row["batch"]) == ("wrn-10-1", "cpu", 8)
        assert row["time_ratio"] == pytest.approx(row["seconds"] / row["vanilla_seconds"])
        assert 0.3 < row["memory_ratio"] < 30
        assert 0 <= row["trust_sign_agreement"] <= 1
    assert rows["forward", "float64"]["weight_rel_error"] <= 1e-10
    assert rows["forward", "float64"]["trust_sign_agreement"] == 1
    assert rows["second_order", "float64"]["weight_rel_error"] <= 1e-10
    assert 0 < rows["forward", "float32"]["weight_rel_error"] < 1e-3
    assert rows["second_order", "float32"]["memory_ratio"] > rows["forward", "float32"]["memory_ratio"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_an_engine_that_fails_keeps_its_row(tmp_path, monkeypatch):
    exact = meta_gradient.meta_gradient

    def short_of_memory(engine, problem):
        if engine == "second_order" and problem.logits_BK.dtype == torch.float32:
            raise torch.OutOfMemoryError("out of memory")
        return exact(engine, problem)

    monkeypatch.setattr(meta_gradient, "meta_gradient", short_of_memory)
    meta_gradient.main(["--out", str(tmp_path / "out.json"), *TINY])
    forward, second_order = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert second_order["error"] == "second_order: out of memory"
    assert all(second_order[name] is None for name in meta_gradient.FORMATS if name != "vanilla_seconds")
    assert "error" not in forward
    assert forward["seconds"] > 0


def test_a_network_that_cannot_be_set_up_keeps_its_rows(tmp_path, monkeypatch):
    def prepare(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(meta_gradient, "prepare", prepare)
    meta_gradient.main(["--out", str(tmp_path / "out.json"), *TINY])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["error"] for row in rows] == ["setting: out of memory"] * 2
    assert all(row[name] is None for row in rows for name in meta_gradient.FORMATS)


@pytest.mark.slow
def test_it_runs_where_only_torch_is_installed():
    absent = "{'ray', 'pipeline', 'tyro', 'timm', 'torchvision', 'pyarrow'}"
    code = f"import sys, benchmarks.meta_gradient; print(sorted({absent} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
