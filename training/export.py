"""Export a model to ONNX, with what must be done to an image before it, and check that ONNX Runtime agrees.

    python -m training.export runs/webvision --out model.onnx

Input `image`: float32, B×C×H×W; output `logits`, B×K. The file's metadata hold `class_names`, a JSON list, and
`preprocessing`, JSON: shrink or enlarge an image until its short side has `resize_short_side` px (by `interpolation`,
bilinear or bicubic, smoothed where it shrinks), cut out the `height`×`width` px in its centre, divide values 0…255 by
127.5 and subtract 1; the mean and deviation that pretrained weights want are in the network. A head on features takes
them as they are stored, B×D×1×1, and has no preprocessing.

Shapes: B images of C channels and H×W pixels, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import nn

from pipeline import command, storage
from pipeline.dataset import InputError, Source
from pipeline.views import PhotoViews
from training.engine.batch import normalised
from training.runs import model_file

CHECKED = (1, 3, 8)  # sizes of the batches that both are asked


@dataclass(frozen=True)
class Request:
    """Describe what is asked for."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run's folder, or its model.safetensors: a local path or any fsspec URL."""
    out: str
    """The file to write, .onnx: a local path or any fsspec URL."""
    tolerance: float = 1e-4
    """The most by which logits may differ from PyTorch's, relative to the largest of them."""

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}: it must be above 0")


def export(request: Request, console: Console | None = None) -> float:
    """Write the model; returns the largest difference of logits, relative to the largest logit.

    Raises InputError for a model that cannot be read or written as ONNX, and for a difference above the tolerance:
    then nothing is written. Raises ModuleNotFoundError, naming the fix, where the ONNX packages are missing.
    """
    console = console or Console()
    _require_packages()
    model = model_file.read(request.model)
    network = model.bare_network(torch.float32)
    if model.source.direct:
        network = nn.Sequential(_Normalised(), network).eval()
    properties = {"class_names": model.class_names, "preprocessing": preprocessing(model.source)}
    data = _to_onnx(network, model.source.shape, {name: json.dumps(value) for name, value in properties.items()})
    difference = _difference(network, data, model.source.shape)
    text = f"logits of ONNX Runtime and PyTorch differ by {difference:.1e} of the largest at most"
    if not difference <= request.tolerance:  # NaN too
        raise InputError(
            f"{text}, more than {request.tolerance:.1e}: nothing was written; raise --tolerance if you can"
        )
    storage.write(*storage.connect(request.out), data)
    console.print(f"{request.out}: {text}", highlight=False, soft_wrap=True)
    return difference


def preprocessing(source: Source) -> dict[str, object]:
    """Return what must be done to an image before the network, as the text at the top of this file describes it."""
    (height, width, channels), views = source.shape, source.views
    if source.direct:
        return {"layout": "NCHW", "height": height, "width": width}
    return {
        "layout": "NCHW",
        "colour": "RGB" if channels == 3 else "grey",
        "height": height,
        "width": width,
        "resize_short_side": views.short_side if isinstance(views, PhotoViews) else min(height, width),
        "interpolation": views.interpolation if isinstance(views, PhotoViews) else "bilinear",
        "divide_by": 127.5,
        "subtract": 1.0,
    }


class _Normalised(nn.Module):
    """Take features as they are stored."""

    def forward(self, feature_BCHW: torch.Tensor) -> torch.Tensor:
        return normalised(feature_BCHW.permute(0, 2, 3, 1))


def _require_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is not installed: pip install -e ".[export]"')


def _to_onnx(network: nn.Module, shape: tuple[int, int, int], metadata: dict[str, str]) -> bytes:
    import onnx

    height, width, channels = shape
    program = torch.onnx.export(
        network,
        (torch.zeros(2, channels, height, width),),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def _difference(network: nn.Module, model: bytes, shape: tuple[int, int, int]) -> float:
    # The largest over batches of several sizes, of noise: what any image is to rounding.
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    worst = 0.0
    for size in CHECKED:
        image_BCHW = torch.from_numpy(rng.uniform(-1, 1, (size, shape[2], *shape[:2])).astype(np.float32))
        with torch.inference_mode():
            expected_BK = network(image_BCHW).numpy()
        (logits_BK,) = session.run(["logits"], {"image": image_BCHW.contiguous().numpy()})
        worst = max(worst, float(np.abs(logits_BK - expected_BK).max() / (np.abs(expected_BK).max() or 1)))
    return worst


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    description = (__doc__ or "").partition("\n\nShapes")[0]
    request = tyro.cli(Request, args=arguments, prog="python -m training.export", description=description)

    def work() -> None:
        export(request)

    command.guarded(work)


if __name__ == "__main__":
    main()
