"""The paper's cells, their recipes, and a run of one, on made-up CIFAR."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from benchmarks import paper, semantic_noise, tables
from benchmarks.paper import cells
from benchmarks.tables import Row, Settings, chosen_cells, markdown, mean_and_deviation, read_rows, recipe_of
from pipeline.dataset import InputError
from pipeline.noise import Noise
from training.engine import networks
from training.engine.schedule import Schedule
from training.objectives.ieg import winnow
from training.objectives.registry import METHODS

SETTINGS = Settings(data="data", storage="runs")


@pytest.fixture
def made_up_cifar(tmp_path):
    """200 training and 40 test images of 10 classes, balanced, as Parquet."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 40)):
        images = [
            cv2.imencode(".png", image)[1].tobytes() for image in rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        ]
        table = pa.table({"label": rng.permutation(np.arange(count) % 10), "image_png": images})
        (tmp_path / "cifar").mkdir(exist_ok=True)
        pq.write_table(table, f"{tmp_path}/cifar/{split}.parquet")
    return f"{tmp_path}/cifar"


def cell(name):
    (found,) = chosen_cells((name,))
    return found


def test_names_are_unique_and_every_cell_has_a_recipe():
    every = cells()
    assert len({each.name for each in every}) == len(every)
    assert {each.table for each in every} == {*(f"T{n}" for n in range(1, 10)), "F2", "F3", "F4", "S5.3", "A"}
    for each in every:
        recipe = recipe_of(each, SETTINGS, seed=1)
        assert recipe.seed == 1
        assert recipe.network == each.network


def test_what_the_paper_prints():
    """Counts and some figures read off the paper by eye, beside what was typed."""
    printed = [each for each in cells() if each.published]
    by_table = {table: sum(each.table == table for each in printed) for table in ("T1", "T2", "T3", "T4", "T5", "T6")}
    assert by_table == {"T1": 37, "T2": 34, "T3": 10, "T4": 8, "T5": 21, "T6": 8}
    assert cell("T1:cifar10:uniform:0.8:rn29").published == "85.6 ± 1.1"
    assert cell("T2:cifar100:uniform:0.8:wrn").published == "75.5 ± 0.2"
    assert cell("T5:cifar10:open_set:imagenet:rog").published == "84.4"
    assert cell("T9:cifar100:uniform:0.8:M-6").published == "54.76"


def test_recipes_are_the_paper_s():
    recipe = recipe_of(cell("T1:cifar10:uniform:0.8:rn29"), SETTINGS, 0)
    assert (recipe.network, recipe.weight_decay, recipe.decay) == ("resnet29", 2e-4, "kernels")
    assert recipe.schedule.steps == 85_498
    assert recipe.dataset.noise == Noise("uniform", 0.8)
    assert recipe.dataset.probe_per_class == 10
    assert recipe_of(cell("T1:cifar10:uniform:0.2:wrn-1-a-class"), SETTINGS, 0).dataset.probe_per_class == 1
    assert recipe_of(cell("T4:cifar10:semantic:wrn"), SETTINGS, 0).dataset.noise.source.endswith("rog_semantic_vgg")
    assert recipe_of(cell("T6:webvision:inception"), SETTINGS, 0).objective.kl == 4
    assert recipe_of(cell("T6:webvision-mini:inception"), SETTINGS, 0).objective.kl == 8
    assert recipe_of(cell("F2:cifar10:uniform:0.4:wrn-steps"), SETTINGS, 0).schedule.drops == (40_000, 50_000)
    assert recipe_of(cell("F3:cifar100:uniform:0.8:k1"), SETTINGS, 0).objective.kl == 1
    ablated = recipe_of(cell("T9:cifar100:uniform:0.4:M-7"), SETTINGS, 0)
    assert ablated.objective == METHODS["reference"]()
    assert ablated.dataset.policy == "none"
    assert recipe_of(cell("A:cifar10:uniform:0.8:winnow-M-4"), SETTINGS, 0).objective == replace(winnow(), kl=0.0)


def test_methods_that_are_told_the_noise_are_told_it():
    told = {
        name: recipe_of(cell(f"A:cifar10:{name}:co-teaching"), SETTINGS, 0).objective.noise_rate
        for name in ("uniform:0.8", "asymmetric:0.4", "semantic", "human")
    }
    assert told == pytest.approx({"uniform:0.8": 0.72, "asymmetric:0.4": 0.2, "semantic": 0.3, "human": 0.4})
    assert recipe_of(cell("A:cifar10:uniform:0.8:mentornet"), SETTINGS, 0).objective.percentile == 0.5


def test_the_small_scale_changes_the_size_alone():
    small = recipe_of(cell("A:cifar10:uniform:0.8:gce"), replace(SETTINGS, scale="small"), 0)
    full = recipe_of(cell("A:cifar10:uniform:0.8:gce"), SETTINGS, 0)
    assert small.objective == full.objective
    assert small.dataset == replace(full.dataset, size=16, limit=2_000)
    with pytest.raises(InputError, match="has no small version"):
        recipe_of(cell("T2:cifar100:uniform:0.8:wrn"), replace(SETTINGS, scale="small"), 0)


