"""The small formulas that objectives share.

Shapes: B noisy examples, M probe examples, K classes, n groups of R rows, N = n·R, images C×H×W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from training.objectives.interface import Batch, Coefficients, Workers


def cross_entropy(target_BK: Tensor, logits_BK: Tensor) -> Tensor:
    """Return the cross-entropy of each example with a soft target, B."""
    return F.cross_entropy(logits_BK, target_BK, reduction="none")


def corrected_cross_entropy(logits_BK: Tensor, transition_KK: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (−log Σ_i p_i T_iy, the share of i = y in that sum), B each, where T_ij = P(label j | class i).

    The first is cross-entropy of the noisy label ("forward" correction: Patrini et al. 2017, theorem 2), the second the
    posterior probability that the label is right.
    """
    joint_BK = F.log_softmax(logits_BK, 1) + transition_KK.T[label_B].clamp_min(1e-12).log()
    return -joint_BK.logsumexp(1), joint_BK.softmax(1).gather(1, label_B[:, None])[:, 0]


def kl_divergence(from_BK: Tensor, to_BK: Tensor) -> Tensor:
    """Return KL(softmax(from) ‖ softmax(to)) of each example, B (eq. 4)."""
    log_from_BK, log_to_BK = F.log_softmax(from_BK, 1), F.log_softmax(to_BK, 1)
    return (log_from_BK.exp() * (log_from_BK - log_to_BK)).sum(1)


def sharpen(probability_BK: Tensor, temperature: float) -> Tensor:
    """Return probabilities to the power 1/τ, normalised (eq. 3)."""
    powered_BK = probability_BK ** (1 / temperature)
    return powered_BK / powered_BK.sum(1, keepdim=True)


def logit_norm(passes: Sequence[Tensor], workers: Workers) -> list[Tensor]:
    """Divide each pass's logits by their root mean square over all entries, on all workers (the authors' code)."""
    mean_squares = workers.mean([logits.square().mean() for logits in passes])
    return [logits * torch.rsqrt(square + 1e-8) for logits, square in zip(passes, mean_squares, strict=True)]


def normalised_weights(raw_B: Tensor, workers: Workers) -> Tensor:
    """Return the positive parts of `raw_B` over (their sum + 1e-5), relative to 1/B of the global batch.

    All-negative input gives all-zero weights (docs/method.md, "One training step", step 4).
    """
    positive_B = raw_B.clamp_min(0)
    mean = workers.mean([positive_B.mean()])[0]
    return positive_B / (mean + 1e-5 / (len(raw_B) * workers.size))


