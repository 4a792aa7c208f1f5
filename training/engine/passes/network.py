"""How a network is run: in parts that fit in memory, in a chosen precision and memory layout, compiled or not.

Shapes: B images of C channels and H×W pixels, b of them in one chunk, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.func import functional_call

from training.engine.passes.compiled import Compiled
from training.engine.passes.precision import cast, kept_uncast, matched_tangents
from training.engine.passes.recompute import again_in_backward, recompute_blocks
from training.engine.passes.stand_in import StandIn
from training.objectives.private_torch import no_modes


class Passes(StandIn):
    """Run `network`, which trains on `chunks` equal parts of every batch in turn and computes in `dtype`.

    To objectives, optimiser and checkpoints it is the network, with its names, on one whole batch; images, logits,
    parameters and gradients keep their own precision. Backward computes a chunk again when it comes to it, so that the
    activations of one chunk at most exist at a time; only the engine `second_order` keeps a graph of all of them.

    Only batch norm differs: it normalises each chunk by itself and moves its running statistics once a chunk. Batches
    are stored group by group, so where `chunks` is a multiple of the groups this worker holds, what it does is the same
    on any number of workers. In eval mode, with neither a graph nor batch statistics, a batch stays whole.

    With `recompute`, the blocks of `network`, which is changed in place, keep their inputs alone, and backward computes
    each again when it comes to it, batch norm included. With chunks, too, the activations of one block of one chunk
    exist at a time. Blocks are elements of an `nn.Sequential` or `nn.ModuleList`, see `recompute.residual_blocks`;
    raises ValueError where there are fewer than two. The engine `second_order` saves less.

    With `compiled`, `torch.compile` makes one kernel of many in every training pass; nothing is recorded for forward
    mode then, in which random layers draw anew. It is for one chunk, and cannot be differentiated twice.
    """

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
        self._uncast = kept_uncast(network)
        if recompute:
            recompute_blocks(network)
        self._compiled = Compiled(self._pass) if compiled else None

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits, B×K. Raises ValueError where a batch in training does not divide into the chunks."""
        chunks = self._chunks if self.training else 1
        if len(image_BCHW) % chunks:
            raise ValueError(f"{len(image_BCHW)} images do not divide into {chunks} equal chunks")
        again = torch.is_grad_enabled() and (chunks > 1 or self._recompute)
        run = partial(again_in_backward, self._run) if again and chunks > 1 else self._run
        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        # No one keeps what is computed again (objectives/tangents.py).
        with no_modes() if again else nullcontext():
            parts = image_BCHW.chunk(chunks)
            return torch.cat([run(image_bCHW, parameters=parameters, buffers=buffers) for image_bCHW in parts])

    def _run(self, image_bCHW: Tensor, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        compiled = self._compiled if self.training else None  # evaluation has batches of many sizes
        if any(unpack_dual(value).tangent is not None for value in parameters.values()):
            values = {**parameters, **buffers}
            return (
                compiled.in_forward_mode(self._moved, image_bCHW, values)
                if compiled
                else self._moved(image_bCHW, values)
            )
        return compiled(image_bCHW, parameters, buffers) if compiled else self._pass(image_bCHW, parameters, buffers)

    def _moved(self, image_bCHW: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        # In forward mode.
        with matched_tangents(self._original):
            return self._pass(image_bCHW, values, {})

    def _pass(self, image_bCHW: Tensor, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        values = cast({**parameters, **buffers}, self._dtype, self._uncast)
        cast_bCHW = image_bCHW.to(self._dtype, memory_format=self._layout)
        return functional_call(self._original, values, (cast_bCHW,)).to(image_bCHW.dtype)
