"""A run and its audit, from raw files to labels.parquet, the page and the trusted list that comes of it."""

import csv
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import safe_open, save

from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.index import Sharded
from pipeline.layout import stable_ids
from pipeline.shards import Options as Ingest
from pipeline.shards import ingest
from tests.pipeline import layouts
from tests.training.audit.test_evidence import by_pandas
from training import launch
from training.audit import audit
from training.audit.audit import Options, whole_parts
from training.audit.evidence import settled
from training.engine.schedule import Schedule
from training.objectives.ieg import winnow
from training.recipe import Recipe
from training.runs import ledger
from training.runs.finished import Run

CLASSES = ("ant", "bee", "cat, big")
TORN = ("train/ant/copy.jpg", "train/bee/0.jpg")  # the same bytes


def console() -> Console:
    return Console(file=io.StringIO(), width=300)


def recipe(root: Path, **changes) -> Recipe:
    """18 steps in three cycles, nearly three visits of each of the 37 images."""
    made = Recipe(
        name="run", dataset=Sharded("custom", size=24), objective=winnow(), data=f"{root}/shards",
        storage=f"{root}/runs", network="wrn-10-1", schedule=Schedule(first_cycle=6, cycles=3, t_mul=1.0), batch=6,
        probe_batch=6, group=3, workers=0, actors=1,
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture(scope="module")
def root(local_ray, tmp_path_factory) -> Path:
    """Raw files, their shards, a run on them, and its audit."""
    root = tmp_path_factory.mktemp("audit")
    files = {}
    for name, of_class in zip(CLASSES, layouts.photos(3, 16), strict=True):
        for number, image in enumerate(of_class):
            split = "probe" if number >= 14 else "test" if number >= 12 else "train"
            files[f"{split}/{name}/{number}.jpg"] = image
    files[TORN[0]] = files[TORN[1]]
    layouts.write(f"{root}/raw", files)
    ingest(Custom(), f"{root}/raw", Ingest(f"{root}/shards"), console())
    result = launch.run(recipe(root), console())
    told = console()
    audit.audit(Options(result.folder, f"{root}/shards", suggest=4), told)
    (root / "told").write_text(told.file.getvalue())
    return root


def copy(root: Path, to: Path) -> Path:
    return Path(shutil.copytree(root / "runs" / "run", to / "run"))


def refused(folder: Path, data: str, message: str, **options: int) -> None:
    with pytest.raises(InputError, match=message) as error:
        audit.audit(Options(str(folder), data, **options), console())
    assert "\n" not in str(error.value)


def test_labels_agree_with_the_ledger_in_pandas(root):
    rows = ledger.read(f"{root}/runs/run")
    weight = settled(rows["step"].to_numpy(), recipe(root).schedule).astype(np.float32)
    made = pq.read_table(root / "runs" / "run" / audit.LABELS)
    expected = by_pandas(rows.append_column("settled", pa.array(weight)), len(CLASSES))
    pd.testing.assert_frame_equal(made.to_pandas(), expected, check_dtype=False, rtol=1e-5)
    names = [f"train/{name}/{number}.jpg" for name in CLASSES for number in range(12)] + [TORN[0]]
    assert sorted(made["id"].to_pylist()) == sorted(stable_ids("custom", names).tolist())


def test_cycles_choose_the_visits(root, tmp_path):
    folder = copy(root, tmp_path)
    audit.audit(Options(str(folder), f"{root}/shards", cycles=1), console())
    rows = ledger.read(str(folder))
    rows = rows.filter(pa.array(rows["step"].to_numpy() >= 12))
    weight = settled(rows["step"].to_numpy(), recipe(root).schedule).astype(np.float32)
    expected = by_pandas(rows.append_column("settled", pa.array(weight)), len(CLASSES))
    made = pq.read_table(folder / audit.LABELS).to_pandas()
    pd.testing.assert_frame_equal(made, expected, check_dtype=False, rtol=1e-5)
    assert "the last 1 of 3 cycles" in (folder / audit.PAGE).read_text()
    refused(folder, f"{root}/shards", "has 3 cycles, not 4: lower --cycles", cycles=4)


@pytest.mark.parametrize(
    ("images", "cycles", "expected"), [(10, 0, 12), (12, 0, 12), (13, 0, 6), (99, 0, 0), (1, 3, 0)]
)
def test_as_few_cycles_as_hold_three_visits(root, images, cycles, expected):
    run = Run.open(f"{root}/runs/run")
    assert audit.window(run, cycles, images) == range(expected, 18)


def test_the_page_tells_of_run_and_images(root):
    text = (root / "runs" / "run" / audit.PAGE).read_text()
    plain = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "Label audit of run" in plain
    assert "37 images of 3 classes, 6 trusted; wrn-10-1; read from steps 0 to 18, the last 3 of 3 cycles" in plain
    assert "1 Stored under several labels" in plain
    assert "ant / bee" in plain
    assert text.count("data:image/jpeg") >= 20
    assert "37 images," in (root / "told").read_text()


def test_suggestions_become_trusted_images_of_a_run_that_goes_on(root, tmp_path):
    """suggest.csv is filled in by a person, in part; ingest takes it; a new run starts from the weights of the old."""
    with open(root / "runs" / "run" / audit.SUGGESTIONS, newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4
    assert list(lines[0]) == ["uri", "label", "given", "proposed", "quality", "id"]
    for line in lines:
        assert line["uri"].split("/")[1] == line["given"]
        assert stable_ids("custom", [line["uri"]])[0] == int(line["id"])
        assert line["label"] == ""
    for line in lines[:3]:
        line["label"] = "cat, big"
    with open(tmp_path / "suggest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)

    index = ingest(Custom(f"{tmp_path}/suggest.csv"), f"{root}/raw", Ingest(f"{tmp_path}/shards"), console())
    probe = index.of(f"{tmp_path}/shards", "probe").take(np.arange(9))
    label = dict(zip(probe.id_N.tolist(), probe.label_N.tolist(), strict=True))
    assert [label.get(int(line["id"])) for line in lines] == [2, 2, 2, None]

    old = f"{root}/runs/run"
    schedule = Schedule(lr=1e-9, first_cycle=1, cycles=1)
    settings = {"data": f"{tmp_path}/shards", "storage": str(tmp_path), "schedule": schedule, "name": "next"}
    result = launch.run(recipe(root, start_from=old, **settings), console())
    with (
        safe_open(f"{old}/model.safetensors", "pt") as before,
        safe_open(f"{result.folder}/model.safetensors", "pt") as after,
    ):
        weights = [name for name in before.keys() if "running" not in name and "num" not in name]  # noqa: SIM118
        for name in weights:
            torch.testing.assert_close(after.get_tensor(name), before.get_tensor(name), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "next" / "recipe.json").read_text())["start_from"] == old

    for changes, message in (
        ({"start_from": old, "network": "wrn-16-1"}, r"run has trained wrn-10-1, not wrn-16-1: set --network to that"),
        ({"start_from": str(tmp_path)}, "there is no .*model.safetensors: give the folder of a run that has finished"),
    ):
        with pytest.raises(InputError, match=message):
            launch.run(recipe(root, **{**settings, "name": "other", **changes}), console())


def test_a_run_in_the_cloud(root, bucket):
    fs, path = fsspec.core.url_to_fs(bucket)
    fs.put(f"{root}/runs/run", f"{path}/run", recursive=True)
    audit.audit(Options(f"{bucket}/run", f"{root}/shards", suggest=2), console())
    with fs.open(f"{path}/run/{audit.LABELS}") as file:
        made = pq.read_table(file)
    assert made.equals(pq.read_table(root / "runs" / "run" / audit.LABELS))
    assert fs.cat_file(f"{path}/run/{audit.PAGE}") == (root / "runs" / "run" / audit.PAGE).read_bytes()
    assert fs.cat_file(f"{path}/run/{audit.SUGGESTIONS}").count(b"\n") == 3


# ---- bad input -------------------------------------------------------------------------------------------------------


def without(name: str):
    return lambda folder: (folder / name).unlink()


def no_ledger(folder: Path) -> None:
    shutil.rmtree(folder / "ledger")


def other_classes(folder: Path) -> None:
    header = {"class_names": '["ant", "bee"]', "recipe": '{"network": "wrn-10-1"}'}
    (folder / "model.safetensors").write_bytes(save({"x": torch.zeros(1)}, header))


def other_ids(folder: Path) -> None:
    for part in ledger.parts(str(folder)):
        rows = pq.read_table(part.path)
        pq.write_table(rows.set_column(0, "step", rows["step"]).set_column(
            rows.schema.get_field_index("id"), "id", pa.array(rows["id"].to_numpy() // 2)), part.path)  # fmt: skip


def middle(change):
    """Do `change` to the ledger's middle part."""

    def act(folder: Path) -> None:
        parts = ledger.parts(str(folder))
        change(Path(parts[len(parts) // 2].path))

    return act


def again(part: Path) -> None:
    shutil.copy(part, part.with_name(part.name.replace("rank-0000", "rank-0001")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("recipe.json"), "run has no recipe.json: give the folder of a run"),
        (lambda folder: (folder / "recipe.json").write_text("{"), "recipe.json is damaged: copy the run again"),
        (without("model.safetensors"), "there is no .*model.safetensors: give the folder of a run that has finished"),
        (no_ledger, "run holds no ledger: copy it with the run, or train again"),
        (middle(Path.unlink), "holds 0 of 6 rows of step 6: parts of it are missing"),
        (middle(again), "holds 12 of 6 rows of step 6: parts of it are missing, or of another run"),
        (middle(lambda part: part.write_bytes(b"half a file")), "ledger part .*steps-.* is damaged .*: copy it again"),
        (other_classes, r"knows 2 classes and .*shards has 3: give a model and data of the same classes"),
        (other_ids, r"the evidence of .*run has id \d+, which .*shards has not: it is of other images"),
    ],
)
def test_a_run_that_cannot_be_audited_is_one_line(root, tmp_path, damage, message):
    folder = copy(root, tmp_path)
    damage(folder)
    refused(folder, f"{root}/shards", message)


def test_other_data_are_refused(root, tmp_path):
    folder = copy(root, tmp_path)
    refused(folder, "", "no shards given: --data")
    refused(folder, f"{root}/raw", "no index.json in .*raw: make shards first")
    recipe_file = folder / "recipe.json"
    said = json.loads(recipe_file.read_text())
    recipe_file.write_text(json.dumps({**said, "checksum of the data": "another"}))
    refused(folder, f"{root}/shards", "shards is not what .*run was trained on: give that --data")


def test_a_part_that_straddles_the_first_step_counts_by_step(root, tmp_path):
    """A run without evaluations between writes parts that begin before the cycle that is read."""
    folder = copy(root, tmp_path)
    first, second = ledger.parts(str(folder))[:2]
    joined = pa.concat_tables([pq.read_table(part.path) for part in (first, second)])
    pq.write_table(joined, f"{folder}/ledger/steps-00000000-{second.last:08d}-rank-0000.parquet")
    for part in (first, second):
        Path(part.path).unlink()
    run = Run.open(str(folder))
    parts = whole_parts(run, range(6, 18))
    assert sum(count for _, count in parts) == 18 * 6
    rows = pa.concat_tables(list(audit.reduced(run, range(6, 18), parts)))
    assert sum(rows["visits"].to_pylist()) == 12 * 6


def test_the_command_line(root, tmp_path, monkeypatch, capsys):
    for arguments, status in (
        ([str(tmp_path)], f"error: {tmp_path} has no recipe.json: give the folder of a run"),
        ([str(tmp_path), "--cycles", "-1"], 2),
        ([str(tmp_path), "--suggests", "3"], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["audit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            audit.main()
        assert stopped.value.code == status
        said = capsys.readouterr().err
        if "-1" in arguments:
            assert "cycles is -1: it must be 0 or more" in said
        if "--suggests" in arguments:
            assert "--suggest" in said
