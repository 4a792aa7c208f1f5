"""How a network is run: in chunks that fit in memory, in a chosen precision and memory layout, compiled or not.

Shapes: B images of C channels and H×W pixels, b of them in one chunk, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as aot_autograd
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _len_torch_function_stack, _pop_mode_temporarily
from torch.utils.checkpoint import checkpoint

from training.objectives.tangents import capturing

BACKEND = "inductor"  # of torch.compile


class Passes(nn.Module):
    """`network`, which trains on `chunks` equal parts of every batch in turn and computes in `dtype`.

    To objectives, optimiser and checkpoints it is the network, with its names, on one whole batch; images, logits,
    parameters and gradients keep their own precision. Backward computes a chunk again when it comes to it, so that the
    activations of one chunk at most exist at a time; only the engine `second_order` keeps a graph of all of them.

    Only batch norm can tell: it normalises each chunk by itself and moves its running statistics once a chunk. Batches
    are stored group by group, so where `chunks` is a multiple of the groups this worker holds, what it does is the same
    on any number of workers. In eval mode, with neither a graph nor batch statistics, a batch stays whole.

    `compiled`, `torch.compile` makes one kernel of many in every training pass; nothing is recorded for forward mode
    then, in which random layers draw anew. It is for one chunk, and cannot be differentiated twice.
    """

    _network: nn.Module
    _compiled: Any
    _compiled_moved: dict[tuple[Any, ...], Any]

    def __init__(
        self, network: nn.Module, *, chunks: int, dtype: torch.dtype, channels_last: bool, compiled: bool = False
    ) -> None:
        super().__init__()
        if channels_last:
            network.to(memory_format=torch.channels_last)
        # Not a child, whose name would stand before all others, but the same registries under another forward.
        object.__setattr__(self, "_network", network)
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self._chunks, self._dtype = chunks, dtype
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        # Batch norm takes float32 parameters with bf16 images, and in bf16 its statistics would stop moving.
        self._uncast = frozenset(
            name
            for path, module in network.named_modules()
            if isinstance(module, _BatchNorm)
            for name, _ in (*module.named_parameters(path), *module.named_buffers(path))
        )
        self._compiles, self._compiled, self._compiled_moved = compiled, None, {}
        if compiled:
            aot_autograd.donated_buffer = False  # the weak pass's graph is gone through twice

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_compiled_moved": {}}  # a copy compiles its own

    def train(self, mode: bool = True) -> Passes:
        """See `nn.Module.train`."""
        self._network.train(mode)
        return super().train(mode)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, B×K. Raises ValueError where a batch in training does not divide into the chunks."""
        chunks = self._chunks if self.training else 1
        if len(image_BCHW) % chunks:
            raise ValueError(f"{len(image_BCHW)} images do not divide into {chunks} equal chunks")
        # Taken now: others may stand in for them (`functional_call`) that are gone again when backward recomputes.
        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        run = self._run_again_in_backward if chunks > 1 and torch.is_grad_enabled() else self._run
        return torch.cat([run(image_bCHW, parameters, buffers) for image_bCHW in image_BCHW.chunk(chunks)])

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
        hooks = [module.register_forward_hook(_match_tangent) for module in self._network.modules()]
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
        return functional_call(self._network, values, (cast_bCHW,)).to(image_bCHW.dtype)

    def _run_again_in_backward(
        self, image_bCHW: Tensor, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> Tensor:
        unmoved = [buffers]

        def run(image_bCHW: Tensor) -> Tensor:
            # Statistics move in the first run only; later ones move copies.
            held = unmoved.pop() if unmoved else {name: buffer.clone() for name, buffer in buffers.items()}
            with torch._C.DisableTorchFunction():  # no one keeps what is computed again (objectives/tangents.py)
                return self._run(image_bCHW, parameters, held)

        return checkpoint(run, image_bCHW, use_reentrant=False, preserve_rng_state=not capturing())


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
