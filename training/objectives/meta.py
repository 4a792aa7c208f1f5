"""The meta gradient: how the probe loss after one lookahead step changes with each example's weight and label trust.

Two engines with one signature, both exact: forward mode, and second order. With v = ∇L^p(θ')
and t = J_θΦ(weak)·v, the first does without a second-order graph (docs/method.md), since θ' is affine in ω and λ:

    ∂L^p/∂ω_i = −α (q_i − P_i)·t_i        ∂L^p/∂λ_i = −α ω0 (g_i − y_i)·t_i

where θ are all parameters, or those of the last layers alone: then nothing before them is computed again.

Shapes: B noisy examples, M probe examples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call

from training.objectives.interface import Batch, Moment, Workers
from training.objectives.losses import cross_entropy
from training.objectives.memory import classifier, outer_blocks
from training.objectives.tangents import FusedTangents, Recorded

Engine = Literal["forward", "second_order"]
Lookahead = Literal["momentum", "sgd", "l2r"]
MetaScope = Literal["all", "last_block", "last_layer"]


@dataclass(frozen=True)
class MetaProblem:
    """Hold one meta step: `logits_BK` carry the graph of the weak pass, `given_BK` and `pseudo_BK` are constants."""

    model: nn.Module
    batch: Batch
    moment: Moment
    workers: Workers
    logits_BK: Tensor
    given_BK: Tensor  # one-hot noisy labels y
    pseudo_BK: Tensor  # pseudo labels g
    lambda0: float
    alpha: float  # step size of the lookahead
    lookahead: Lookahead  # "l2r": ω0 = 0, so that θ' = θ
    probe_decay: bool  # weight decay on θ' in the meta loss
    weight_B: Tensor | float = 1.0  # the initial weight of each example, relative to ω0
    # What the lookahead descends where that is more than the mean of ω·CE(P, a); not for second order.
    inner_loss: Tensor | None = None
    scope: MetaScope = "all"  # which parameters the lookahead moves, and the meta gradient goes through
    recorded: Recorded | None = None  # the weak pass: what is known of it is not computed, and not drawn, again

    def __post_init__(self) -> None:
        if self.inner_loss is not None and self.scope != "all":
            raise ValueError("inner_loss goes with scope all: otherwise the lookahead descends ω·CE(P, a) alone")

    @property
    def omega0(self) -> float:
        """Return 1/B of the global batch, or 0 for "l2r"."""
        return 0.0 if self.lookahead == "l2r" else 1 / (len(self.logits_BK) * self.workers.size)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters θ in the scope, by name."""
        held = parameters_of(self.model, self.scope, self.batch.classes)
        return {name: value for name, value in held.items() if value.requires_grad}

    def target(self, trust_B1: Tensor | float) -> Tensor:
        """Return P(λ) = λ·y + (1−λ)·g, B×K (eq. 5)."""
        return trust_B1 * self.given_BK + (1 - trust_B1) * self.pseudo_BK


