"""A run's folder belongs to a recipe and data, whichever version of the code made it."""

import copy
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cifar import Cifar
from pipeline.dataset import HeldOut, InputError
from pipeline.digits import Digits
from pipeline.index import Sharded
from training import launch
from training.engine.schedule import Schedule
from training.objectives.baselines.cleannet import CleanNet
from training.objectives.baselines.elr import Elr
from training.objectives.ieg import winnow
from training.recipe import Recipe
from training.runs import recipe_file
from training.runs.recipe_file import DATA, differences, record

RESUMABLE = Path(__file__).parent / "data" / "resumable"  # half a run, by version 0.1.0


def resumable(storage: str) -> Recipe:
    """The recipe of the committed run: two cycles of four steps, of which one is done."""
    return Recipe(
        name="resumable",
        dataset=Digits(probe_per_class=2),
        objective=winnow(),
        storage=storage,
        network="wrn-10-1",
        schedule=Schedule(lr=0.05, first_cycle=4, cycles=2, t_mul=1.0),
        batch=100,
        probe_batch=20,
        group=25,
        workers=0,
        actors=1,
    )


def test_a_run_of_the_first_version_goes_on(tmp_path):
    shutil.copytree(RESUMABLE, tmp_path / "resumable")
    output = io.StringIO()
    result = launch.run(resumable(str(tmp_path)), Console(file=output, width=200))
    assert "4 of 8 steps are done" in output.getvalue()
    assert [row["step"] for row in result.history] == [4, 8]


def test_a_run_of_the_first_version_with_another_recipe_is_refused(tmp_path):
    shutil.copytree(RESUMABLE, tmp_path / "resumable")
    with pytest.raises(InputError, match=r"was made with another momentum: remove it or choose another --name"):
        launch.run(replace(resumable(str(tmp_path)), momentum=0.8))


MADE = Recipe(name="run", dataset=Cifar(), objective=Elr(), schedule=Schedule(m_mul=0.5))


def leaves(plain: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in plain.items():
        found += leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]
    return found


@pytest.mark.parametrize("path", [path for path in leaves(record(MADE, "0")) if path[0] != "schema"], ids=".".join)
def test_a_field_that_is_missing_means_its_default_and_another_value_another_run(path):
    wanted = record(MADE, "0")
    held = copy.deepcopy(wanted)
    inner = held
    for name in path[:-1]:
        inner = inner[name]
    value = inner.pop(path[-1])
    has_no_default = path[-1] == "kind" and path[:-1] in (("dataset",), ("objective",))
    is_default = path not in (("name",), (DATA,), ("schedule", "m_mul")) and not has_no_default
    assert differences(MADE, wanted, held) == ([] if is_default else [".".join(path)])
    inner[path[-1]] = [value, "other"]
    assert differences(MADE, wanted, held) == [".".join(path)]


def test_a_nested_dataclass_that_is_missing_means_its_default():
    made = replace(MADE, schedule=Schedule())
    held = record(made, "0")
    del held["schedule"], held["dataset"]["noise"]
    assert differences(made, record(made, "0"), held) == []
    assert differences(MADE, record(MADE, "0"), held) == ["schedule.m_mul"]


@pytest.mark.parametrize(("path", "value"), recipe_file.RETIRED.items())
def test_a_retired_field_counts_where_it_changed_the_run(path, value):
    wanted, held = record(MADE, "0"), record(MADE, "0")
    room, name = path.split(".")
    held[room][name] = value
    assert differences(MADE, wanted, held) == []
    held[room][name] = 7
    assert differences(MADE, wanted, held) == [path]


def test_a_renamed_kind_is_the_same_objective():
    made = replace(MADE, objective=CleanNet())
    held = record(made, "0")
    held["objective"]["kind"] = "CleanNetWeights"
    assert differences(made, record(made, "0"), held) == []
    assert differences(MADE, record(MADE, "0"), held)[0] == "objective.kind"


def test_a_trial_of_the_first_version_goes_on_though_it_does_not_name_its_data_set():
    trial = replace(MADE, dataset=HeldOut(Digits(), 2))
    held = record(trial, "0")
    del held["dataset"]["source"]["kind"], held["schema"]
    assert differences(trial, record(trial, "0"), held) == []
    held["dataset"]["per_class"] = 3
    assert differences(trial, record(trial, "0"), held) == ["dataset.per_class"]


def test_the_size_of_photographs_that_is_left_open_now_is_what_it_was():
    now = replace(MADE, dataset=Sharded("custom"))
    held = record(replace(now, dataset=Sharded("custom", size=224)), "data")
    assert not differences(now, record(now, "data"), held)
    held = record(replace(now, dataset=Sharded("custom", size=96)), "data")
    assert differences(now, record(now, "data"), held) == ["dataset.size"]


def test_the_checksum_of_weights_is_kept_and_makes_no_other_run(tmp_path):
    recipe_file.write(str(tmp_path), MADE, "0", weights="ab12")
    assert recipe_file.read(str(tmp_path))[recipe_file.WEIGHTS] == "ab12"
    recipe_file.require_same(str(tmp_path), MADE, "0")


def test_what_is_free_to_change_is_no_part_of_it():
    assert not set(recipe_file.FREE_TO_CHANGE) & set(record(MADE, "0"))


def test_a_file_of_a_newer_version_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({**record(MADE, "0"), "schema": recipe_file.SCHEMA + 1}))
    with pytest.raises(InputError, match=r"was made by a newer version \(schema 2\): update winnow"):
        recipe_file.read(str(tmp_path))
