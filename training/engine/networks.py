"""Networks by name: for small images wide residual networks, ResNet-29, DenseNet-100 and VGG-13; any other from timm.

Shapes: B images, C channels, H×W pixels, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.losses import Affine

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Return group normalisation in groups of 8 channels.

    It has no batch statistics: however a batch is split, results agree.
    """
    return nn.GroupNorm(max(1, channels // 8), channels)


class WideBlock(nn.Module):
    """Compute a pre-activation basic block of a wide residual network.

    Zagoruyko & Komodakis 2016, fig. 1d, without dropout.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map B×inputs×H×W to B×outputs×H/stride×W/stride."""
        activated = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(activated))))


class Bottleneck(nn.Module):
    """Compute a ResNet v2 bottleneck (He et al. 2016b).

    `first_activation=False` leaves out the ReLU before the first 1×1 convolution, as the paper's authors do.
    `bare_first` is the network's very first block, whose input is already normalised and activated.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        stride: int,
        norm: Norm,
        *,
        bare_first: bool,
        first_activation: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.Identity() if bare_first else norm(inputs)
        self.first_activation = first_activation and not bare_first
        self.conv1 = nn.Conv2d(inputs, width, 1, stride)
        self.norm2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.norm3 = norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1)
        self.shortcut = None if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map B×inputs×H×W to B×outputs×H/stride×W/stride."""
        out = self.norm1(x)
        if self.first_activation:
            out = F.relu(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.norm2(out)))
        out = self.conv3(F.relu(self.norm3(out)))
        return out + (x if self.shortcut is None else self.shortcut(x))


class SmallImageNet(nn.Module):
    """Compute stem, residual blocks, norm-ReLU, global average, linear: the shape both small-image networks share."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], features: int, classes: int, norm: Norm) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(features)
        self.head = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits, B×K."""
        out = F.relu(self.norm(self.blocks(self.stem(image_BCHW))))
        return self.head(out.mean((2, 3)))


def wide_resnet(depth: int, width: int, channels: int, classes: int, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """Build WRN-depth-width (Zagoruyko & Komodakis 2016).

    Raises ValueError unless depth is 6n + 4, from 10, and width at least 1.
    """
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(f"wrn-{depth}-{width}: depth must be 10, 16, 22, 28 … (6n + 4) and width at least 1")
    inputs, blocks = 16, []
    for stage in range(3):
        outputs = 16 * width * 2**stage
        for block in range((depth - 4) // 6):
            blocks.append(WideBlock(inputs, outputs, 2 if stage and not block else 1, norm))
            inputs = outputs
    return SmallImageNet(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), list(blocks), inputs, classes, norm)


def resnet29(channels: int, classes: int, norm: Norm = nn.BatchNorm2d, first_activation: bool = False) -> nn.Module:
    """Build ResNet-29 v2, 0.84 M parameters (docs/method.md, "Networks").

    `first_activation=True` is standard pre-activation.
    """
    stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1), norm(16), nn.ReLU())
    inputs, blocks = 16, []
    for stage, (width, outputs) in enumerate(((16, 64), (64, 128), (128, 256))):
        for block in range(3):
            blocks.append(
                Bottleneck(
                    inputs,
                    width,
                    outputs,
                    2 if stage and not block else 1,
                    norm,
                    bare_first=not stage and not block,
                    first_activation=first_activation,
                )
            )
            inputs = outputs
    return SmallImageNet(stem, list(blocks), inputs, classes, norm)


