"""A network computing in another precision than its parameters are in.

Autocast leaves tangents behind, so values are cast by hand, and for each pass, so that gradients add up uncast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from training.objectives.private_torch import BatchNorm


def kept_uncast(network: nn.Module) -> frozenset[str]:
    """Name the parameters and buffers of batch norm.

    It takes float32 parameters with bf16 images, and in bf16 its statistics would stop moving.
    """
    return frozenset(
        name
        for path, module in network.named_modules()
        if isinstance(module, BatchNorm)
        for name, _ in (*module.named_parameters(path), *module.named_buffers(path))
    )


def cast(values: Mapping[str, Tensor], dtype: torch.dtype, uncast: frozenset[str]) -> dict[str, Tensor]:
    """Return floating-point values in `dtype`, all but those named in `uncast`."""
    return {
        name: value.to(dtype) if value.is_floating_point() and name not in uncast else value
        for name, value in values.items()
    }


@contextmanager
def matched_tangents(network: nn.Module) -> Iterator[None]:
    """Have layers, in forward mode, leave tangents of their outputs' own dtype while the context lasts."""
    hooks = [module.register_forward_hook(_match_tangent) for module in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _match_tangent(module: nn.Module, inputs: Any, output: Any) -> Any:
    # A norm that computes in float32 inside leaves its bf16 output a float32 tangent, which the next convolution
    # refuses. To float32 and back casts both.
    tangent = unpack_dual(output).tangent if isinstance(output, Tensor) else None
    if tangent is None or tangent.dtype == output.dtype:
        return output
    return output.to(tangent.dtype).to(output.dtype)