def test_patterns():
    assert [each.row for each in chosen_cells(("T7:*",))] == ["supervised", "cleannet", "self-learning", "rn50"]
    assert len(chosen_cells(("T7:*", "T7:food101n:rn50"))) == 4
    with pytest.raises(InputError, match=r"no cell is called T1:cifar10:uniform:0.8:rn92: did you mean .*rn29"):
        chosen_cells(("T1:cifar10:uniform:0.8:rn92",))


@pytest.mark.parametrize("name", sorted({each.network for each in cells()} - {"inception_resnet_v2", "resnet50"}))
def test_the_networks_are_there(name):
    assert networks.build(name, 3, 10, seed=0)


def row(name, seed, top1, scale="small"):
    return Row(name, scale, seed, top1, top1, 300, "wrn-10-1", 0.4, None, None, 1.0, "CPU", "0")


def test_means_and_deviations_are_over_seeds_of_one_scale():
    rows = [row("A", 0, 0.30), row("A", 1, 0.34), row("A", 0, 0.9, "full"), row("B", 0, 0.5)]
    assert mean_and_deviation(rows, "A", "small") == "32.0 ± 2.0"
    assert mean_and_deviation(rows, "A", "full") == "90.0"
    assert mean_and_deviation(rows, "C", "small") == ""


def test_the_results_page_shows_what_was_measured():
    root = Path(tables.__file__).parents[1]
    assert markdown(read_rows(f"{root}/{tables.RESULTS}")) in (root / "docs" / "results.md").read_text()


def test_a_method_that_was_not_measured_is_not_in_the_table(monkeypatch):
    rows = [row(each.name, 0, 0.5) for each in cells() if each.table == "A" and each.method == "winnow"]
    rows.append(row("A:cifar10:semantic:gce", 0, 0.25))
    before = markdown(rows)
    assert [line.split(" | ")[0] for line in before.splitlines()[2:4]] == ["| `winnow`", "| `gce`"]
    assert "supervised" not in before
    monkeypatch.setitem(paper.BASELINES, "toy", METHODS["supervised"])
    monkeypatch.setitem(METHODS, "toy", METHODS["supervised"])
    assert any(each.method == "toy" for each in cells())
    assert markdown(rows) == before


@pytest.mark.slow
def test_a_cell_runs_is_kept_and_is_not_run_again(made_up_cifar, tmp_path, monkeypatch, capsys):
    def tiny(_, recipe):
        dataset = replace(recipe.dataset, size=8, limit=40, probe_per_class=2)
        changes = {"batch": 10, "probe_batch": 10, "group": 10, "schedule": Schedule(first_cycle=6, cycles=1)}
        return replace(recipe, dataset=dataset, network="wrn-10-1", actors=1, evaluate_every=3, **changes)

    monkeypatch.setattr(tables, "_small", tiny)
    out = tmp_path / "results" / "tables.jsonl"
    options = f"--scale small --data {made_up_cifar} --storage {tmp_path}/runs --out {out} --workers 0 --seeds 1"
    command = ["tables", "A:cifar10:uniform:0.4:supervised", "A:cifar10:uniform:0.4:rog", *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    tables.main()
    supervised, rog = read_rows(str(out))
    assert (supervised.steps, supervised.seed, supervised.trust_right) == (6, 0, 1.0)
    assert 0.1 < supervised.noise_rate < 0.6
    assert 0 <= supervised.top1 <= supervised.best_top1 <= 1
    assert rog.cell.endswith(":rog")
    assert len(list((tmp_path / "runs").iterdir())) == 1  # RoG classifies with the network that is there
    before = out.read_text()
    tables.main()
    assert out.read_text() == before
    assert "A:cifar10:uniform:0.4:rog" in capsys.readouterr().out
    assert json.loads(before.splitlines()[0]) == asdict(supervised)
    monkeypatch.setattr(tables, "_version", lambda: "newer")
    monkeypatch.setattr(sys, "argv", [*command[:2], *options.split(), "--again"])
    for _ in range(2):  # once
        tables.main()
    assert out.read_text().startswith(before)
    assert len(out.read_text().splitlines()) == 3
    assert [each.version for each in read_rows(str(out))] == ["newer", rog.version]
    assert (tmp_path / "runs" / "newer").is_dir()


@pytest.mark.slow
def test_a_weak_network_labels_all_training_images(made_up_cifar, tmp_path, monkeypatch):
    out = f"{tmp_path}/labels.npz"
    np.savez(out, other=np.arange(3))
    settings = semantic_noise.Settings(
        made_up_cifar, out, clean=40, network="wrn-10-1", size=8, steps=4, storage=f"{tmp_path}/runs"
    )
    monkeypatch.setattr(semantic_noise.tyro, "cli", lambda *_, **__: settings)
    semantic_noise.main()
    arrays = np.load(out)
    assert list(arrays["other"]) == [0, 1, 2]
    label_N, true_N = semantic_noise.semantic_labels(settings, Console(quiet=True))
    np.testing.assert_array_equal(arrays["semantic_wrn_10_1"], label_N)
    assert len(label_N) == len(true_N)
    assert set(label_N) <= set(range(10))
    np.testing.assert_array_equal(np.bincount(true_N), len(true_N) // 10)
