"""How a network is run: in parts that fit in memory, in a chosen precision and memory layout, compiled or not.

Shapes: B images of C channels and H×W pixels, b of them in one chunk, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as aot_autograd
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _len_torch_function_stack, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from training.objectives.tangents import capturing

BACKEND = "inductor"  # of torch.compile


class _StandIn(nn.Module):
    """`original`, with its names and values, under another forward."""

    _original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not a child, whose name would stand before all others, but the same registries.
        object.__setattr__(self, "_original", original)
        self._parameters, self._buffers, self._modules = original._parameters, original._buffers, original._modules
        self._non_persistent_buffers_set = original._non_persistent_buffers_set

    def train(self, mode: bool = True) -> _StandIn:
        """See `nn.Module.train`."""
        self._original.train(mode)
        self.training = mode
        return self


class _Recomputed(_StandIn):
    """A block of a network, which keeps its inputs alone and is run again in backward."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._original(*inputs, **named)

        def run(*inputs: Any, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], **named: Any) -> Any:
            return functional_call(self._original, {**parameters, **buffers}, inputs, named)

        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        return _again_in_backward(run, *inputs, parameters=parameters, buffers=buffers, **named)


class Passes(_StandIn):
    """`network`, which trains on `chunks` equal parts of every batch in turn and computes in `dtype`.

    To objectives, optimiser and checkpoints it is the network, with its names, on one whole batch; images, logits,
    parameters and gradients keep their own precision. Backward computes a chunk again when it comes to it, so that the
    activations of one chunk at most exist at a time; only the engine `second_order` keeps a graph of all of them.

    Only batch norm can tell: it normalises each chunk by itself and moves its running statistics once a chunk. Batches
    are stored group by group, so where `chunks` is a multiple of the groups this worker holds, what it does is the same
    on any number of workers. In eval mode, with neither a graph nor batch statistics, a batch stays whole.

    `recompute`, the blocks of `network`, which is changed in place, keep their inputs alone, and backward computes each
    again when it comes to it, batch norm included. With chunks, too, the activations of one block of one chunk exist at
    a time. Blocks are elements of an `nn.Sequential` or `nn.ModuleList`, see `_blocks`; ValueError where there are
    fewer than two. The engine `second_order` saves less.

    `compiled`, `torch.compile` makes one kernel of many in every training pass; nothing is recorded for forward mode
    then, in which random layers draw anew. It is for one chunk, and cannot be differentiated twice.
    """

    _compiled: Any
    _compiled_moved: dict[tuple[Any, ...], Any]

    def __init__(
        self,
        network: nn.Module,
        *,
        chunks: int,
        dtype: torch.dtype,
        channels_last: bool,
        recompute: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(network)
        if channels_last:
            network.to(memory_format=torch.channels_last)
        self._chunks, self._dtype, self._recompute = chunks, dtype, recompute
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        # Batch norm takes float32 parameters with bf16 images, and in bf16 its statistics would stop moving.
        self._uncast = frozenset(
            name
            for path, module in network.named_modules()
            if isinstance(module, _BatchNorm)
            for name, _ in (*module.named_parameters(path), *module.named_buffers(path))
        )
        if recompute:
            _recompute_blocks(network)
        self._compiles, self._compiled, self._compiled_moved = compiled, None, {}
        if compiled:
            aot_autograd.donated_buffer = False  # the weak pass's graph is gone through twice

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_compiled_moved": {}}  # a copy compiles its own

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, B×K. Raises ValueError where a batch in training does not divide into the chunks."""
        chunks = self._chunks if self.training else 1
        if len(image_BCHW) % chunks:
            raise ValueError(f"{len(image_BCHW)} images do not divide into {chunks} equal chunks")
        again = torch.is_grad_enabled() and (chunks > 1 or self._recompute)
        run = partial(_again_in_backward, self._run) if again and chunks > 1 else self._run
        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        # No one keeps what is computed again (objectives/tangents.py).
        with torch._C.DisableTorchFunction() if again else nullcontext():
            parts = image_BCHW.chunk(chunks)
            return torch.cat([run(image_bCHW, parameters=parameters, buffers=buffers) for image_bCHW in parts])

    def _run(self, image_bCHW: Tensor, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        compiles = self._compiles and self.training  # evaluation has batches of many sizes
        if any(unpack_dual(value).tangent is not None for value in parameters.values()):
            moved = self._moved_compiled if compiles else self._moved
            return moved(image_bCHW, {**parameters, **buffers})
        if not compiles:
            return self._pass(image_bCHW, parameters, buffers)
        self._compiled = self._compiled or torch.compile(self._pass, backend=BACKEND, dynamic=False)
        with _unwatched():
            return self._compiled(image_bCHW, parameters, buffers)

    def _moved(self, image_bCHW: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        # In forward mode.
        hooks = [module.register_forward_hook(_match_tangent) for module in self._original.modules()]
        try:
            return self._pass(image_bCHW, values, {})
        finally:
            for hook in hooks:
                hook.remove()

    def _moved_compiled(self, image_bCHW: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        # torch.compile cannot look into forward mode. But below autograd that is operations like any other, so those
        # are written down once, and compiled.
        from torch._dynamo import lookup_backend  # as long to import as a small run
        from torch.fx.experimental.proxy_tensor import make_fx

        pairs = {name: unpack_dual(value) for name, value in values.items()}
        moving = [name for name, pair in pairs.items() if pair.tangent is not None]

        def moved(image_bCHW: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
            values = dict(zip(pairs, held, strict=False))
            tangents = zip(moving, held[len(pairs) :], strict=True)
            values |= {name: make_dual(values[name], tangent) for name, tangent in tangents}
            return tuple(unpack_dual(self._moved(image_bCHW, values)))

        held = [pair.primal for pair in pairs.values()] + [pairs[name].tangent for name in moving]
        key = (image_bCHW.shape, *moving)
        if key not in self._compiled_moved:
            operations = make_fx(moved)(image_bCHW, *held)
            with _unwatched():
                self._compiled_moved[key] = lookup_backend(BACKEND)(operations, [image_bCHW, *held])
        with _unwatched():
            return make_dual(*self._compiled_moved[key](image_bCHW, *held))

    def _pass(self, image_bCHW: Tensor, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        # Cast by hand, since autocast leaves tangents behind; and for each chunk, so that gradients add up uncast.
        values = {
            name: value.to(self._dtype) if value.is_floating_point() and name not in self._uncast else value
            for name, value in {**parameters, **buffers}.items()
        }
        cast_bCHW = image_bCHW.to(self._dtype, memory_format=self._layout)
        return functional_call(self._original, values, (cast_bCHW,)).to(image_bCHW.dtype)


def _again_in_backward(
    run: Callable[..., Any], *inputs: Any, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], **named: Any
) -> Any:
    # The first run may move buffers and change lists that it is given; later ones begin with copies of what these held.
    # Values are given, since others may stand in for them (`functional_call`) that are gone when backward recomputes.
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


def _recompute_blocks(network: nn.Module) -> None:
    blocks = _blocks(network)
    if len(blocks) < 2:
        raise ValueError(
            "this network has no two blocks in an nn.Sequential or nn.ModuleList to compute in turn: "
            "leave recompute out, and use pass_groups instead"
        )
    for path, block in blocks.items():
        network.set_submodule(path, _Recomputed(block))


def _blocks(module: nn.Module, path: str = "") -> dict[str, nn.Module]:
    # The smallest elements of two kernels that hold most kernels of what they are in: not the parts of a block.
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        place = f"{path}{name}"
        inner = _blocks(child, f"{place}.")
        element = isinstance(module, (nn.Sequential, nn.ModuleList)) and not isinstance(child, nn.ModuleList)
        if element and _kernels(child) >= 2 and 2 * sum(map(_kernels, inner.values())) < _kernels(child):
            inner = {place: child}
        found |= inner
    return found


def _kernels(module: nn.Module) -> int:
    return sum(value.dim() > 1 for value in module.parameters())


def _unwatched() -> AbstractContextManager:
    # A mode that watches (objectives/tangents.py) would become part of what is compiled.
    return _pop_mode_temporarily() if _len_torch_function_stack() else nullcontext()


def _match_tangent(module: nn.Module, inputs: Any, output: Any) -> Any:
    # In forward mode a norm that computes in float32 inside leaves its bf16 output a float32 tangent, which the next
    # convolution refuses. To float32 and back casts both.
    tangent = unpack_dual(output).tangent if isinstance(output, Tensor) else None
    if tangent is None or tangent.dtype == output.dtype:
        return output
    return output.to(tangent.dtype).to(output.dtype)
