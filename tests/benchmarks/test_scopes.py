import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import scopes
from benchmarks.paper import cells
from pipeline.digits import Digits
from pipeline.noise import Noise
from training.engine.schedule import Schedule
from training.objectives.registry import METHODS
from training.recipe import Recipe


def tiny(cell, tables, seed) -> Recipe:
    dataset, schedule = Digits(Noise("uniform", 0.4), probe_per_class=2), Schedule(first_cycle=26, cycles=1)
    digits = Recipe("run", dataset, METHODS["winnow"](), network="wrn-10-1", schedule=schedule, seed=seed)
    return replace(digits, batch=20, probe_batch=20, group=10)


@pytest.mark.slow
def test_every_scope_is_trained_and_all_are_asked_on_the_exact_way(tmp_path, monkeypatch):
    one = next(cell for cell in cells() if cell.name == "A:cifar10:uniform:0.4:winnow")
    monkeypatch.setattr(scopes, "cells", lambda: [one])
    monkeypatch.setattr(scopes, "recipe_of", tiny)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["scopes", "--out", str(out), "--data", "", "--seeds", "3"])
    threads = torch.get_num_threads()
    scopes.main()
    torch.set_num_threads(threads)
    told = json.loads(out.read_text())
    assert [(row["noise"], row["seed"], row["scope"]) for row in told["accuracy"]] == [
        ("uniform:0.4", 3, scope) for scope in scopes.SCOPES
    ]
    assert [row["scope"] for row in told["judgement"]] == list(scopes.SCOPES)
    assert len({row["top1"] for row in told["accuracy"]}) > 1
    assert len({row["weight_auroc"] for row in told["judgement"]}) == 3


def test_judgement_is_what_it_says():
    seen_3N = np.array([[1, 1, 0, 0], [2.0, 0.5, 1.0, 0.0], [1, 0, 0, 0]])
    row = scopes.judgement(next(iter(cells())), 0, "all", seen_3N)
    assert (row.weight_auroc, row.trust_right, row.trust_wrong) == pytest.approx((0.75, 0.5, 0.0))
