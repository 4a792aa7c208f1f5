import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline.dataset import Examples, InputError
from pipeline.views import DigitsViews
from training import model_file, networks
from training.step import normalised

HEADER = {"class_names": '["a", "b", "c"]', "recipe": '{"network": "wrn-10-1"}'}


def write(folder, weights, header=HEADER) -> None:
    (folder / "model.safetensors").write_bytes(save(weights, header))


def examples(channels: int = 1) -> Examples:
    image_NHWC = np.random.default_rng(0).integers(0, 256, (200, 8, 8, channels), np.uint8)
    return Examples(np.arange(200), np.zeros(200, np.int64), image_NHWC)


def test_predictions_are_the_network_s_own(tmp_path):
    network = networks.build("wrn-10-1", 1, 3, seed=5).eval()
    write(tmp_path, network.state_dict())
    model = model_file.read(str(tmp_path))
    assert model.class_names == ("a", "b", "c")
    assert model.recipe["network"] == "wrn-10-1"
    probability_NK = model.probabilities(examples(), DigitsViews())
    with torch.no_grad():
        expected = network(normalised(torch.from_numpy(examples().image_N))).softmax(1)
    np.testing.assert_allclose(probability_NK, expected.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "has no model.safetensors: give the folder of a run that has finished"),
        (lambda file: file.write_bytes(file.read_bytes()[:500]), "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.write_bytes(save({"x": torch.zeros(1)})), "is damaged"),
        (lambda file: file.write_bytes(save({"x": torch.zeros(1)}, {**HEADER, "recipe": "{"})), "is damaged"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, damage, message):
    write(tmp_path, networks.build("wrn-10-1", 1, 3, seed=5).state_dict())
    damage(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        model_file.read(str(tmp_path))
    assert "\n" not in str(error.value)


def test_images_of_other_channels_and_other_classes_are_refused(tmp_path):
    write(tmp_path, networks.build("wrn-10-1", 1, 3, seed=5).state_dict())
    model = model_file.read(str(tmp_path))
    with pytest.raises(InputError, match=r"does not fit its recipe or these images \(size mismatch") as error:
        model.probabilities(examples(channels=3), DigitsViews())
    assert "\n" not in str(error.value)
    model.require(("a", "b", "c"), "here")
    with pytest.raises(
        InputError, match=r"knows 3 classes \(a, b, c, …\), but here has 4 classes \(a, b, c, …\): give"
    ):
        model.require(("a", "b", "c", "d"), "here")
