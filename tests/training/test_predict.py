"""Predictions of a tiny run: the same answers as its evaluation, wherever the images lie, whatever is killed."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipeline import predictions, storage
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.index import Sharded
from pipeline.shards import Options, ingest
from pipeline.unlabelled import open_images, views_of
from tests.pipeline import layouts
from tests.training.test_launch import recipe, weights
from training import launch, predict
from training.engine import networks
from training.engine.batch import normalised
from training.engine.schedule import Schedule
from training.objectives.baselines.supervised import Supervised
from training.predict import Predictor, Request
from training.runs import model_file


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def png(image_HWC: np.ndarray) -> bytes:
    return cv2.imencode(".png", image_HWC)[1].tobytes()


def answers(out: str) -> dict[str, dict]:
    """All rows of a folder of predictions by key, each there once."""
    rows = pq.read_table(sorted(str(part) for part in Path(out).glob("part-*.parquet"))).to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


def run(folder: Path, **changes) -> launch.Result:
    changes = {"precision": "float32", "network": "wrn-10-1", "evaluate_every": 0, **changes}
    return launch.run(recipe(folder, objective=Supervised(), **changes), quiet())


@pytest.fixture(scope="module")
def trained(local_ray, tmp_path_factory) -> launch.Result:
    return run(tmp_path_factory.mktemp("run"), schedule=Schedule(lr=0.1, first_cycle=30, cycles=1))


@pytest.fixture(scope="module")
def digits(trained, tmp_path_factory) -> Path:
    """The run's own test set as PNG files, LABEL/ID.png."""
    folder = tmp_path_factory.mktemp("digits")
    test = trained.dataset.tests["test"]
    layouts.write(
        str(folder),
        {f"{test.label_N[row]}/{test.id_N[row]}.png": png(test.image(row)) for row in range(len(test))},
    )
    return folder


@pytest.fixture(scope="module")
def predicted(trained, digits, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("out"))
    predict.predict(Request(trained.folder, str(digits), out, top=3, all_probabilities=True), quiet())
    return out


def test_top1_is_that_of_the_run_s_evaluation_to_the_example(trained, predicted):
    told = answers(predicted)
    right = sum(int(key.split("/")[0]) == row["top_labels"][0] for key, row in told.items())
    assert len(told) == len(trained.dataset.tests["test"]) == 497
    assert trained.top1 == right / 497
    assert 0.2 < trained.top1 < 1  # neither chance nor all right: the comparison says something


def test_classes_and_probabilities_are_the_network_s(trained, predicted):
    model = networks.build("wrn-10-1", 1, 10, seed=1).eval()
    model.load_state_dict(weights(trained.folder))
    test = trained.dataset.tests["test"]
    with torch.no_grad():
        expected_NK = model(normalised(torch.from_numpy(test.image_N))).softmax(1).numpy()
    told = answers(predicted)
    rows = [told[f"{label}/{id_}.png"] for label, id_ in zip(test.label_N, test.id_N, strict=True)]
    probability_NK = np.array([row["pred_probs"] for row in rows])
    np.testing.assert_allclose(probability_NK, expected_NK, atol=1e-6)
    for row, each_K in zip(rows, probability_NK, strict=True):
        order = np.argsort(-each_K)[:3]
        assert row["top_labels"] == order.tolist()
        assert row["top_classes"] == [str(k) for k in order]
        assert row["top_probabilities"] == each_K[order].tolist()
        assert row["rejected"] is None


@pytest.mark.parametrize("changes", [{"precision": "bf16", "channels_last": True}, {"precision": "float64"}])
def test_other_precisions_answer_as_they_were_evaluated(changes, digits, local_ray, tmp_path):
    result = run(tmp_path, schedule=Schedule(lr=0.1, first_cycle=20, cycles=1), **changes)
    model = model_file.read(result.folder)
    images = open_images(str(digits), "", 256)
    rows = images.rows.append_column("place", pa.array(range(len(images.rows))))
    about = predictions.Predictions("", "", "", len(rows), model.class_names, 1, False)
    try:
        told = Predictor([ray.put(model)], about, "cpu")(views_of(rows, images.read, model.source))
    finally:
        torch.set_default_dtype(torch.float32)
    right = [
        int(key[0]) == labels[0]
        for key, labels in zip(told["key"].to_pylist(), told["top_labels"].to_pylist(), strict=True)
    ]
    assert result.top1 == np.mean(right)


