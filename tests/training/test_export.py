"""ONNX files answer as the trained model does, after nothing but what their own metadata say."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from pipeline.cifar import Cifar
from pipeline.dataset import InputError
from pipeline.index import Sharded
from tests.training.test_launch import recipe
from training import export, launch
from training.engine import networks
from training.engine.schedule import Schedule
from training.export import Request
from training.objectives.baselines.supervised import Supervised
from training.recipe import publishable

NAMES = ("ant", "bee", "cat")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> launch.Result:
    made = recipe(
        tmp_path_factory.mktemp("run"), objective=Supervised(), precision="float32", network="wrn-10-1",
        evaluate_every=0, schedule=Schedule(lr=0.1, first_cycle=30, cycles=1),
    )  # fmt: skip
    return launch.run(made, quiet())


def untrained(path: Path, network: str, dataset) -> tuple[str, torch.nn.Module]:
    """A model file of random weights, batch statistics too, and its network."""
    made = recipe(path, network=network, dataset=dataset, precision="float32")
    model = networks.build(network, dataset.shape[-1], len(NAMES), seed=0).eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.uniform_(-0.1, 0.1)
    metadata = {"class_names": json.dumps(NAMES), "recipe": json.dumps(publishable(made))}
    save_file(model.state_dict(), path / "model.safetensors", metadata)
    return str(path), model


def test_the_file_and_its_metadata_suffice_to_answer_as_evaluation_did(trained, tmp_path):
    console = quiet()
    out = f"{tmp_path}/model.onnx"
    difference = export.export(Request(trained.folder, out), console)
    assert difference < 1e-5
    assert f"differ by {difference:.1e} of the largest at most" in console.file.getvalue()

    session = onnxruntime.InferenceSession(out)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["class_names"]) == [str(k) for k in range(10)]
    steps = json.loads(said["preprocessing"])
    assert (steps["height"], steps["width"], steps["resize_short_side"], steps["colour"]) == (8, 8, 8, "grey")
    test = trained.dataset.tests["test"]
    image_NCHW = test.image_N.transpose(0, 3, 1, 2).astype(np.float32) / steps["divide_by"] - steps["subtract"]
    answer_N = np.concatenate(
        [session.run(["logits"], {"image": part})[0].argmax(1) for part in np.array_split(image_NCHW, 7)]
    )
    assert (answer_N == test.label_N).mean() == trained.top1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "dataset"),
    [
        ("wrn-10-1:group", Cifar(size=16)),
        ("resnet29", Cifar()),
        ("resnet10t", Sharded("custom", size=64)),
        ("convnext_atto", Sharded("custom", size=64)),
    ],
)
def test_networks_of_every_kind_and_batches_of_any_size(network, dataset, tmp_path):
    folder, model = untrained(tmp_path, network, dataset)
    export.export(Request(folder, f"{tmp_path}/model.onnx"), quiet())
    onnx.checker.check_model(f"{tmp_path}/model.onnx")
    session = onnxruntime.InferenceSession(f"{tmp_path}/model.onnx")
    height, width, channels = dataset.shape
    for batch in (1, 5):
        image_BCHW = torch.rand(batch, channels, height, width) * 2 - 1
        (logits_BK,) = session.run(["logits"], {"image": image_BCHW.numpy()})
        with torch.no_grad():
            expected_BK = model(image_BCHW).numpy()
        assert expected_BK.std() > 1e-3
        np.testing.assert_allclose(logits_BK, expected_BK, atol=1e-5 * np.abs(expected_BK).max())


def test_what_photographs_need_before_the_network():
    said = export.preprocessing(Sharded("custom"))
    assert (said["resize_short_side"], said["height"], said["width"], said["colour"]) == (256, 224, 224, "RGB")
    assert export.preprocessing(Sharded("custom", size=112))["resize_short_side"] == 128
    said = export.preprocessing(Sharded("custom", size=112, crop=0.95, interpolation="bicubic"))
    assert (said["resize_short_side"], said["interpolation"]) == (117, "bicubic")  # ⌊112 / 0.95⌋


@pytest.mark.slow
def test_a_difference_above_the_tolerance_writes_nothing(tmp_path, monkeypatch):
    folder, _ = untrained(tmp_path, "wrn-10-1", Cifar(size=16))
    to_onnx = export._to_onnx

    def damaged(network, shape, metadata):
        model = onnx.load_from_string(to_onnx(network, shape, metadata))
        kernel = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        kernel.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(kernel), kernel.name))
        return model.SerializeToString()

    monkeypatch.setattr(export, "_to_onnx", damaged)
    with pytest.raises(InputError, match=r"differ by .* more than 1.0e-04: nothing was written; raise --tolerance"):
        export.export(Request(folder, f"{tmp_path}/model.onnx"), quiet())
    assert not (tmp_path / "model.onnx").exists()


def test_without_the_packages_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ModuleNotFoundError, match=r'onnxruntime is not installed: pip install -e "\.\[export\]"'):
        export.export(Request(str(tmp_path), f"{tmp_path}/model.onnx"), quiet())


def test_the_command_tells_mistakes_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main([str(tmp_path), "--out", f"{tmp_path}/model.onnx"])
    assert stopped.value.code.startswith(f"error: there is no {tmp_path}/model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        export.main([str(tmp_path), "--out", "model.onnx", "--tolerance", "0"])
    assert stopped.value.code == 2
    assert "tolerance is 0.0: it must be above 0" in capsys.readouterr().err