def densenet100(channels: int, classes: int) -> nn.Module:
    """Build DenseNet-BC-100, growth 12, 0.77 M parameters (Huang et al. 2017).

    It is torchvision's, without its stem for 224 px.
    """
    from torchvision.models import DenseNet  # as long to import as torch itself

    model = DenseNet(growth_rate=12, block_config=(16, 16, 16), num_init_features=24, num_classes=classes)
    model.features.conv0 = nn.Conv2d(channels, 24, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    for name in ("norm0", "relu0", "pool0"):
        setattr(model.features, name, nn.Identity())
    return model


def vgg13(channels: int, classes: int) -> nn.Module:
    """Build VGG-13 with batch norm and one linear layer, 9.4 M parameters, for 32 px or more.

    The convolutions are torchvision's.
    """
    from torchvision.models import vgg13_bn

    features = vgg13_bn().features
    if channels != 3:
        features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def head(hidden: int, features: int, classes: int) -> nn.Module:
    """Build a linear layer on stored features, after `hidden` units with ReLU where there are any."""
    if not hidden:
        return nn.Sequential(nn.Flatten(), Affine(features, classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


SMALL_IMAGES = {"densenet100": densenet100, "vgg13": vgg13}
RESNETS = ("resnet29", "resnet29-preact")
HEAD = re.compile(r"linear|mlp-([1-9]\d*)")  # networks on features


def build(
    name: str,
    channels: int,
    classes: int,
    seed: int,
    *,
    size: int = 0,
    drop_path: float = 0.0,
    own_input: bool = False,
) -> nn.Module:
    """Build the randomly initialised network called `name`, the same for the same seed.

    `wrn-28-10`, `resnet29` (the authors' variant), `resnet29-preact`; `:group` behind these replaces batch by group
    normalisation; `densenet100`, `vgg13`; `linear` and `mlp-UNITS` for stored features; any other name is timm's, with
    or without a tag (`resnet50.a1_in1k`). Of those, networks that are built for a size are built for `size` px, blocks
    are left out with probability `drop_path` at the last one, and with `own_input` the network maps images from −1…1 to
    what its weights expect.
    Raises ValueError, with the closest names, for an unknown one.
    """
    ours = _ours(name)
    if ours and (drop_path or own_input):
        raise ValueError(f"network {name!r} has neither drop path nor pretrained weights: choose one of timm's")
    with torch.random.fork_rng(devices=[]):  # initialised on the CPU; a bare fork would open every GPU
        torch.manual_seed(seed)
        network = ours(channels, classes) if ours else _timm_model(name, channels, classes, size, drop_path)
    return with_own_input(network, channels) if own_input else network


def _ours(name: str) -> Callable[[int, int], nn.Module] | None:
    """Return what builds the network of this name for channels and classes; None for those of timm."""
    base, _, suffix = name.partition(":")
    if suffix not in ("", "group"):
        raise ValueError(f"network {name!r}: the part behind ':' can only be 'group'")
    norm: Norm = group_norm if suffix else nn.BatchNorm2d
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", base):
        return partial(wide_resnet, int(match[1]), int(match[2]), norm=norm)
    if base in RESNETS:
        return partial(resnet29, norm=norm, first_activation=base == "resnet29-preact")
    if suffix:
        raise ValueError(f"network {name!r}: ':group' goes with wrn-DEPTH-WIDTH and resnet29 only")
    if match := HEAD.fullmatch(base):
        return partial(head, int(match[1] or 0))
    return SMALL_IMAGES.get(base)


def _timm_model(name: str, channels: int, classes: int, size: int, drop_path: float) -> nn.Module:
    import timm  # several seconds to import: only where a timm network is asked for

    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        import difflib

        ours = ["resnet29", "wrn-28-10", "linear", "mlp-512", *SMALL_IMAGES]
        known = [*ours, *timm.list_models(), *("." in name) * timm.list_pretrained()]
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "use wrn-DEPTH-WIDTH, resnet29 or a timm name"
        raise ValueError(f"unknown network {name!r}: {hint}")
    settings: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    if drop_path:
        settings["drop_path_rate"] = drop_path
    try:
        if size:
            return timm.create_model(name, img_size=size, **settings)
    except TypeError:
        pass  # networks that take images of any size do not ask for one
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"network {name} cannot be built for {size} px ({_line(error)}): change the size") from None
    try:
        return timm.create_model(name, **settings)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise ValueError(f"network {name} has no drop path: leave drop_path out") from None
        raise


def require_forward_mode(name: str, network: nn.Module) -> None:
    """Raise ValueError where torch has no forward mode, and no second derivative, for layers of the network `name`."""
    lacking = sorted({type(module).__name__ for module in network.modules() if isinstance(module, nn.RNNBase)})
    if lacking:
        raise ValueError(
            f"torch has no forward mode for {' and '.join(lacking)}, of which {name} is made, and a meta step needs "
            "it: choose another network, or a method without one, such as --method supervised"
        )


def with_own_input(network: nn.Module, channels: int) -> nn.Module:
    """Let a timm network map what it is given, −1…1, to the mean and deviation that its weights were trained with.

    Both are buffers: they go where the weights go, into checkpoints, the model file and ONNX. Of other channels than
    the weights knew each has the mean of all.
    """
    config: Any = network.pretrained_cfg  # of 0…1
    mean, std = (torch.tensor(config[key], dtype=torch.get_default_dtype()) for key in ("mean", "std"))
    if channels != len(mean):
        mean, std = mean.mean().expand(channels), std.mean().expand(channels)
    network.register_buffer("input_scale", (0.5 / std).reshape(-1, 1, 1).clone())
    network.register_buffer("input_shift", ((0.5 - mean) / std).reshape(-1, 1, 1).clone())
    network.register_forward_pre_hook(_own_input)
    return network


def _own_input(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image_BCHW, *others = inputs
    scale, shift = network.get_buffer("input_scale"), network.get_buffer("input_shift")
    return (image_BCHW * scale.to(image_BCHW.dtype) + shift.to(image_BCHW.dtype), *others)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
