"""Forward mode as fast as backward mode: a short rule for batch norm, which PyTorch's own spreads over many kernels.

Shapes: B images, C channels, and any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.overrides import TorchFunctionMode


class FusedTangents(TorchFunctionMode):
    """Inside it, and inside `torch.autograd.forward_ad.dual_level`, `F.batch_norm` is `batch_norm` below."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        return (batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


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
    """`F.batch_norm` of dual tensors, with no graph.

    With x̂ the normalised input, y = γ·x̂ + β has the tangent γ·∂x̂/∂x·ẋ + (γ̇·x̂ + β̇). Batch norm's Jacobian ∂x̂/∂x is
    symmetric and within a channel, so the first part is what its backward kernel makes of ẋ; the second is batch norm
    again, by the statistics just measured.
    """
    x_BC, moved_BC = unpack_dual(input)
    gamma_C, moved_gamma_C = (None, None) if weight is None else unpack_dual(weight)
    beta_C, moved_beta_C = (None, None) if bias is None else unpack_dual(bias)
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out_BC, mean_C, scale_C = torch.native_batch_norm(
        x_BC, gamma_C, beta_C, running_mean, running_var, True, momentum, eps
    )
    tangents = []
    if moved_BC is not None:
        of_mine = [True, False, False]  # not the parameters' gradients
        tangents += torch.ops.aten.native_batch_norm_backward(
            moved_BC, x_BC, gamma_C, None, None, mean_C, scale_C, True, eps, of_mine
        )[:1]
    if moved_gamma_C is not None or moved_beta_C is not None:
        zero_C = torch.zeros_like(mean_C)  # a missing γ would count as 1
        gamma_C = zero_C if moved_gamma_C is None else moved_gamma_C
        beta_C = zero_C if moved_beta_C is None else moved_beta_C
        variance_C = scale_C.square().reciprocal()  # with eps
        tangents += torch.native_batch_norm(x_BC, gamma_C, beta_C, mean_C, variance_C, False, 0.0, 0.0)[:1]
    return make_dual(out_BC, sum(tangents)) if tangents else out_BC