def forward_aside(model: nn.Module, image_BCHW: Tensor) -> Tensor:
    """Return logits in the model's own mode, and leave its batch-norm running statistics as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, buffers, (image_BCHW,))


class _Settled(torch.autograd.Function):
    """Hold a loss whose gradients are known; backward goes through it once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters_and_gradients: Tensor | None) -> Tensor:
        ctx.gradients = parameters_and_gradients[len(parameters_and_gradients) // 2 :]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()
        scaled = [None if gradient is None else slope[0] * gradient for gradient in gradients]
        return None, *scaled, *[None] * len(gradients)


def settled(loss: Tensor, model: nn.Module) -> Tensor:
    """Return the loss with its gradients in the model's parameters, its backward pass done, its graph freed.

    What is forwarded next then finds the memory of these activations free. An affine network has none: its loss is
    returned as it is, and the graphs of its logits stay.
    """
    if is_affine(model):
        return loss
    parameters = [value for value in model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return _Settled.apply(loss.detach(), *parameters, *gradients)


def split_probe(batch: Batch, share: float) -> tuple[Batch, Batch]:
    """Return the batch with the first trusted images of each group, at least one, and with the others.

    Whose they are does not depend on the number of workers.
    """
    image_nRCHW, label_nR = (
        x.unflatten(0, (len(batch.group_keys), -1)) for x in (batch.probe_MCHW, batch.probe_label_M)
    )
    first = max(1, round(share * label_nR.shape[1]))

    def part(rows: slice) -> Batch:
        image_MCHW = image_nRCHW[:, rows].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return replace(batch, probe_MCHW=image_MCHW, probe_label_M=label_nR[:, rows].flatten())

    return part(slice(first)), part(slice(first, None))


def one_hot(label_B: Tensor, like_BK: Tensor) -> Tensor:
    """Return labels as probabilities, B×K, of the type of `like_BK`."""
    # F.one_hot looks at the labels on the host.
    return like_BK.new_zeros(len(label_B), like_BK.shape[1]).scatter_(1, label_B[:, None], 1)


def mixing_draws(
    group_keys: Sequence[int],
    rows: int,
    *,
    fold: bool,
    dtype: torch.dtype,
    device: torch.device,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Draw mixup for n groups of R rows: partner_nR (a permutation within each group) and beta_nR.

    β ~ Beta(α, α), one a pair; `fold` takes max(β, 1−β). Counter-based: only the key decides.
    """
    partner_nR = np.empty((len(group_keys), rows), np.int64)
    beta_nR: np.ndarray = np.empty((len(group_keys), rows))
    for group, key in enumerate(group_keys):
        rng = np.random.Generator(np.random.Philox(key=key))
        partner_nR[group] = rng.permutation(rows)
        beta_nR[group] = rng.beta(alpha, alpha, rows)
    if fold:
        beta_nR = np.maximum(beta_nR, 1 - beta_nR)
    partner, beta = (torch.from_numpy(array).to(device, non_blocking=True) for array in (partner_nR, beta_nR))
    return partner, beta.to(dtype)


def mix(x_nR: Tensor, partner_nR: Tensor, beta_nR: Tensor) -> Tensor:
    """Return β·x + (1−β)·x[partner] of each row, within its group; x may have any trailing shape (eq. 9)."""
    groups = torch.arange(len(x_nR), device=x_nR.device)[:, None]
    beta = beta_nR.reshape(*beta_nR.shape, *[1] * (x_nR.dim() - 2))
    return beta * x_nR + (1 - beta) * x_nR[groups, partner_nR]


def pool_draws(batch: Batch, *, alpha: float = 0.5, fold: bool = True) -> tuple[Tensor, Tensor]:
    """Return `mixing_draws` of the pools that `mixed_pass` mixes."""
    image = batch.probe_MCHW
    rows = (len(batch.probe_label_M) + 2 * len(batch.label_B)) // len(batch.group_keys)
    return mixing_draws(batch.group_keys, rows, fold=fold, dtype=image.dtype, device=image.device, alpha=alpha)


@dataclass(frozen=True)
class Mixed:
    """Hold the rows of a joint pass, by the first of each pair: trusted images, and both views of noisy ones."""

    probe_logits: Tensor  # M×K
    probe_target: Tensor
    noisy_logits: Tensor  # 2B×K: weak and strong of the first group, then of the next
    noisy_target: Tensor


class Affine(nn.Linear):
    """Be a network's only layer but `nn.Flatten`."""


def is_affine(model: nn.Module) -> bool:
    """Tell whether a network's logits of a mixture are the mixture of its logits."""
    return any(isinstance(module, Affine) for module in model.children())


def mixed_pass(
    model: nn.Module,
    batch: Batch,
    label_BK: Tensor,
    *,
    alpha: float = 0.5,
    fold: bool = True,
    mixes: bool = True,
    views: Sequence[Tensor] = (),
) -> Mixed:
    """Pass once, aside, over the pool [probe | weak | strong] of each group, each row mixed with another (eq. 9).

    `label_BK` are the targets of both views of the noisy examples. Of an affine network the logits are mixed instead:
    those of both views, which may be known already, with their graphs, as `views`.
    """
    n = len(batch.group_keys)

    def grouped(probe: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        return torch.cat([x.reshape(n, -1, *x.shape[1:]) for x in (probe, weak, strong)], 1)

    mixes_logits = is_affine(model)
    seen = (batch.probe_MCHW, batch.weak_BCHW, batch.strong_BCHW)
    if mixes_logits:
        weak_BK, strong_BK = views or [forward_aside(model, view_BCHW) for view_BCHW in seen[1:]]
        seen = (forward_aside(model, batch.probe_MCHW), weak_BK, strong_BK)
    pool_nR = grouped(*seen)  # images C×H×W, or logits K
    target_nRK = grouped(one_hot(batch.probe_label_M, label_BK), label_BK, label_BK)
    rows, probes = pool_nR.shape[1], len(batch.probe_label_M) // n
    if mixes:
        draws = batch.drawn or pool_draws(batch, alpha=alpha, fold=fold)
        pool_nR, target_nRK = mix(pool_nR, *draws), mix(target_nRK, *draws)
    if mixes_logits:
        logits_nRK = pool_nR
    else:
        # Mixing has laid the images out channel by channel; all others are stored channels last, as convolutions like.
        image_NCHW = pool_nR.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        logits_nRK = forward_aside(model, image_NCHW).unflatten(0, (n, rows))
    of_probe, of_noisy = slice(probes), slice(probes, None)
    return Mixed(
        logits_nRK[:, of_probe].flatten(0, 1),
        target_nRK[:, of_probe].flatten(0, 1),
        logits_nRK[:, of_noisy].flatten(0, 1),
        target_nRK[:, of_noisy].flatten(0, 1),
    )


def plain_coefficients(
    logits_BK: Tensor, label_B: Tensor, weight_B: Tensor | None = None, trust_B: Tensor | None = None
) -> Coefficients:
    """Return ledger rows with the model's own answer as pseudo label; weight and trust are 1 where not given."""
    logits_BK = logits_BK.detach()
    loss_B = F.cross_entropy(logits_BK, label_B, reduction="none")
    confidence_B, pseudo_label_B = logits_BK.softmax(1).max(1)
    ones_B = torch.ones_like(loss_B)
    return Coefficients(
        ones_B if weight_B is None else weight_B.detach(),
        ones_B if trust_B is None else trust_B.detach(),
        pseudo_label_B,
        confidence_B,
        loss_B,
    )
