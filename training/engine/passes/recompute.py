"""Activations that are not kept: a pass, or the blocks of a network, computed again when backward comes to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from training.engine.passes.stand_in import StandIn
from training.objectives.private_torch import tree_flatten, tree_unflatten
from training.objectives.tangents import capturing


def again_in_backward(
    run: Callable[..., Any], *inputs: Any, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], **named: Any
) -> Any:
    """Return what `run` makes of all that is given, of which backward keeps the inputs alone and runs it again.

    The first run may move buffers and change lists that it is given; later ones begin with copies of what these held.
    Values are given, since others may stand in for them (`functional_call`) that are gone when backward recomputes.
    """
    first = [(inputs, named, buffers)]
    leaves, structure = tree_flatten((inputs, named))
    before = {name: buffer.clone() for name, buffer in buffers.items()}

    def run_on(*leaves: Any) -> Any:
        if first:
            inputs, named, held = first.pop()
        else:
            inputs, named = tree_unflatten(leaves, structure)
            held = {name: buffer.clone() for name, buffer in before.items()}
        return run(*inputs, parameters=parameters, buffers=held, **named)

    return checkpoint(run_on, *leaves, use_reentrant=False, preserve_rng_state=not capturing())


class Recomputed(StandIn):
    """Run a block of a network, keep its inputs alone, and run it again in backward."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the block makes of its inputs."""
        if not torch.is_grad_enabled():
            return self._original(*inputs, **named)

        def run(*inputs: Any, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], **named: Any) -> Any:
            return functional_call(self._original, {**parameters, **buffers}, inputs, named)

        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        return again_in_backward(run, *inputs, parameters=parameters, buffers=buffers, **named)


def recompute_blocks(network: nn.Module) -> None:
    """Have the blocks of a network, which is changed in place, computed again in backward.

    Raises ValueError where there are fewer than two.
    """
    blocks = residual_blocks(network)
    if len(blocks) < 2:
        raise ValueError(
            "this network has no two blocks in an nn.Sequential or nn.ModuleList to compute in turn: "
            "leave recompute out, and use pass_groups instead"
        )
    for path, block in blocks.items():
        network.set_submodule(path, Recomputed(block))


def residual_blocks(module: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """Find a network's blocks, by name: elements of an `nn.Sequential` or `nn.ModuleList` with two kernels or more.

    They are the smallest that hold most kernels of what they are in: not the parts of a block.
    """
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        place = f"{path}{name}"
        inner = residual_blocks(child, f"{place}.")
        element = isinstance(module, (nn.Sequential, nn.ModuleList)) and not isinstance(child, nn.ModuleList)
        if element and _kernels(child) >= 2 and 2 * sum(map(_kernels, inner.values())) < _kernels(child):
            inner = {place: child}
        found |= inner
    return found


def _kernels(module: nn.Module) -> int:
    return sum(value.dim() > 1 for value in module.parameters())
