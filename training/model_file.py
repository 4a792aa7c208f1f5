"""The file that a finished run leaves for others: evaluated weights, class names and the recipe they came from.

Shapes: N images, K classes, images H×W×C.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline import storage
from pipeline.dataset import Examples, InputError
from pipeline.views import Views
from training import networks
from training.step import normalised

NAME = "model.safetensors"
BATCH = 128  # images


@dataclass(frozen=True)
class ModelFile:
    """What the file of a run holds."""

    folder: str
    class_names: tuple[str, ...]
    recipe: dict[str, Any]  # plain data, without URLs
    weights: dict[str, Tensor]

    def require(self, class_names: tuple[str, ...], data: str) -> None:
        """Raise InputError unless the model's classes are `class_names`, those of `data`."""
        if self.class_names != class_names:
            raise InputError(
                f"the model of {self.folder} knows {_told(self.class_names)}, but {data} has {_told(class_names)}: "
                "give the data that it was trained on"
            )

    def probabilities(self, examples: Examples, views: Views) -> np.ndarray:
        """What the network says of examples, N×K; raises InputError where it fits neither its own recipe nor them."""
        channels = views.test(examples.image(0)).shape[-1]
        network = networks.build(self.recipe["network"], channels, len(self.class_names), seed=0).eval()
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"{self.folder}/{NAME} does not fit its recipe or these images ({first})") from None
        parts = []
        for start in range(0, len(examples), BATCH):
            rows = range(start, min(start + BATCH, len(examples)))
            image_NHWC = np.stack([views.test(examples.image(row)) for row in rows])
            with torch.inference_mode():
                parts.append(network(normalised(torch.from_numpy(image_NHWC)).float()).softmax(1).numpy())
        return np.concatenate(parts)


def read(folder: str) -> ModelFile:
    """The model of the run in `folder`. Raises InputError where there is none, or none that can be read."""
    fs, path = storage.connect(folder)
    try:
        data = storage.read(fs, storage.join(path, NAME))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {NAME}: give the folder of a run that has finished") from None
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        names, recipe = json.loads(header["class_names"]), json.loads(header["recipe"])
        return ModelFile(folder, tuple(names), recipe, load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/{NAME} is damaged ({type(error).__name__}): copy the run again") from None


def _told(class_names: tuple[str, ...]) -> str:
    return f"{len(class_names)} classes ({', '.join(class_names[:3])}, …)"