def test_images_and_predictions_may_be_in_the_cloud(trained, digits, predicted, bucket):
    """A hundred of the images: in other batches than before, so that probabilities are equal but for rounding."""
    some = {str(path.relative_to(digits)): path.read_bytes() for path in sorted(digits.rglob("*.png"))[::5]}
    layouts.write(f"{bucket}/in", some)
    predict.predict(Request(trained.folder, f"{bucket}/in", f"{bucket}/out", top=3, all_probabilities=True), quiet())
    about = predictions.read(f"{bucket}/out")
    rows = predictions.read_rows(f"{bucket}/out", about, range(100), predictions.SCHEMA.names).to_pylist()
    expected = answers(predicted)
    assert sorted(row["key"] for row in rows) == sorted(some)
    for row in rows:
        local = expected[row["key"]]
        for name in ("top_probabilities", "pred_probs"):
            np.testing.assert_allclose(row.pop(name), local.pop(name), atol=1e-6)
        assert row == local


def test_images_that_cannot_be_used_are_listed(trained, tmp_path):
    image = png(np.full((9, 9, 3), 200, np.uint8))
    files = {"good.png": image, "web.png": b"<html>404</html>", "empty.jpg": b"", "cut.png": image[:60]}
    layouts.write(f"{tmp_path}/images", files)
    console = quiet()
    predict.predict(Request(trained.folder, f"{tmp_path}/images", f"{tmp_path}/out"), console)
    told = answers(f"{tmp_path}/out")
    assert {key: row["rejected"] for key, row in told.items()} == {
        "good.png": None, "web.png": "a web page, not an image", "empty.jpg": "empty", "cut.png": "truncated",
    }  # fmt: skip
    for key, row in told.items():
        answered = [row[name] is not None for name in ("top_labels", "top_classes", "top_probabilities")]
        assert answered == [key == "good.png"] * 3
        assert row["pred_probs"] is None  # not asked for
    assert len(told["good.png"]["top_labels"]) == predict.TOP
    assert "4 images, 4 predicted now, 3 of them unusable" in console.file.getvalue()


class Killed(BaseException):
    """Takes no notice of `except Exception`, as a signal does."""


