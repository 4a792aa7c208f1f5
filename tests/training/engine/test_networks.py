import pytest
import torch
from torch.func import functional_call, jvp

from training.engine import networks

FAMILIES = [
    "wrn-10-1",
    "wrn-10-1:group",
    "resnet29",
    "resnet29:group",
    "resnet29-preact",
    "resnet18",
    "densenet100",
    "vgg13",
]


def parameters(model) -> int:
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn-28-10", 36_479_194),  # Zagoruyko & Komodakis 2016: 36.5 M
        ("wrn-28-2", 1_467_610),  # 1.5 M
        ("wrn-10-1", 77_850),
        ("wrn-10-1:group", 77_850),
        ("densenet100", 769_162),  # Huang et al. 2017, table 2: 0.8 M
        ("vgg13", 9_416_010),  # ten 3×3 convolutions with batch norm, and 512 × 10 + 10
    ],
)
def test_parameter_counts(name, expected):
    with torch.device("meta"):
        assert parameters(networks.build(name, 3, 10, 0)) == expected


@pytest.mark.parametrize("name", ["resnet29", "resnet29-preact", "resnet29:group"])
def test_resnet29_has_0_84_million_parameters(name):
    with torch.device("meta"):
        assert round(parameters(networks.build(name, 3, 10, 0)) / 1e6, 2) == 0.84


def test_resnet29_variants_differ_in_the_first_activation_only():
    authors, standard = (networks.build(name, 3, 10, 0).eval() for name in ("resnet29", "resnet29-preact"))
    assert authors.state_dict().keys() == standard.state_dict().keys()
    block = authors.blocks[1]
    seen = {}
    for name, model in (("authors", authors), ("standard", standard)):
        hook = model.blocks[1].conv1.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        hook.remove()
    assert seen["authors"].min() < 0
    assert torch.equal(seen["standard"], seen["authors"].relu())
    assert not block.first_activation
    # the first block's input is normalised and activated already, in both
    assert not standard.blocks[0].first_activation
    assert isinstance(standard.blocks[0].norm1, torch.nn.Identity)


@pytest.mark.parametrize("name", ["wrn-10-2", "wrn-16-1:group", "resnet29", "resnet29-preact:group"])
@pytest.mark.parametrize("size", [32, 16, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(name, size, channels):
    with torch.device("meta"):
        model = networks.build(name, channels, 7, 0)
        features = []
        model.blocks.register_forward_hook(lambda *args: features.append(args[-1]))
        assert model(torch.empty(2, channels, size, size)).shape == (2, 7)
    assert features[0].shape[2:] == (size // 4, size // 4)  # stages 2 and 3 halve


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seed_alone_decides_the_weights(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = networks.build(name, 3, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = networks.build(name, 3, 5, seed=4), networks.build(name, 3, 5, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    kernels = [(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True) if a.dim() > 1]
    assert kernels
    assert not any(torch.equal(a, b) for a, b in kernels)


def test_kernels_start_at_he_s_scale():
    model = networks.build("wrn-10-4", 3, 10, seed=0)
    conv = model.blocks[2].conv2  # 256 → 256, 3×3
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", ["wrn-10-1:group", "resnet29:group", "resnet29-preact:group"])
def test_group_variant_keeps_no_batch_statistics(name):
    model = networks.build(name, 3, 5, seed=0)
    assert not list(model.buffers())
    image_BCHW = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(image_BCHW)[:1], model(image_BCHW[:1]))  # an answer of its own for each image


@pytest.mark.parametrize(("name", "size", "halved"), [("densenet100", 32, 8), ("densenet100", 16, 4), ("vgg13", 32, 1)])
def test_networks_of_torchvision_take_small_images(name, size, halved):
    model = networks.build(name, 1, 7, seed=0)
    features = []
    (model.features if name == "densenet100" else model[0]).register_forward_hook(
        lambda *args: features.append(args[-1])
    )
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)
    assert features[0].shape[2:] == (halved, halved)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet92", "resnet"),
        ("resnet_18", "resnet18"),
        ("zzzzzzzzzzzz", "wrn-DEPTH-WIDTH"),
        ("wrn-28_10", "wrn-28-10"),
        ("wrn-11-1", "depth must be 10, 16"),
        ("wrn-4-1", "depth must be 10, 16"),
        ("wrn-10-0", "width at least 1"),
        ("wrn-10-1:batch", "can only be 'group'"),
        ("resnet18:group", "goes with wrn-DEPTH-WIDTH and resnet29 only"),
    ],
)
def test_unknown_names_are_errors_that_help(name, hint):
    with pytest.raises(ValueError, match=hint):
        networks.build(name, 3, 10, 0)


def test_timm_models_take_channels_and_classes():
    model = networks.build("resnet18", 1, 7, seed=0)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_layers_without_forward_mode_are_named():
    networks.require_forward_mode("wrn-10-1", networks.build("wrn-10-1", 3, 7, seed=0))
    with pytest.raises(ValueError, match="no forward mode for GRU and LSTM, of which mine is made"):
        networks.require_forward_mode("mine", torch.nn.Sequential(torch.nn.LSTM(2, 2), torch.nn.GRU(2, 2)))


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_mode_through_training_mode_matches_finite_differences(name):
    rng = torch.Generator().manual_seed(0)
    size = 32 if name in ("resnet18", "vgg13") else 8
    model = networks.build(name, 3, 5, seed=0).double().train()
    image_BCHW = torch.randn(4, 3, size, size, generator=rng, dtype=torch.float64)
    theta = {key: value.detach() for key, value in model.named_parameters()}
    tangent = {key: torch.randn(value.shape, generator=rng, dtype=torch.float64) for key, value in theta.items()}
    tangent = {key: value * theta[key].norm() / value.norm() for key, value in tangent.items()}

    def logits(values):
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        return functional_call(model, {**values, **buffers}, (image_BCHW,))

    def moved(step):
        return logits({key: value + step * tangent[key] for key, value in theta.items()})

    with torch.no_grad():
        slope_BK = jvp(logits, (theta,), (tangent,))[1]
        difference_BK = (moved(1e-7) - moved(-1e-7)) / 2e-7
    assert (slope_BK - difference_BK).norm() <= 1e-5 * slope_BK.norm()
    assert slope_BK.norm() > 0.1
