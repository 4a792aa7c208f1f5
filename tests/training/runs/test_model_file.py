import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline.dataset import InputError
from pipeline.digits import Digits
from training import digits
from training.engine import networks
from training.engine.batch import normalised
from training.recipe import Recipe, publishable
from training.runs import model_file

RECIPE: Recipe = replace(digits.recipe("supervised"), network="wrn-10-1")
HEADER = {"class_names": json.dumps([*"0123456789"]), "recipe": json.dumps(publishable(RECIPE))}


def write(folder, header=HEADER):
    network = networks.build("wrn-10-1", 1, 10, seed=5).eval()
    (folder / "model.safetensors").write_bytes(save(network.state_dict(), header))
    return network


def test_predictions_are_the_network_s_own(tmp_path):
    network = write(tmp_path)
    model = model_file.read(str(tmp_path))
    probe = Digits().load("", 0).probe
    with torch.no_grad():
        expected = network(normalised(torch.from_numpy(probe.image_N))).softmax(1)
    np.testing.assert_allclose(model.probabilities(probe), expected.numpy(), rtol=1e-5, atol=1e-7)
    assert (model.class_names, model.source) == (tuple("0123456789"), Digits())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "give the folder of a run that has finished"),
        (lambda file: file.write_bytes(file.read_bytes()[:500]), "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.write_bytes(save({"x": torch.zeros(1)})), "does not say its classes and recipe"),
        (lambda file: file.write_bytes(save({"x": torch.zeros(1)}, {**HEADER, "recipe": "{"})), "does not say"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        model_file.read(str(tmp_path))
    assert "\n" not in str(error.value)


def test_other_networks_and_other_classes_are_refused(tmp_path):
    other = {**publishable(RECIPE), "network": "wrn-10-2"}
    write(tmp_path, {**HEADER, "recipe": json.dumps(other)})
    model = model_file.read(str(tmp_path))
    with pytest.raises(InputError, match=r"does not fit its own recipe \(size mismatch") as error:
        model.network()
    assert "\n" not in str(error.value)
    model.require(tuple("0123456789"), "here")
    with pytest.raises(InputError, match="knows 10 classes and here has 2"):
        model.require(("a", "b"), "here")
    with pytest.raises(InputError, match=r"class 9 is .9. to .* and .x. in here"):
        model.require(tuple("012345678x"), "here")