def test_killed_and_started_again_nothing_is_twice_or_missing(trained, digits, predicted, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "PART_ROWS", 100)
    monkeypatch.setattr(predict, "TASK_ROWS", 30)
    wanted = Request(trained.folder, str(digits), f"{tmp_path}/out", top=3, all_probabilities=True)
    write, left = predictions.write_part, [3]

    def killed(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(predictions, "write_part", killed)
        with pytest.raises(Killed):
            predict.predict(wanted, quiet())
    (tmp_path / "out" / "part-00004-of-00005.parquet.0123.part").write_bytes(b"never named")
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    times = {part: part.stat().st_mtime_ns for part in parts}
    assert [part.name for part in parts] == [f"part-{n:05d}-of-00005.parquet" for n in range(3)]
    parts[1].unlink()  # one in the middle goes, too
    del times[parts[1]]
    console = quiet()
    predict.predict(wanted, console)
    assert "2 of 5 parts are done" in console.file.getvalue()
    assert {part: part.stat().st_mtime_ns for part in times} == times
    told, expected = answers(wanted.out), answers(predicted)
    assert told.keys() == expected.keys()
    for key, row in told.items():
        assert row["id"] == expected[key]["id"]
        np.testing.assert_allclose(row["pred_probs"], expected[key]["pred_probs"], atol=1e-6)
    again = quiet()
    predict.predict(wanted, again)
    assert "497 images, 0 predicted now" in again.file.getvalue()


def test_results_out_of_order_are_never_written(trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "TASK_ROWS", 200)
    monkeypatch.setattr(predict.job, "unwrapped", lambda blocks: reversed(list(blocks)))
    with pytest.raises(RuntimeError, match="the results of part 0 are out of order"):
        predict.predict(Request(trained.folder, str(digits), f"{tmp_path}/out"), quiet())
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_shards_are_answered_as_their_evaluation_was(local_ray, tmp_path):
    """Photographs of two shapes in two sets: resized and cut out by the test view; ids and keys are the shards' own."""
    files = {}
    for k, of_class in enumerate(layouts.photos(3, 30)):
        for number, image in enumerate(of_class):
            split = {0: "probe", 1: "train", 2: "train"}.get(number, "test")
            files[f"{split}/{k}/{number}.jpg"] = image
    layouts.write(f"{tmp_path}/raw", files)
    data = f"{tmp_path}/data"
    ingest(Custom(), f"{tmp_path}/raw", Options(data), quiet())
    changes = {
        "dataset": Sharded("custom", size=24),
        "data": data,
        "schedule": Schedule(lr=0.05, first_cycle=8, cycles=1),
    }
    result = run(tmp_path, batch=6, probe_batch=6, group=3, **changes)
    assert 0 < result.top1 < 1

    predict.predict(Request(result.folder, data, f"{tmp_path}/test", split="test"), quiet())
    told = answers(f"{tmp_path}/test")
    assert told.keys() == {key for key in files if key.startswith("test/")}
    assert result.top1 == np.mean([int(key.split("/")[1]) == row["top_labels"][0] for key, row in told.items()])

    # The same JPEGs in a folder are the same images, also by their ids.
    predict.predict(Request(result.folder, f"{tmp_path}/raw", f"{tmp_path}/raw-out"), quiet())
    everything = answers(f"{tmp_path}/raw-out")
    assert everything.keys() == files.keys()
    for key, row in told.items():
        assert (row["id"], row["top_labels"]) == (everything[key]["id"], everything[key]["top_labels"])
        np.testing.assert_allclose(row["top_probabilities"], everything[key]["top_probabilities"], atol=1e-6)

    with pytest.raises(InputError, match=r"has no val set, only .*: change --split"):
        predict.predict(Request(result.folder, data, f"{tmp_path}/val", split="val"), quiet())
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    index["class_names"][1] = "one"
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"class 1 is '1' to .*safetensors and 'one' in .*data: give a model and data"):
        predict.predict(Request(result.folder, data, f"{tmp_path}/other"), quiet())
    index["class_names"].append("three")
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"safetensors knows 3 classes and .*data has 4: give a model and data"):
        predict.predict(Request(result.folder, data, f"{tmp_path}/other"), quiet())


# ---- bad input -------------------------------------------------------------------------------------------------------


def rewritten(folder: str, target: Path, change: Callable[[dict], object]) -> str:
    """The model file of a run with another recipe in its metadata."""
    model = model_file.read(folder)
    said = dict(model.recipe)
    change(said)
    names = json.dumps(model.class_names)
    save_file(dict(model.weights), target, {"class_names": names, "recipe": json.dumps(said)})
    return str(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.update(network="wrm-28-10"), "unknown network 'wrm-28-10': did you mean wrn-28-10"),
        (lambda said: said.update(network="wrn-10-2"), "does not fit its own recipe .*size mismatch.*: train again"),
        (lambda said: said.update(dataset={"kind": "Mnist"}), "data set that is unknown here .*Mnist"),
        (lambda said: said["dataset"].update(colour=1), "data set that is unknown here .*colour"),
    ],
)
def test_a_model_that_cannot_be_rebuilt_is_refused(trained, digits, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(predict.job.compute, "join", lambda **_: pytest.fail("Ray was started"))
    model = rewritten(trained.folder, tmp_path / "model.safetensors", change)
    with pytest.raises(InputError, match=message) as refused:
        predict.predict(Request(model, str(digits), f"{tmp_path}/out"), quiet())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def without_metadata(folder: str, tmp_path: Path) -> str:
    save_file(load_file(f"{folder}/model.safetensors"), tmp_path / "bare.safetensors")
    return str(tmp_path / "bare.safetensors")


def cut_off(folder: str, tmp_path: Path) -> str:
    data = Path(folder, "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    return str(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (without_metadata, "bare.safetensors does not say its classes and recipe .*class_names"),
        (cut_off, "cut.safetensors is damaged"),
        (lambda folder, tmp_path: str(tmp_path), "there is no .*/model.safetensors: give the folder of a run"),
    ],
)
def test_a_file_that_is_no_model_is_refused(trained, digits, tmp_path, model, message):
    with pytest.raises(InputError, match=message):
        predict.predict(Request(model(trained.folder, tmp_path), str(digits), f"{tmp_path}/out"), quiet())


