"""A worker's groups of one step, as the stream gives them, to the batch that objectives see.

Shapes: B noisy examples of this worker, M probe examples, images H×W×C in storage and C×H×W in networks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.plan import Group, Purpose, key
from training.objectives.interface import Batch
from training.recipe import Recipe


def normalised(image_NHWC: Tensor) -> Tensor:
    """Map images, uint8 0…255, to float −1…1, N×C×H×W (channels last in memory).

    Of features, which are floats, channels keep their sign and the root of their size, as pooled activations are skewed
    (Perronnin et al. 2010, §3.2), and each pixel is brought to mean 0 and norm 4 over them: so one learning rate, that
    of networks from scratch, fits those of all networks.
    """
    image_NHWC, is_image = image_NHWC.to(torch.get_default_dtype()), image_NHWC.dtype == torch.uint8
    if is_image:
        return image_NHWC.permute(0, 3, 1, 2).div_(127.5).sub_(1)
    channels = image_NHWC.shape[3:]
    root_NHWC = image_NHWC.sign() * image_NHWC.abs().sqrt()
    return F.layer_norm(root_NHWC, channels).mul_(4 / math.prod(channels) ** 0.5).permute(0, 3, 1, 2)


def assemble(held: list[Group], recipe: Recipe, classes: int, device: torch.device) -> Batch:
    """Put a worker's groups of one step on the device: noisy examples first, then each group's own trusted ones."""
    weak, strong, trusted = slice(recipe.group), slice(recipe.group, 2 * recipe.group), slice(2 * recipe.group, None)

    def on_device(column: str, rows: slice) -> Tensor:
        tensor = torch.from_numpy(np.concatenate([group[column][rows] for group in held]))
        # From pageable memory the host would wait for all that the GPU has been given to do.
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    return Batch(
        weak_BCHW=normalised(on_device("image", weak)),
        strong_BCHW=normalised(on_device("image", strong)),
        label_B=on_device("label", weak),
        row_B=on_device("row", weak),
        probe_MCHW=normalised(on_device("image", trusted)),
        probe_label_M=on_device("label", trusted),
        group_keys=tuple(key(recipe.seed, Purpose.MIXUP, int(group["group"][0])) for group in held),
        classes=classes,
    )
