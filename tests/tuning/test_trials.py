"""A trial is a run as any other: it can be audited, predicted with and exported."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq
import pytest
from ray import tune
from rich.console import Console

from pipeline.dataset import HeldOut, InputError
from pipeline.digits import Digits
from training import clean, digits, export, predict
from training.audit import audit
from training.engine.schedule import Schedule
from training.recipe import Recipe
from tuning.sweep import Sweep
from tuning.trials import Trial


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def trained(local_ray, tmp_path_factory) -> tuple[Trial, dict[str, Any]]:
    """A trial of 20 steps, trained to its end, and the figures that it reported."""
    plain = replace(
        digits.recipe("winnow"),
        dataset=Digits(probe_per_class=6),
        storage=str(tmp_path_factory.mktemp("sweep")),
        network="wrn-10-1",
        schedule=Schedule(lr=0.1, first_cycle=20, cycles=1),
        workers=0,
        actors=1,
        evaluate_every=0,
    )
    made = tune.with_parameters(Trial, sweep=Sweep(plain, validation=2))(config={"schedule.lr": 0.05})
    figures = made.train()
    assert figures["finished"]
    return made, figures


@pytest.fixture(scope="module")
def recipe(trained) -> Recipe:
    return trained[0].recipe


@pytest.fixture(scope="module")
def folder(recipe) -> str:
    return f"{recipe.storage}/{recipe.name}"


def test_it_is_audited_without_its_validation_set(recipe, folder):
    assert recipe.dataset == HeldOut(Digits(probe_per_class=6), 2)
    found = audit.audit(audit.Options(folder), quiet())
    assert found.trusted_K.tolist() == [4] * 10  # of 6, 2 validate
    rows = pq.read_table(f"{folder}/audit/labels.parquet").to_pylist()
    train = recipe.dataset.load("", recipe.seed).train
    label_of = dict(zip(train.id_N.tolist(), train.label_N.tolist(), strict=True))
    assert rows
    assert all(label_of[row["id"]] == row["label"] for row in rows)


def test_it_is_exported_and_predicted_with(trained, recipe, folder, tmp_path):
    assert export.export(export.Request(folder, f"{tmp_path}/model.onnx"), quiet()) < 1e-4
    validation = recipe.dataset.load("", recipe.seed).tests["validation"]
    (tmp_path / "images").mkdir()
    for row, name in enumerate(validation.names(range(len(validation)))):
        Path(tmp_path, "images", f"{name}.png").write_bytes(cv2.imencode(".png", validation.image(row))[1].tobytes())
    predict.predict(predict.Request(folder, f"{tmp_path}/images", f"{tmp_path}/out"), quiet())
    rows = pq.read_table(f"{tmp_path}/out").to_pylist()
    right_of = {f"{id_}.png": label for id_, label in zip(validation.id_N, validation.label_N, strict=True)}
    right = sum(row["top_labels"][0] == right_of[row["key"]] for row in rows)
    assert len(rows) == len(validation) == 20
    assert right / 20 == pytest.approx(trained[1]["top1"])


def test_shards_are_asked_of_the_data_set_inside(folder, tmp_path):
    with pytest.raises(InputError, match="was trained on Digits, which has no shards to write anew"):
        clean.clean(clean.Request(folder, "shards", f"{tmp_path}/out"), quiet())