def test_images_that_are_not_there_are_refused(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("name,label\na,1\n")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "bare.parquet")
    for url, message in [
        ("empty", "no images in .*empty: give a folder"),
        ("nowhere", "no such folder or archive"),
        ("list.csv", r"has columns name, label: it needs uri or .* or url, or one of encoded images"),
        ("bare.parquet", r"has columns label: it needs uri or .* or url, or one of encoded images"),
    ]:
        with pytest.raises(InputError, match=message):
            predict.predict(Request(trained.folder, f"{tmp_path}/{url}", f"{tmp_path}/out"), quiet())


def test_other_requests_that_cannot_work_are_refused(trained, digits, predicted, tmp_path):
    wanted = Request(trained.folder, str(digits), f"{tmp_path}/out")
    for change, message in [
        ({"top": 11}, "top is 11 and the model knows 10 classes"),
        ({"split": "test"}, "holds no shards, so it has no test set: leave --split out"),
        ({"device": "gpu"}, "the cluster has no GPU"),
        ({"out": "/proc/nowhere"}, "cannot write to /proc/nowhere"),
    ]:
        with pytest.raises(InputError, match=message):
            predict.predict(replace(wanted, **change), quiet())
    for change, message in [({"batch": 0}, "batch is 0"), ({"top": -1}, "top is -1"), ({"actors": -1}, "actors is -1")]:
        with pytest.raises(ValueError, match=message):
            replace(wanted, **change)


def test_a_folder_of_other_predictions_is_refused(trained, digits, predicted, tmp_path):
    wanted = Request(trained.folder, str(digits), predicted, top=3, all_probabilities=True)
    other = rewritten(trained.folder, tmp_path / "model.safetensors", lambda said: said.update(seed=5))
    layouts.write(f"{tmp_path}/images", {"a.png": png(np.zeros((8, 8, 3), np.uint8))})
    for change, name in [
        ({"model": other}, "model"),
        ({"images": f"{tmp_path}/images"}, "data set"),
        ({"top": 2}, "top"),
        ({"all_probabilities": False}, "all probabilities"),
    ]:
        with pytest.raises(InputError, match=f"made with another {name}: choose another --out, or remove that folder"):
            predict.predict(replace(wanted, **change), quiet())
    storage.write(*storage.connect(f"{tmp_path}/out/{predictions.NAME}"), b'{"model": 3}')
    with pytest.raises(InputError, match=r"predictions.json is damaged"):
        predict.predict(replace(wanted, out=f"{tmp_path}/out"), quiet())


def test_the_command_tells_mistakes_in_one_line(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        predict.main([trained.folder, str(tmp_path), "--out", f"{tmp_path}/out"])
    assert stopped.value.code.startswith(f"error: no images in {tmp_path}")
    with pytest.raises(SystemExit) as stopped:
        predict.main([trained.folder, str(tmp_path), "--out", f"{tmp_path}/out", "--batch", "0"])
    assert stopped.value.code == 2
    assert "batch is 0: it must be 1 or more" in capsys.readouterr().err
