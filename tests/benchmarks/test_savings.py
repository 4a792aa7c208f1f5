import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import savings
from benchmarks.step import VARIANTS
from pipeline.digits import Digits
from training.engine.schedule import Schedule
from training.objectives.interface import Coefficients
from training.objectives.registry import METHODS
from training.recipe import Recipe


def tiny(_) -> Recipe:
    dataset, schedule = Digits(probe_per_class=2), Schedule(first_cycle=6, cycles=1)
    digits = Recipe("run", dataset, METHODS["winnow"](), network="wrn-10-1", schedule=schedule)
    return replace(digits, batch=20, probe_batch=20, group=10)


def test_every_variant_is_looked_at_and_those_asked_for_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(savings.digits, "recipe", tiny)
    out = tmp_path / "out.json"
    said = ["--out", str(out), "--steps", "6", "--look", "1", "5", "--variants", "vanilla", "last_layer"]
    monkeypatch.setattr(sys, "argv", ["savings", *said])
    threads = torch.get_num_threads()
    savings.main()
    torch.set_num_threads(threads)
    told = json.loads(out.read_text())
    looks = {(row["variant"], row["step"]): row for row in told["fidelity"]}
    assert set(looks) == {(name, step) for name in VARIANTS if name != "vanilla" for step in (1, 5)}
    for name in ("exact", "second_order"):
        for step in (1, 5):
            assert looks[name, step]["weight_rel_error"] < 1e-2
            assert looks[name, step]["trust_agreement"] == 1
    assert looks["last_layer", 5]["weight_rel_error"] > 0.1
    assert [row["variant"] for row in told["accuracy"]] == ["vanilla", "last_layer"]
    assert all(0 < row["top1"] <= 1 for row in told["accuracy"])


def test_distance_counts_what_it_says():
    def decided(weight, trust) -> Coefficients:
        weight_B, trust_B = torch.tensor(weight), torch.tensor(trust)
        return Coefficients(weight_B, trust_B, trust_B.long(), trust_B, trust_B)

    found = decided([3.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.9, 0.0])
    exact = decided([3.0, 0.0, 0.0, 4.0], [1.0, 0.0, 1.0, 1.0])
    assert savings.distance(found, exact) == pytest.approx((17**0.5 / 5, 0.5, 0.75))
