"""Weights that someone else has trained, as a start: from timm's hub, or a file at any URL.

Shapes: K classes.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline import storage
from pipeline.dataset import InputError
from pipeline.views import Interpolation
from training.engine import networks
from training.objectives.memory import classifier
from training.recipe import HUB, Recipe

NAME = "start.safetensors"  # in a run's folder: the weights it starts from, as they fit its network
NESTED = ("state_dict", "model", "model_ema", "state_dict_ema")  # where training scripts keep a network's weights
PREFIXES = ("module.", "model.")  # what wrappers put before its names


def read(weights: str, network: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors at a URL, .safetensors or .pth, or those that timm's hub has for `network`; and their sha256.

    Nothing is unpickled but tensors. Raises InputError where there are none, or none that can be read.
    """
    if weights == HUB:
        return _of_hub(network)
    try:
        data = storage.read(*storage.connect(weights))
    except FileNotFoundError:
        raise InputError(f"there are no weights at {weights}: give a .safetensors or .pth file") from None
    try:
        held = (
            load(data) if weights.endswith(".safetensors") else torch.load(io.BytesIO(data), "cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        what = f"{weights} holds no weights that can be read safely ({type(error).__name__})"
        raise InputError(f"{what}: give safetensors, or a .pth of tensors alone") from None
    return _flat(held, weights), hashlib.sha256(data).hexdigest()


class Seen(NamedTuple):
    """Hold how a network's weights were tested on images."""

    size: int  # px
    crop: float  # share of the short side
    interpolation: Interpolation
    notes: list[str]  # lines on what is otherwise here


def seen(network: str) -> Seen | None:
    """Return how timm tested its weights of `network`; None where timm does not know it."""
    import timm  # a second or more: only where it is needed

    config = timm.get_pretrained_cfg(network) if timm.is_model(network) else None
    if config is None:
        return None
    notes = []
    if config.crop_mode != "center":
        notes.append(f"{network} was tested on {config.crop_mode}ed images; here the centre of each is cut out")
    interpolation: Interpolation = "bilinear" if config.interpolation == "bilinear" else "bicubic"
    return Seen(min(config.input_size[1:]), config.crop_pct, interpolation, notes)


def as_trained(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe whose images have the size, crop and interpolation that its weights were trained with.

    What the recipe sets itself stays. Beside it come lines on what is otherwise here.
    """
    tested = seen(recipe.network) if recipe.weights else None
    if tested is None:
        return recipe, []
    return replace(recipe, dataset=recipe.dataset.seen(*tested[:3])), tested.notes


def backbone(network: str, weights: str, size: int) -> tuple[nn.Module, int, str]:
    """Return a network of timm without its last layer, in eval mode, with its weights; its D features; their sha256.

    It maps images of −1…1, B×3×`size`×`size`, to B×D. Raises InputError for what cannot work.
    """
    held, sha256 = read(weights, network)
    try:
        built = networks.build(network, 3, 0, seed=0, size=size, own_input=True).eval()
    except ValueError as error:
        raise InputError(str(error)) from None
    heads = _heads(built)
    tensors, _ = fitted(built, {n: v for n, v in held.items() if n.rpartition(".")[0] not in heads}, classes=0)
    built.load_state_dict(tensors)
    try:
        with torch.inference_mode():
            features_BD = built(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{network} cannot take images of {size} px ({first}): change the size") from None
    if features_BD.dim() != 2:
        raise InputError(f"{network} gives {tuple(features_BD.shape)} of an image, no row of features: choose another")
    return built, features_BD.shape[1], sha256


def _of_hub(network: str) -> tuple[dict[str, Tensor], str]:
    import timm

    try:
        tensors = timm.create_model(network, pretrained=True).state_dict()
    except Exception as error:  # hub and network raise what they like
        what = f"timm's hub gives no weights of {network} here ({type(error).__name__})"
        raise InputError(f"{what}: check the network, or give a file: --weights PATH") from None
    return dict(tensors), hashlib.sha256(save({n: v.contiguous() for n, v in tensors.items()})).hexdigest()


def _flat(held: Any, weights: str) -> dict[str, Tensor]:
    # Name -> tensor, however a training script has wrapped it.
    for key in NESTED:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    tensors = (
        {name: value for name, value in held.items() if isinstance(value, Tensor)} if isinstance(held, Mapping) else {}
    )
    if not tensors:
        raise InputError(f"{weights} holds no tensors by name: give the state dict of a network")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def fitted(
    network: nn.Module, weights: Mapping[str, Tensor], classes: int, *, new_head: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a whole state dict of `network`, with `weights` where they belong; and the names that are new.

    These are of the last layer, where it has other classes or a `new_head` is asked for, and begin at zero: then the
    first gradients leave the features as they are (Kolesnikov et al. 2020, §3.3), where timm's own beginning, ±1/√K in
    EfficientNet, is loud enough to spoil them. Position embeddings are
    resized and first kernels summed over channels as timm does it. Raises InputError, naming tensors, for any other
    that is missing, unknown, or of another shape.
    """
    own, adapted = network.state_dict(), _adapted(network, weights)
    new = {name for name in own if name.startswith("input_") or (_counts(name) and name not in adapted)}
    head = last_layer(network, classes)
    if not new_head:
        head = {name for name in head if name not in adapted or adapted[name].shape != own[name].shape}
    known = own.keys() - new - head
    _require_none("lack", known - adapted.keys())
    _require_none("have, unknown to the network,", {name for name in adapted.keys() - own.keys() if not _counts(name)})
    _require_shapes({name: (adapted[name].shape, own[name].shape) for name in known})
    begun = {name: torch.zeros_like(own[name]) for name in head}
    return {n: adapted[n].to(own[n].dtype) if n in known else begun.get(n, own[n]) for n in own}, sorted(head)


def _require_shapes(shapes: Mapping[str, tuple[torch.Size, torch.Size]]) -> None:
    # By name, those of the weights and of the network.
    for name, (theirs, ours) in sorted(shapes.items()):
        if theirs != ours:
            what = f"the weights have {name} of {tuple(theirs)} where the network has {tuple(ours)}"
            raise InputError(f"{what}: give those of this network")


def _require_none(what: str, names: set[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"the weights {what} {some}{more}: give those of this network")


def _counts(name: str) -> bool:
    # Batch norm's count of batches: older files have none.
    return name.endswith("num_batches_tracked")


def last_layer(network: nn.Module, classes: int) -> set[str]:
    """Name the tensors of the last layer: as timm tells it, else of the last linear one of so many classes."""
    heads = _heads(network)
    if not heads:
        last = classifier(network, classes)
        heads = {name for name, module in network.named_modules() if module is last}
    return {name for name in network.state_dict() if name.rpartition(".")[0] in heads}


def _heads(network: nn.Module) -> set[str]:
    # The modules that timm says are the last layer.
    named = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return {named} if isinstance(named, str) else set(named)


def _adapted(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Position embeddings for another size, old names: as the network's own module in timm does it. Other channels too.
    adapted = dict(weights)
    own_filter = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if own_filter:
        adapted = dict(own_filter(adapted, network))
    config = getattr(network, "pretrained_cfg", {})
    first = config.get("first_conv") or ()
    for conv in (first,) if isinstance(first, str) else first:
        name, own = f"{conv}.weight", network.state_dict()
        if name in adapted and name in own and adapted[name].shape[1] == 3 != own[name].shape[1]:
            from timm.models import adapt_input_conv  # only where a timm network is asked for

            adapted[name] = adapt_input_conv(own[name].shape[1], adapted[name])
    return adapted


def write(folder: str, tensors: Mapping[str, Tensor], sha256: str) -> None:
    """Write the weights a run starts from into its folder, with the checksum of what they were read from."""
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    storage.write(*storage.connect(storage.join(folder, NAME)), save(held, {"sha256": sha256}))


def start(folder: str) -> dict[str, Tensor]:
    """Return the weights a run starts from. Raises InputError where they are missing."""
    try:
        return load(storage.read(*storage.connect(storage.join(folder, NAME))))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {NAME}: start the run again") from None
