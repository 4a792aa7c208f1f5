"""Forward mode in few kernels: short rules for the layers that take the time, on what an earlier pass computed.

Shapes: B images, C channels, and any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from training.objectives.private_torch import batch_norm_backward, batch_norm_forward, writes

LINEAR = (F.conv2d, F.linear)  # in the input, and in the weight
KEPT = (*LINEAR, F.scaled_dot_product_attention)  # of attention, autograd holds the output anyway


def capturing() -> bool:
    """Tell whether what is launched becomes part of a CUDA graph (engine/graph.py): its random state cannot be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Call:
    """Hold what a linear layer, a convolution or attention was called with, and its output where it is known."""

    layer: str
    input: torch.Size
    weight: torch.Size  # of attention, the keys
    dtype: torch.dtype
    output: Tensor | None = None  # where it is known

    def __str__(self) -> str:
        shapes = ("×".join(map(str, shape)) for shape in (self.input, self.weight))
        return f"{self.layer} ({', '.join(shapes)}, {str(self.dtype).removeprefix('torch.')})"


def call(func: Callable, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Call:
    """Describe `func(input, weight, …)` before its output is known."""
    return Call(func.__name__, input.shape, weight.shape, input.dtype)


class Recorded(TorchFunctionMode):
    """Record a pass, for forward mode to repeat: its random state and, with `keeps`, what layers gave.

    Those are the outputs of convolutions, linear layers and attention. Autograd holds what batch norm is given anyway;
    it does not hold outputs that are added to others: up to 40 % more memory for the activations of this pass.
    """

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self._keeps = keeps
        self._kept: list[tuple[Call, Tensor, int]] = []
        self._random: list[Tensor] = []

    def __enter__(self) -> Recorded:
        on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() and not capturing() else []
        self._random = [torch.get_rng_state(), *on_gpu]
        return super().__enter__()

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        out = func(*args, **(kwargs or {}))
        if self._keeps and func in KEPT:
            self._kept.append((call(func, *args, **(kwargs or {})), out.detach(), writes(out)))
        return out

    @property
    def calls(self) -> list[Call]:
        """Return the calls in order; without the output where what came after has changed it in place."""
        return [replace(call, output=out if writes(out) == before else None) for call, out, before in self._kept]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Let random layers draw inside what they drew in the pass; after it, as if nothing were drawn."""
        on_cpu, *on_gpu = self._random
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
            torch.set_rng_state(on_cpu)
            for state in on_gpu:
                torch.cuda.set_rng_state(state)
            yield


class FusedTangents(TorchFunctionMode):
    """Move layers by the short rules below, inside it and `torch.autograd.forward_ad.dual_level`.

    Attention elsewhere takes its mathematical kernel meanwhile: fused ones have no forward mode.

    `calls` are those that `Recorded` has of the same pass with the same values: their outputs are not computed again,
    which saves a third of forward mode. Raises ValueError where other layers are called, or more or fewer of them.
    """

    def __init__(self, calls: Sequence[Call] = ()) -> None:
        super().__init__()
        self._recorded, self._next = bool(calls), iter(calls)
        self._kernels = attention_kernels()
        self._mathematical = ExitStack()

    def __enter__(self) -> FusedTangents:
        self._mathematical.enter_context(sdpa_kernel(SDPBackend.MATH))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._mathematical.close()
        if raised == (None, None, None) and (missed := next(self._next, None)):
            raise _differs("nothing", missed)

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        if func in LINEAR:
            return linear(func, self._known(call(func, *args, **kwargs)), *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attention(self._known(call(func, *args, **kwargs)), self._kernels, *args, **kwargs)
        return func(*args, **kwargs)

    def _known(self, found: Call) -> Tensor | None:
        # The output of a call, by its place among the calls.
        if not self._recorded:
            return None
        expected = next(self._next, None)
        if expected is None or replace(expected, output=None) != found:
            raise _differs(found, expected or "nothing")
        return expected.output


def _differs(found: Call | str, expected: Call | str) -> ValueError:
    return ValueError(
        f"forward mode called {found} where the pass that it repeats called {expected}: "
        "a network must call the same layers in every pass"
    )


def linear(
    func: Callable[..., Tensor],
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Return `func(input, weight, bias, …)` of dual tensors, where it is linear in the input, and in weight and bias.

    Its `output` may be known already.
    """
    (x, moved_x), (kernel, moved_kernel) = unpack_dual(input), unpack_dual(weight)
    offset, moved_offset = (None, None) if bias is None else unpack_dual(bias)
    if output is None:
        output = func(x, kernel, offset, *args, **kwargs)
    tangent = None if moved_x is None else func(moved_x, kernel, None, *args, **kwargs)
    if moved_kernel is not None or moved_offset is not None:
        moved_kernel = torch.zeros_like(kernel) if moved_kernel is None else moved_kernel
        by_parameters = func(x, moved_kernel, moved_offset, *args, **kwargs)
        tangent = by_parameters if tangent is None else tangent.add_(by_parameters)
    return output if tangent is None else make_dual(output, tangent)


def attention_kernels() -> list[SDPBackend]:
    """Return the kernels that attention may take here."""
    allowed = {
        SDPBackend.MATH: cuda.math_sdp_enabled,
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
    }
    return [kernel for kernel, enabled in allowed.items() if enabled()]


def attention(
    output: Tensor | None,
    kernels: list[SDPBackend],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Return `F.scaled_dot_product_attention` of dual tensors, in memory as one of `kernels` gives it without tangents.

    The mathematical kernel, the only one with a forward mode, lays its output out in another order than fused ones, and
    random layers behind draw in the order of memory: dropout would leave out others than in the pass that is repeated.
    """
    moved = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)
    plain, tangent = unpack_dual(moved)
    if output is None and not dropout_p:  # else it draws, and has drawn
        query, key, value = (unpack_dual(one).primal for one in (query, key, value))
        attn_mask = None if attn_mask is None else unpack_dual(attn_mask).primal
        with sdpa_kernel(kernels):
            output = F.scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)
    output = plain if output is None else output
    return output if tangent is None else make_dual(output, tangent.to(output.dtype))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return `F.batch_norm` of dual tensors, with no graph.

    With x̂ the normalised input, y = γ·x̂ + β has the tangent γ·∂x̂/∂x·ẋ + (γ̇·x̂ + β̇). Batch norm's Jacobian ∂x̂/∂x is
    symmetric and within a channel, so the first part is what its backward kernel makes of ẋ; the second is batch norm
    again, by the statistics just measured.
    """
    x_BC, moved_BC = unpack_dual(input)
    gamma_C, moved_gamma_C = (None, None) if weight is None else unpack_dual(weight)
    beta_C, moved_beta_C = (None, None) if bias is None else unpack_dual(bias)
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out_BC, mean_C, scale_C = batch_norm_forward(x_BC, gamma_C, beta_C, running_mean, running_var, True, momentum, eps)
    tangent = None
    if moved_BC is not None:
        of_mine = [True, False, False]  # not the parameters' gradients
        tangent = batch_norm_backward(moved_BC, x_BC, gamma_C, None, None, mean_C, scale_C, True, eps, of_mine)[0]
    if moved_gamma_C is not None or moved_beta_C is not None:
        zero_C = torch.zeros_like(mean_C)  # a missing γ would count as 1
        gamma_C = zero_C if moved_gamma_C is None else moved_gamma_C
        beta_C = zero_C if moved_beta_C is None else moved_beta_C
        variance_C = scale_C.square().reciprocal()  # with eps
        by_parameters = batch_norm_forward(x_BC, gamma_C, beta_C, mean_C, variance_C, False, 0.0, 0.0)[0]
        tangent = by_parameters if tangent is None else tangent.add_(by_parameters)
    return out_BC if tangent is None else make_dual(out_BC, tangent)