def parameters_of(model: nn.Module, scope: MetaScope, classes: int) -> dict[str, Tensor]:
    """Return the parameters in a scope, by name.

    "last_layer" is the last linear layer with K outputs; "last_block" the last of its `memory.outer_blocks`, and all
    that comes after it. Raises ValueError where there is none.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if scope == "all":
        return parameters
    if scope == "last_layer":
        kept = {id(value) for value in classifier(model, classes).parameters()}
        return {name: value for name, value in parameters.items() if id(value) in kept}
    last = outer_blocks(model)[-1:]
    if not last:
        raise ValueError("this network has no nn.Sequential of blocks: set objective.meta_scope to all or last_layer")
    names = list(parameters)
    first = next(place for place, name in enumerate(names) if name.startswith(f"{last[0]}."))
    return {name: parameters[name] for name in names[first:]}


def meta_gradient(engine: Engine, problem: MetaProblem) -> tuple[Tensor, Tensor]:
    """Return (∂L^p/∂ω_B, ∂L^p/∂λ_B) at ω0, λ0, exactly: by "forward" mode, or by "second_order"."""
    if engine == "second_order":
        return _second_order(problem)
    slope_BK = logit_slope(problem)
    with torch.no_grad():
        residual_BK = problem.logits_BK.softmax(1) - problem.target(problem.lambda0)
        change_BK = problem.pseudo_BK - problem.given_BK
        return (
            -problem.alpha * (residual_BK * slope_BK).sum(1),
            -problem.alpha * problem.omega0 * problem.weight_B * (change_BK * slope_BK).sum(1),
        )


def logit_slope(problem: MetaProblem) -> Tensor:
    """Return t = J_θΦ(weak)·∇L^p(θ'), B×K: how the logits would rise along the probe loss after the lookahead."""
    theta = problem.parameters
    if problem.scope != "all":
        return _backward_twice(problem, theta)
    direction = _direction(problem, theta, _inner_gradient(problem, theta))
    return _forward_mode(problem, theta, direction)


def unit(gradient: Tensor, workers: Workers) -> Tensor:
    """Divide a gradient by its root mean square in the global batch: SGD then takes steps of a size, as Adam does."""
    return gradient / workers.mean([gradient.square().mean()])[0].sqrt().clamp_min(1e-30)


def _inner_gradient(problem: MetaProblem, theta: Mapping[str, Tensor]) -> list[Tensor] | None:
    """Return ∇_θ Σ ω·CE(P, a) over the global batch; the weak pass's graph is kept for the final loss."""
    if problem.lookahead == "l2r":
        return None
    loss = problem.inner_loss
    if loss is None:
        loss = (problem.weight_B * cross_entropy(problem.target(problem.lambda0), problem.logits_BK)).mean()
    # Parameters that the network does not use have a gradient of 0, here and below.
    gradients = torch.autograd.grad(loss, list(theta.values()), retain_graph=True, materialize_grads=True)
    return problem.workers.mean(gradients)


def _looked_ahead(
    problem: MetaProblem, theta: Mapping[str, Tensor], gradients: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Return θ', where the optimiser's own next update with step size α would go (step 4)."""
    if gradients is None:
        return dict(theta)
    momentum = problem.lookahead == "momentum"
    return problem.moment.descent.look_ahead(theta, gradients, problem.alpha, momentum=momentum)


def _probe_loss(problem: MetaProblem, ahead: Mapping[str, Tensor]) -> Tensor:
    """Return this worker's mean cross-entropy on its probe batch at θ', batch norm in train mode."""
    buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    fixed = {name: value.detach() for name, value in problem.model.named_parameters()}  # what is not in the scope
    logits_MK = functional_call(problem.model, {**fixed, **ahead, **buffers}, (problem.batch.probe_MCHW,))
    return F.cross_entropy(logits_MK, problem.batch.probe_label_M)


def _probe_gradient(problem: MetaProblem, ahead: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return v = ∇_θ' L^p(θ'), averaged over the workers."""
    leaves = {name: value.detach().requires_grad_() for name, value in ahead.items()}
    gradients = torch.autograd.grad(_probe_loss(problem, leaves), list(leaves.values()), materialize_grads=True)
    direction = dict(zip(leaves, problem.workers.mean(gradients), strict=True))
    if not problem.probe_decay:
        return direction
    with torch.no_grad():
        return problem.moment.descent.add_penalty(direction, ahead)


def _direction(
    problem: MetaProblem, theta: Mapping[str, Tensor], gradients: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Return Dᵀv: L^p(θ') changes with the inner gradients by −α·Dᵀv. For SGD that is v."""
    direction = _probe_gradient(problem, _looked_ahead(problem, theta, gradients))
    if gradients is None:
        return direction
    momentum = problem.lookahead == "momentum"
    with torch.no_grad():
        return problem.moment.descent.pull_back(direction, gradients, momentum=momentum)


def _forward_mode(problem: MetaProblem, theta: Mapping[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    """Return t = J_θΦ(weak)·v exactly, B×K, without a graph."""
    recorded = problem.recorded
    # Fresh clones of the buffers: forward mode cannot update them in place, and the statistics must not move again.
    buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    with (
        torch.no_grad(),
        dual_level(),
        FusedTangents(recorded.calls if recorded else ()),
        recorded.replayed() if recorded else nullcontext(),
    ):
        moving = {name: make_dual(value.detach(), direction[name]) for name, value in theta.items()}
        return unpack_dual(functional_call(problem.model, {**moving, **buffers}, (problem.batch.weak_BCHW,))).tangent


def _backward_twice(problem: MetaProblem, theta: Mapping[str, Tensor]) -> Tensor:
    """Return t exactly, B×K, by the graph that the weak pass has left: Jᵀu is linear in u, and t = ∂⟨Jᵀu, v⟩/∂u.

    Through whole networks this takes longer than forward mode, through batch norm above all (docs/log.md).
    """
    residual_BK = problem.logits_BK.detach().softmax(1) - problem.target(problem.lambda0)
    weight_B = problem.weight_B
    weight_B1 = weight_B[:, None] if isinstance(weight_B, Tensor) else weight_B
    u_BK = (weight_B1 * residual_BK / len(residual_BK)).requires_grad_()  # of the inner loss
    gradients = torch.autograd.grad(problem.logits_BK, list(theta.values()), u_BK, create_graph=True)
    inner = None
    if problem.lookahead != "l2r":
        inner = problem.workers.mean([gradient.detach() for gradient in gradients])
    direction = _direction(problem, theta, inner)
    return torch.autograd.grad(gradients, u_BK, list(direction.values()))[0]


def _second_order(problem: MetaProblem) -> tuple[Tensor, Tensor]:
    """Backpropagate through the lookahead step: the oracle, with a graph of the gradient."""
    if problem.inner_loss is not None:
        raise ValueError("second_order knows no inner_loss: use engine forward")
    theta, size = problem.parameters, len(problem.logits_BK)
    omega_B = (problem.logits_BK.new_full((size,), problem.omega0) * problem.weight_B).requires_grad_()
    lambda_B = problem.logits_BK.new_full((size,), problem.lambda0, requires_grad=True)
    loss_B = cross_entropy(problem.target(lambda_B[:, None]), problem.logits_BK)
    # The workers' mean of this is Σ ω·CE over the global batch.
    inner = problem.workers.size * (omega_B * loss_B).sum()
    gradients = torch.autograd.grad(inner, list(theta.values()), create_graph=True, materialize_grads=True)
    averaged = problem.workers.mean(gradients)
    if problem.lookahead == "l2r":  # no decay and no momentum: only ω moves θ', from 0
        ahead = {n: v - problem.alpha * g for (n, v), g in zip(theta.items(), averaged, strict=True)}
    else:
        ahead = _looked_ahead(problem, theta, averaged)
    loss = _probe_loss(problem, ahead)
    if problem.probe_decay:
        loss = loss + problem.moment.descent.penalty(ahead)
    gradients_B = torch.autograd.grad(loss, (omega_B, lambda_B), retain_graph=True)
    # Autograd sees the sum of the workers' probe losses; L^p is their mean.
    return gradients_B[0] / problem.workers.size, gradients_B[1] / problem.workers.size
