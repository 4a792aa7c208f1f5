"""The file that a finished run leaves for others: evaluated weights, class names and the recipe they came from.

Shapes: N images, K classes, images H×W×C.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline import storage
from pipeline.dataset import Examples, InputError, Source
from training.engine import networks
from training.engine.batch import normalised
from training.engine.passes.network import Passes
from training.recipe import Recipe, publishable, source_of

NAME = "model.safetensors"
BATCH = 128  # images


@dataclass(frozen=True)
class ModelFile:
    """Hold what is in the file of a run."""

    url: str
    sha256: str
    class_names: tuple[str, ...]
    recipe: Mapping[str, Any]  # plain data, without URLs
    weights: Mapping[str, Tensor]

    @property
    def source(self) -> Source:
        """Return the data set it was trained on, whose test view the network sees.

        Raises InputError for an unknown one.
        """
        return source_of(self.recipe["dataset"])

    def probabilities(self, examples: Examples) -> np.ndarray:
        """Return the network's probabilities for examples of its data set, N×K. Raises as `bare_network`."""
        network, views = self.network(), self.source.views
        dtype = next(network.parameters()).dtype
        parts = []
        for start in range(0, len(examples), BATCH):
            rows = range(start, min(start + BATCH, len(examples)))
            image_NHWC = np.stack([views.test(examples.image(row)) for row in rows])
            with torch.inference_mode():
                logits_NK = network(normalised(torch.from_numpy(image_NHWC)).to(dtype))
            parts.append(logits_NK.softmax(1).float().numpy())
        return np.concatenate(parts)

    def require(self, class_names: tuple[str, ...], data: str) -> None:
        """Raise InputError unless the model's classes are `class_names`, those of `data`."""
        if len(class_names) != len(self.class_names):
            what = f"{self.url} knows {len(self.class_names)} classes and {data} has {len(class_names)}"
            raise InputError(f"{what}: give a model and data of the same classes")
        for k, (ours, theirs) in enumerate(zip(self.class_names, class_names, strict=True)):
            if ours != theirs:
                what = f"class {k} is {ours!r} to {self.url} and {theirs!r} in {data}"
                raise InputError(f"{what}: give a model and data of the same classes")

    def network(self) -> nn.Module:
        """Return the network in eval mode on the CPU, computing as when it was evaluated. Raises as `bare_network`."""
        precision, channels_last = self.recipe["precision"], self.recipe["channels_last"]
        dtype = torch.float64 if precision == "float64" else torch.float32
        network = self.bare_network(dtype)
        if precision == "bf16" or channels_last:
            dtype = torch.bfloat16 if precision == "bf16" else dtype
            network = Passes(network, chunks=1, dtype=dtype, channels_last=channels_last)
        return network.eval()

    def bare_network(self, dtype: torch.dtype) -> nn.Module:
        """Return the network in eval mode on the CPU, with weights of `dtype`.

        Raises InputError where it is unknown, or the weights do not fit it.
        """
        try:
            height, _, channels = self.source.shape
            own_input = bool(self.recipe.get("weights"))
            network = networks.build(
                self.recipe["network"], channels, len(self.class_names), seed=0, size=height, own_input=own_input
            )
            network.to(dtype).load_state_dict(dict(self.weights))
        except ValueError as error:
            raise InputError(f"{self.url}: {error}") from None
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"{self.url} does not fit its own recipe ({first}): train again") from None
        return network.eval()


def read(url: str) -> ModelFile:
    """Return the model of the run in the folder `url`, or of the file `url` itself, model.safetensors.

    Raises InputError where there is none, where it is damaged, and where it lacks its classes and recipe.
    """
    url = url if url.endswith(".safetensors") else storage.join(url, NAME)
    try:
        data = storage.read(*storage.connect(url))
    except FileNotFoundError:
        raise InputError(f"there is no {url}: give the folder of a run that has finished, or its {NAME}") from None
    try:
        weights = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # as the format has it
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{url} is damaged ({type(error).__name__}): copy the run again") from None
    metadata = header.get("__metadata__", {})
    try:
        names, recipe = json.loads(metadata["class_names"]), json.loads(metadata["recipe"])
    except (ValueError, KeyError) as error:
        what = f"{url} does not say its classes and recipe ({error})"
        raise InputError(f"{what}: give the {NAME} that a run has written, with its metadata") from None
    return ModelFile(url, hashlib.sha256(data).hexdigest(), tuple(names), recipe, weights)


def write(folder: str, weights: Mapping[str, Tensor], class_names: tuple[str, ...], recipe: Recipe) -> None:
    """Write a network's weights into the run's folder, with class names and recipe in the metadata."""
    metadata = {"class_names": json.dumps(class_names), "recipe": json.dumps(publishable(recipe))}
    held = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    fs, path = storage.connect(folder)
    storage.write(fs, storage.join(path, NAME), save(held, metadata))
