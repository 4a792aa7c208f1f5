"""A pass through torch.compile, in forward mode too.

Shapes: b images of C channels and H×W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual

from training.objectives.private_torch import (
    compiled_operations,
    keep_graphs_of_compiled_passes,
    without_innermost_mode,
)

BACKEND = "inductor"  # of torch.compile

Values = Mapping[str, Tensor]


class Compiled:
    """Compute `run(image_bCHW, parameters, buffers)` in few kernels; a copy compiles its own."""

    def __init__(self, run: Callable[[Tensor, Values, Values], Tensor]) -> None:
        self.run = run
        self._compiled: Any = None
        self._moved: dict[tuple[Any, ...], Callable[..., Any]] = {}
        keep_graphs_of_compiled_passes()  # the weak pass's graph is gone through twice

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_moved": {}}

    def __call__(self, image_bCHW: Tensor, parameters: Values, buffers: Values) -> Tensor:
        """Return logits, b×K."""
        self._compiled = self._compiled or torch.compile(self.run, backend=BACKEND, dynamic=False)
        with without_innermost_mode():  # one that watches would become part of what is compiled
            return self._compiled(image_bCHW, parameters, buffers)

    def in_forward_mode(self, run: Callable[[Tensor, Values], Tensor], image_bCHW: Tensor, values: Values) -> Tensor:
        """Return dual logits, b×K, as `run` makes them of the image and dual values.

        torch.compile cannot look into forward mode. But below autograd that is operations like any other, so those are
        written down once, and compiled.
        """
        from torch.fx.experimental.proxy_tensor import make_fx

        pairs = {name: unpack_dual(value) for name, value in values.items()}
        moving = [name for name, pair in pairs.items() if pair.tangent is not None]

        def moved(image_bCHW: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
            values = dict(zip(pairs, held, strict=False))
            tangents = zip(moving, held[len(pairs) :], strict=True)
            values |= {name: make_dual(values[name], tangent) for name, tangent in tangents}
            return tuple(unpack_dual(run(image_bCHW, values)))

        held = [pair.primal for pair in pairs.values()] + [pairs[name].tangent for name in moving]
        key = (image_bCHW.shape, *moving)
        if key not in self._moved:
            operations = make_fx(moved)(image_bCHW, *held)
            with without_innermost_mode():
                self._moved[key] = compiled_operations(BACKEND, operations, [image_bCHW, *held])
        with without_innermost_mode():
            return make_dual(*self._moved[key](image_bCHW, *held))
