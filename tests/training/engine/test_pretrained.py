"""Weights from elsewhere: what fits is taken, what does not is named, and images come as they were trained with.

Shapes: B images, C channels, K classes.
"""

import io
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save
from timm.data import resolve_data_config

from pipeline.dataset import HeldOut, InputError
from pipeline.digits import Digits
from pipeline.index import Sharded
from training.engine import networks, pretrained
from training.objectives.baselines.supervised import Supervised
from training.recipe import Recipe

NETWORK = "resnet10t"  # its weights expect ImageNet's mean and deviation


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """Weights of a thousand classes."""
    torch.manual_seed(1)
    return timm.create_model(NETWORK).state_dict()


def pth(held: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested", "wrapped"])
def test_files_of_any_kind_hold_the_same(kind, trained, tmp_path):
    held = {
        "safetensors": save(trained),
        "pth": pth(trained),
        "nested": pth({"state_dict": trained, "epoch": 3}),
        "wrapped": pth({"model": {f"module.{name}": value for name, value in trained.items()}}),
    }[kind]
    path = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pth'}"
    path.write_bytes(held)
    found, sha256 = pretrained.read(str(path), NETWORK)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    assert len(sha256) == 64


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pth(Evil()), r"w.pth holds no weights that can be read safely \(UnpicklingError\): give safetensors"),
        (b"no weights", "holds no weights that can be read safely"),
        (pth([1, 2]), "w.pth holds no tensors by name: give the state dict of a network"),
        (pth({"epoch": 3}), "holds no tensors by name"),
    ],
)
def test_what_holds_no_weights_is_refused(data, message, tmp_path, capsys):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(InputError, match=message):
        pretrained.read(str(tmp_path / "w.pth"), NETWORK)
    assert not capsys.readouterr().out
    with pytest.raises(InputError, match=r"there are no weights at .*absent\.pth"):
        pretrained.read(str(tmp_path / "absent.pth"), NETWORK)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_but_the_last_layer_is_taken(channels, trained):
    network = networks.build(NETWORK, channels, 7, seed=0, own_input=True)
    tensors, new = pretrained.fitted(network, trained, 7)
    assert new == ["fc.bias", "fc.weight"]
    assert not any(tensors[name].any() for name in new)
    network.load_state_dict(tensors)
    torch.nn.init.normal_(network.fc.weight)
    other = timm.create_model(NETWORK, num_classes=0).eval()
    other.load_state_dict({name: value for name, value in trained.items() if not name.startswith("fc.")})
    grey_B1HW = torch.rand(2, 1, 32, 32)
    mean, std = (torch.tensor(resolve_data_config(model=other)[key])[:, None, None] for key in ("mean", "std"))
    network.eval()
    with torch.no_grad():
        if channels == 3:
            image_BCHW = torch.rand(2, 3, 32, 32)
            expected = other((image_BCHW - mean) / std)
            found = network.forward_features(_shown(network, image_BCHW)).mean((2, 3))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(network(2 * image_BCHW - 1), network.fc(expected), rtol=1e-4, atol=1e-4)
        else:
            assert network(2 * grey_B1HW - 1).shape == (2, 7)


def _shown(network, image_BCHW):
    """What the network makes of an image of 0…1 that comes to it as −1…1."""
    return (2 * image_BCHW - 1) * network.input_scale + network.input_shift


def test_the_last_layer_is_kept_where_the_classes_are_as_many(trained):
    network = networks.build(NETWORK, 3, 1000, seed=0, own_input=True)
    tensors, new = pretrained.fitted(network, trained, 1000)
    assert not new
    assert torch.equal(tensors["fc.weight"], trained["fc.weight"])


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet29", "densenet100", "vgg13", NETWORK])
def test_a_run_of_other_classes_gives_all_but_its_last_layer(name):
    old, network = networks.build(name, 3, 7, seed=1), networks.build(name, 3, 5, seed=2)
    tensors, new = pretrained.fitted(network, old.state_dict(), 5)
    assert {tensors[one].shape[0] for one in new} == {5}
    assert len(new) == 2
    for each, value in old.state_dict().items():
        assert each in new or torch.equal(tensors[each], value)
    same = networks.build(name, 3, 7, seed=3)  # as many classes, but others
    assert len(pretrained.fitted(same, old.state_dict(), 7, new_head=True)[1]) == 2
    assert not pretrained.fitted(same, old.state_dict(), 7)[1]


def test_position_embeddings_come_to_another_size():
    large = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    small = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)
    tensors, new = pretrained.fitted(small, large.state_dict(), 3)
    assert tensors["pos_embed"].shape == small.pos_embed.shape
    assert new == ["head.bias", "head.weight"]
    small.load_state_dict(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("layer1.0.conv1.weight"),
            "the weights lack layer1.0.conv1.weight: give those of this network",
        ),
        (lambda w: w.update(extra=torch.zeros(1)), "the weights have, unknown to the network, extra: give those"),
        (
            lambda w: w.update({"layer1.0.bn1.bias": torch.zeros(3)}),
            r"the weights have layer1.0.bn1.bias of \(3,\) where the network has \(64,\): give those of this network",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("layer")],
            r"the weights lack .*, .* and \d+ more",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message, trained):
    weights = dict(trained)
    change(weights)
    with pytest.raises(InputError, match=message):
        pretrained.fitted(networks.build(NETWORK, 3, 7, seed=0), weights, 7)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(InputError, match=r"timm's hub gives no weights of resnet10t here \(OSError\): check") as error:
        pretrained.read("pretrained", NETWORK)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18.a1_in1", {}, r"unknown network 'resnet18.a1_in1': did you mean resnet18.a1_in1k"),
        ("wrn-10-1", {"own_input": True}, "'wrn-10-1' has neither drop path nor pretrained weights"),
        ("resnet29", {"drop_path": 0.1}, "has neither drop path nor pretrained weights: choose one of timm's"),
        ("vgg11", {"drop_path": 0.1}, "network vgg11 has no drop path: leave drop_path out"),
    ],
)
def test_networks_that_cannot_be_so_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        networks.build(name, 3, 10, 0, **options)


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "resnet18.a1_in1k", "deit_tiny_patch16_224"]
)
def test_networks_are_built_for_the_size_of_the_images(name, size):
    with torch.device("meta"):
        network = networks.build(name, 3, 5, 0, size=size, drop_path=0.1).eval()
        assert network(torch.empty(2, 3, size, size)).shape == (2, 5)


def test_images_have_the_size_that_the_weights_were_trained_with_unless_it_is_set():
    run = Recipe("run", Sharded("custom"), Supervised(), network="resnet10t.c3_in1k", weights="w.pth")
    seen, said = pretrained.as_trained(run)
    assert seen.dataset == Sharded("custom", size=176, crop=0.875, interpolation="bicubic")
    assert seen.dataset.shape == (176, 176, 3)
    assert not said
    held_out = replace(run, dataset=HeldOut(run.dataset, 2))
    assert pretrained.as_trained(held_out)[0].dataset == HeldOut(seen.dataset, 2)
    chosen = replace(run, dataset=Sharded("custom", size=96, crop=1.0, interpolation="bilinear"))
    assert pretrained.as_trained(chosen)[0] == chosen
    assert pretrained.as_trained(replace(run, weights=""))[0] == replace(run, weights="")
    digits = replace(run, dataset=Digits())  # as large as they are
    assert pretrained.as_trained(digits)[0] == digits
    squashed = replace(run, network="convnext_tiny.fb_in22k_ft_in1k_384")
    assert "was tested on squashed images" in pretrained.as_trained(squashed)[1][0]
