"""What this package uses of torch beyond its documented interface: all in one file, to look at when torch moves on.

pyproject.toml bounds torch from above for its sake. Nothing else here imports a name of torch that begins with an
underscore, or reads one (tests/training/objectives/test_private_torch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import _len_torch_function_stack, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "BatchNorm",
    "batch_norm_backward",
    "batch_norm_forward",
    "compiled_operations",
    "foreach_add",
    "foreach_add_",
    "foreach_lerp_",
    "keep_graphs_of_compiled_passes",
    "no_modes",
    "tree_flatten",
    "tree_unflatten",
    "without_innermost_mode",
    "writes",
]

# A few kernels for a list of tensors, however many they are.
foreach_add: Callable[..., tuple[Tensor, ...]] = torch._foreach_add
foreach_add_: Callable[..., None] = torch._foreach_add_
foreach_lerp_: Callable[..., None] = torch._foreach_lerp_

# Batch norm with the statistics that its backward pass needs, and that backward pass.
batch_norm_forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.native_batch_norm
batch_norm_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.aten.native_batch_norm_backward

no_modes: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction  # inside, no mode sees a call


def without_innermost_mode() -> AbstractContextManager[Any]:
    """Leave the innermost `TorchFunctionMode` out inside; where there is none, do nothing."""
    return _pop_mode_temporarily() if _len_torch_function_stack() else nullcontext()


def writes(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place."""
    return tensor._version


def keep_graphs_of_compiled_passes() -> None:
    """Let the graph of a compiled pass be gone through twice, for this whole process."""
    from torch._functorch import config

    config.donated_buffer = False


def compiled_operations(backend: Any, operations: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Return what a backend of torch.compile, by name or itself, makes of operations written down by `make_fx`."""
    from torch._dynamo import lookup_backend  # as long to import as a small run

    return lookup_backend(backend)(operations, list(inputs))
