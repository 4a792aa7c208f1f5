"""From shards to features by a real network of timm, killed and started again, and to heads that are trained on them.

Shapes: N images, V random views, D numbers of an embedding.
"""

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from onnxruntime import InferenceSession
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipeline import job
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.features import Made
from pipeline.images import decode
from pipeline.index import FEATURES, Index, Sharded, read_index
from pipeline.shards import Options, ingest
from tests.pipeline import layouts
from tests.pipeline.test_features import write
from training import embed as command
from training.audit import audit
from training.clean import Request as Clean
from training.clean import clean
from training.embed import Embedder, Request, embed
from training.engine.batch import normalised
from training.engine.schedule import Schedule
from training.engine.worker import Worker
from training.export import Request as Export
from training.export import export
from training.launch import Result, run
from training.objectives.registry import METHODS
from training.predict import Request as Predict
from training.predict import predict
from training.recipe import Recipe, looking_ahead
from training.runs import ledger
from training.runs.model_file import read

NETWORK = "test_resnet"  # timm's own, for tests


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Weights of the network, as if they had been trained, in a file."""
    torch.manual_seed(1)
    path = str(tmp_path_factory.mktemp("weights") / "net.safetensors")
    save_file({n: v.contiguous() for n, v in timm.create_model(NETWORK).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def shards(local_ray, tmp_path_factory) -> str:
    """Three classes of photographs: eight noisy, two trusted and two test images each."""
    folder = tmp_path_factory.mktemp("shards")
    files = {}
    for k, of_class in enumerate(layouts.photos(3, 12, 48)):
        for number, image in enumerate(of_class):
            split = "probe" if number < 2 else "test" if number < 4 else "train"
            files[f"{split}/{k}/{number}.jpg"] = image
    layouts.write(str(folder / "raw"), files)
    ingest(Custom(), str(folder / "raw"), Options(str(folder / "shards")), quiet())
    return str(folder / "shards")


def request(shards: str, weights: str, out: Path, **changes) -> Request:
    return replace(Request(shards, NETWORK, weights, str(out), views=2, size=32, batch=9, actors=1), **changes)


@pytest.fixture(scope="module")
def embedded(shards, weights, tmp_path_factory) -> str:
    """Features, by a command that was killed after its first file, and started again."""
    out, put, made = tmp_path_factory.mktemp("features"), job.put, []

    def killed(where, record, write_shard):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(record["name"])
        return put(where, record, write_shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(request(shards, weights, out), quiet())
        assert not (out / "index.json").exists()
        made.append("the next start")
        console = quiet()
        embed(request(shards, weights, out), console)
    assert "1 of 3 shards are done" in console.file.getvalue()
    assert len(made) == len(set(made)) == 4
    return str(out)


def rows_of(url: str, index: Index) -> list[dict]:
    return [row for shard in index.shards for row in pq.read_table(f"{url}/{shard.name}").to_pylist()]


def test_features_are_what_the_network_makes_of_the_stored_images(shards, embedded, weights):
    index, of_images = read_index(embedded), read_index(shards)
    how = Made(**index.options[FEATURES])
    assert (how.network, how.size, how.looks, how.width) == (NETWORK, 32, 2, 96)
    assert (index.class_names, index.dataset) == (of_images.class_names, "custom")
    assert [(shard.name, shard.split, shard.rows, shard.per_class) for shard in index.shards] == [
        (shard.name, shard.split, shard.rows, shard.per_class) for shard in of_images.shards
    ]
    made, stored = rows_of(embedded, index), rows_of(shards, of_images)
    network = timm.create_model(NETWORK, num_classes=0).eval()
    network.load_state_dict({n: v for n, v in load_file(weights).items() if not n.startswith("fc.")})
    mean, std = (torch.tensor(network.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    for ours, image in zip(made, stored, strict=True):
        assert {name: ours[name] for name in ("id", "key", "label", "split", "trusted")} == {
            name: image[name] for name in ("id", "key", "label", "split", "trusted")
        }
        view = how.views.test(decode(image["image"]))
        pixels = (torch.from_numpy(view.copy()).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            expected = network(pixels[None])[0].numpy()
        np.testing.assert_allclose(np.array(ours["embedding"], np.float32), expected, rtol=2e-3, atol=2e-3)
        assert ours["look_1"] != ours["look_2"] != ours["embedding"]


def test_what_is_whole_is_not_made_again(shards, embedded, weights):
    assert not Path(embedded, job.WORK).exists()
    console = quiet()
    embed(request(shards, weights, Path(embedded)), console)
    assert "is whole already: 6 probe, 6 test, 24 train; 96 numbers" in console.file.getvalue()
    with pytest.raises(InputError, match="holds shards of other data or options"):
        embed(request(shards, weights, Path(embedded), views=1), quiet())


def test_a_folder_without_labels_is_embedded_too(weights, tmp_path, local_ray):
    files = {f"{number}.jpg": image for number, (image,) in enumerate(layouts.photos(4, 1, 40))}
    layouts.write(str(tmp_path / "in"), {**files, "broken.jpg": b"no image"})
    index = embed(request(str(tmp_path / "in"), weights, tmp_path / "out", views=0), quiet())
    assert (index.rejected, index.class_names, [shard.rows for shard in index.shards]) == (1, (), [4])
    assert {row["label"] for row in rows_of(str(tmp_path / "out"), index)} == {-1}
    (rejected,) = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert rejected["key"] == "broken.jpg"
    with pytest.raises(InputError, match="has no train set, only all"):
        run(recipe(str(tmp_path / "out"), tmp_path), quiet())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": "resnet5000"}, "timm knows no network 'resnet5000'"),
        ({"weights": "nowhere.safetensors"}, "there are no weights at nowhere.safetensors"),
        ({"network": "test_vit"}, "the weights lack"),
        ({"images": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_the_work_starts(
    changes, said, shards, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "network_actors", None)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        embed(replace(request(shards, weights, tmp_path), **changes), quiet())
    assert "\n" not in str(caught.value)


def test_numbers_beyond_float16_are_refused():
    class Loud(torch.nn.Module):
        def forward(self, x):
            return 1e6 * x.flatten(1)[:, :4]

    loud = object.__new__(Embedder)
    loud.network, loud.device = Loud(), "cpu"
    loud.how = Made("loud", "", 8, 1.0, "bilinear", 4, 0, 0)
    with pytest.raises(InputError, match="loud gives numbers that float16 cannot hold"):
        loud({"image": np.zeros((2, 1, 8, 8, 3), np.uint8)})
    assert normalised(torch.zeros(1, 2, 2, 3, dtype=torch.uint8)).max() == -1


# ---- heads -----------------------------------------------------------------------------------------------------------


def recipe(data: str, folder: Path, **changes) -> Recipe:
    """Forty steps on features, in this process."""
    made = Recipe(
        name="run",
        dataset=Sharded("custom"),
        objective=looking_ahead(METHODS["winnow"](), 0.05),
        data=data,
        storage=str(folder),
        network="linear",
        schedule=Schedule(lr=0.05, first_cycle=40, cycles=1),
        batch=40,
        probe_batch=12,
        group=10,
        workers=0,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("gaussians"))
    write(folder)
    return folder


@pytest.fixture(scope="module")
def here(features, tmp_path_factory) -> Result:
    return run(recipe(features, tmp_path_factory.mktemp("here"), precision="float64"), quiet())


@pytest.mark.slow
def test_a_head_trains_in_this_process_without_ray(features, tmp_path):
    program = (
        "import io, pathlib, sys, ray; from rich.console import Console; from training.launch import run\n"
        "from tests.training.test_embed import recipe\n"
        f"top1 = run(recipe({features!r}, pathlib.Path({str(tmp_path)!r}))).top1\n"
        "assert not ray.is_initialized()\nprint(top1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0.9
    assert "features of test_resnet, 6 numbers, 2 random views" in done.stdout


def test_ray_s_workers_train_the_same_head(features, here, tmp_path, local_ray):
    result = run(recipe(features, tmp_path, workers=2, precision="float64"), quiet())
    assert result.top1 == here.top1 > 0.9
    ours, theirs = (
        ledger.read(each.folder).sort_by([("step", "ascending"), ("id", "ascending")]) for each in (result, here)
    )
    for name in ("step", "epoch", "id", "label", "pseudo_label", "trust"):
        assert ours[name].equals(theirs[name])
    np.testing.assert_allclose(ours["weight"].to_numpy(), theirs["weight"].to_numpy(), atol=1e-5)
    for name, value in read(result.folder).weights.items():
        np.testing.assert_allclose(value, read(here.folder).weights[name], atol=1e-10)


def test_every_row_is_seen_once_an_epoch(here):
    seen = ledger.read(here.folder)
    first = seen["id"].to_numpy()[seen["epoch"].to_numpy() == 0]
    assert len(first) == len(set(first.tolist())) == len(here.dataset.train)


def test_a_stopped_head_goes_on_to_the_bit(features, here, tmp_path, monkeypatch):
    made = recipe(features, tmp_path, precision="float64", checkpoint_steps=15)
    step, calls = Worker.step, []

    def stopped(self, number, held):
        if number == 22 and not calls:
            calls.append(number)
            raise KeyboardInterrupt
        return step(self, number, held)

    monkeypatch.setattr(Worker, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(made, quiet())
    console = quiet()
    result = run(made, console)
    assert "15 of 40 steps are done" in console.file.getvalue()
    for name, value in read(result.folder).weights.items():
        assert torch.equal(value, read(here.folder).weights[name])
    assert ledger.read(result.folder).num_rows == 40 * 40


@pytest.mark.parametrize("network", ["linear", "mlp-16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_features(method, network, features, tmp_path):
    made = recipe(features, tmp_path, network=network, objective=looking_ahead(METHODS[method](), 0.05))
    made = replace(made, schedule=Schedule(lr=0.05, first_cycle=3, cycles=1))
    result = run(made, quiet())
    assert np.isfinite(result.history[-1]["loss"])
    assert ledger.read(result.folder).num_rows == 3 * 40


def test_images_and_features_are_not_taken_for_each_other(features, shards, tmp_path):
    with pytest.raises(
        InputError, match="holds features, not images: give shards, or train with --network linear or mlp-UNITS"
    ):
        run(recipe(features, tmp_path, network="resnet18"), quiet())
    with pytest.raises(InputError, match="holds images, not features"):
        run(recipe(shards, tmp_path), quiet())


def test_a_head_is_audited_and_exported_and_sees_no_images(features, here, shards, local_ray, tmp_path):
    audit.audit(audit.Options(here.folder, features), quiet())
    assert "<img" not in Path(here.folder, audit.PAGE).read_text()
    single = run(recipe(features, tmp_path), quiet())
    assert export(Export(single.folder, str(tmp_path / "head.onnx")), quiet()) < 1e-5
    probe = single.dataset.probe
    session = InferenceSession(tmp_path / "head.onnx", providers=["CPUExecutionProvider"])
    stored_NDHW = probe.image_N[:, :, :1].astype(np.float32).transpose(0, 3, 1, 2)  # as they are in the file
    (logits_NK,) = session.run(["logits"], {"image": np.ascontiguousarray(stored_NDHW)})
    expected_NK = read(single.folder).probabilities(probe)
    np.testing.assert_allclose(torch.from_numpy(logits_NK).softmax(1).numpy(), expected_NK, atol=1e-5)
    with pytest.raises(InputError, match="is a head on features and cannot see images"):
        predict(Predict(single.folder, shards, str(tmp_path / "out")), quiet())


def test_an_audit_of_features_corrects_the_labels_of_their_shards(embedded, shards, tmp_path):
    audit.audit(audit.Options(features=embedded, data=shards, folds=2), quiet())
    assert "<img" in Path(embedded, audit.PAGE).read_text()
    index = clean(Clean(embedded, shards, str(tmp_path)), quiet())
    assert [shard.rows for shard in index.shards] == [shard.rows for shard in read_index(shards).shards]
    with pytest.raises(InputError, match="holds features, not images"):
        clean(Clean(embedded, embedded, str(tmp_path / "other")), quiet())


def test_the_command_line_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    told = capsys.readouterr().out
    assert "python -m pipeline.embed gs://bucket/shards --network resnet50.a1_in1k" in told
