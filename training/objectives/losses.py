"""The small formulas that objectives share.

Shapes: B examples, K classes, n groups of R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from training.objectives.interface import Coefficients, Workers


def cross_entropy(target_BK: Tensor, logits_BK: Tensor) -> Tensor:
    """Cross-entropy of each example with a soft target, B."""
    return -(target_BK * F.log_softmax(logits_BK, 1)).sum(1)


def kl_divergence(from_BK: Tensor, to_BK: Tensor) -> Tensor:
    """KL(softmax(from) ‖ softmax(to)) of each example, B (eq. 4)."""
    log_from_BK, log_to_BK = F.log_softmax(from_BK, 1), F.log_softmax(to_BK, 1)
    return (log_from_BK.exp() * (log_from_BK - log_to_BK)).sum(1)


def sharpen(probability_BK: Tensor, temperature: float) -> Tensor:
    """Probabilities to the power 1/τ, normalised (eq. 3)."""
    powered_BK = probability_BK ** (1 / temperature)
    return powered_BK / powered_BK.sum(1, keepdim=True)


def logit_norm(blocks: Sequence[Tensor], workers: Workers) -> list[Tensor]:
    """Each block divided by its root mean square over all its entries, on all workers (the authors' code)."""
    mean_squares = workers.mean([block.square().mean() for block in blocks])
    return [block * torch.rsqrt(square + 1e-8) for block, square in zip(blocks, mean_squares, strict=True)]


def forward_aside(model: nn.Module, image_BCHW: Tensor) -> Tensor:
    """Logits in the model's own mode with its batch-norm running statistics left untouched."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, buffers, (image_BCHW,))


def mixing_draws(
    group_keys: Sequence[int], rows: int, *, fold: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mixup partners and factors of n groups of R rows: partner_nR (a permutation within each group) and beta_nR.

    β ~ Beta(0.5, 0.5), one a pair; `fold` takes max(β, 1−β). Counter-based: only the key decides.
    """
    partner_nR = np.empty((len(group_keys), rows), np.int64)
    beta_nR: np.ndarray = np.empty((len(group_keys), rows))
    for group, key in enumerate(group_keys):
        rng = np.random.Generator(np.random.Philox(key=key))
        partner_nR[group] = rng.permutation(rows)
        beta_nR[group] = rng.beta(0.5, 0.5, rows)
    if fold:
        beta_nR = np.maximum(beta_nR, 1 - beta_nR)
    return torch.from_numpy(partner_nR).to(device), torch.from_numpy(beta_nR).to(device, dtype)


def mix(x_nR: Tensor, partner_nR: Tensor, beta_nR: Tensor) -> Tensor:
    """β·x + (1−β)·x[partner] of each row, within its group; x may have any trailing shape (eq. 9)."""
    groups = torch.arange(len(x_nR), device=x_nR.device)[:, None]
    beta = beta_nR.reshape(*beta_nR.shape, *[1] * (x_nR.dim() - 2))
    return beta * x_nR + (1 - beta) * x_nR[groups, partner_nR]


def plain_coefficients(logits_BK: Tensor, label_B: Tensor, weight_B: Tensor | None = None) -> Coefficients:
    """The ledger rows of an objective that believes every label; the pseudo label is the model's own answer."""
    logits_BK = logits_BK.detach()
    loss_B = F.cross_entropy(logits_BK, label_B, reduction="none")
    confidence_B, pseudo_label_B = logits_BK.softmax(1).max(1)
    ones_B = torch.ones_like(loss_B)
    return Coefficients(ones_B if weight_B is None else weight_B, ones_B, pseudo_label_B, confidence_B, loss_B)
