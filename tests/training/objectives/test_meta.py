"""The meta gradient against double backward, finite differences of its definition, and L2R as its paper writes it.

Shapes: B noisy examples, M probe examples, K classes.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from training.engine.optimiser import SgdDescent
from training.objectives.baselines.reweight import Reweight
from training.objectives.interface import Alone
from training.objectives.losses import normalised_weights
from training.objectives.meta import MetaProblem, meta_gradient
from training.objectives.registry import METHODS
from training.objectives.tangents import Recorded

ALPHA, LAMBDA0 = 0.1, 0.7
LOOKAHEADS = ["momentum", "sgd", "l2r"]


def meta_problem(problem, lookahead="momentum", probe_decay=True) -> MetaProblem:
    batch = problem.batch
    noise_BK = torch.randn(len(batch.label_B), batch.classes, generator=torch.Generator().manual_seed(1)).double()
    return MetaProblem(
        model=problem.model,
        batch=batch,
        moment=problem.moment,
        workers=Alone(),
        logits_BK=problem.model(batch.weak_BCHW),
        given_BK=F.one_hot(batch.label_B, batch.classes).double(),
        pseudo_BK=(2 * noise_BK).softmax(1),
        lambda0=LAMBDA0,
        alpha=ALPHA,
        lookahead=lookahead,
        probe_decay=probe_decay,
    )


def probe_loss_ahead(problem, given_BK, pseudo_BK, lookahead, probe_decay, omega_B, lambda_B) -> float:
    """L^p(θ'(ω, λ)) from its definition (docs/method.md, step 4), with none of the code under test."""
    moment, batch = problem.moment, problem.batch

    def logits(values, image_BCHW):
        buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
        return functional_call(problem.model, {**values, **buffers}, (image_BCHW,))

    theta = {name: value.detach().clone().requires_grad_() for name, value in problem.model.named_parameters()}
    target_BK = lambda_B[:, None] * given_BK + (1 - lambda_B[:, None]) * pseudo_BK
    inner = -(omega_B[:, None] * target_BK * torch.log_softmax(logits(theta, batch.weak_BCHW), 1)).sum()
    ahead = {}
    for (name, value), gradient in zip(theta.items(), torch.autograd.grad(inner, list(theta.values())), strict=True):
        velocity = gradient
        if lookahead != "l2r" and name in moment.descent.decayed:
            velocity = velocity + moment.descent.weight_decay * value
        if lookahead == "momentum":
            velocity = velocity + moment.descent.momentum * moment.descent.velocity[name]
        ahead[name] = (value - ALPHA * velocity).detach()
    with torch.no_grad():
        log_MK = torch.log_softmax(logits(ahead, batch.probe_MCHW), 1)
        loss = -log_MK[torch.arange(len(log_MK)), batch.probe_label_M].mean()
        if probe_decay:
            loss = loss + 0.5 * moment.descent.weight_decay * sum(
                (ahead[name] ** 2).sum() for name in moment.descent.decayed
            )
    return float(loss)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("probe_decay", [True, False])
@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_forward_mode_equals_double_backward_and_finite_differences(problem, lookahead, probe_decay):
    posed = meta_problem(problem, lookahead, probe_decay)
    omega_B, lambda_B = meta_gradient("forward", posed)
    exact_omega_B, exact_lambda_B = meta_gradient("second_order", posed)
    assert relative(omega_B, exact_omega_B) <= 1e-10
    if lookahead == "l2r":
        assert not lambda_B.any()  # ω0 = 0 hides λ
        assert not exact_lambda_B.any()
    else:
        assert relative(lambda_B, exact_lambda_B) <= 1e-10

    size, step = len(omega_B), 1e-6
    start_omega_B = torch.full((size,), 0.0 if lookahead == "l2r" else 1 / size, dtype=torch.float64)
    start_lambda_B = torch.full((size,), LAMBDA0, dtype=torch.float64)

    def slope(direction_omega_B, direction_lambda_B) -> float:
        ends = [
            probe_loss_ahead(
                problem,
                posed.given_BK,
                posed.pseudo_BK,
                lookahead,
                probe_decay,
                start_omega_B + sign * step * direction_omega_B,
                start_lambda_B + sign * step * direction_lambda_B,
            )
            for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / (2 * step)

    unit = torch.eye(size, dtype=torch.float64)
    none_B = torch.zeros(size, dtype=torch.float64)
    for i in (0, 5, 10):
        assert slope(unit[i], none_B) == pytest.approx(float(omega_B[i]), abs=1e-5 * float(omega_B.abs().max()))
        if lookahead != "l2r":
            assert slope(none_B, unit[i]) == pytest.approx(float(lambda_B[i]), abs=1e-5 * float(lambda_B.abs().max()))


def test_unequal_initial_weights_are_weighted_in_both_engines(problem):
    weight_B = torch.rand(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    posed = dataclasses.replace(meta_problem(problem), weight_B=weight_B)
    for found_B, exact_B in zip(*(meta_gradient(engine, posed) for engine in ("forward", "second_order")), strict=True):
        assert relative(found_B, exact_B) <= 1e-10
    equal_B, _ = meta_gradient("forward", meta_problem(problem.fresh()))
    assert relative(found_B, equal_B) > 1e-3


def test_lookahead_and_probe_decay_are_no_idle_switches(problem):
    answers = [
        meta_gradient("forward", meta_problem(problem.fresh(), lookahead, probe_decay))[0]
        for lookahead in LOOKAHEADS
        for probe_decay in (True, False)
    ]
    for i, first in enumerate(answers):
        assert all(relative(first, second) > 1e-4 for second in answers[i + 1 :])


@pytest.mark.parametrize("engine", ["forward", "second_order"])
def test_frozen_parameters_take_no_part(problem, engine):
    frozen = {"stem.weight", "blocks.0.norm1.weight"}
    for name, value in problem.model.named_parameters():
        value.requires_grad_(name not in frozen)
    omega_B, lambda_B = meta_gradient(engine, meta_problem(problem))
    # the same as with a momentum of any size on the frozen ones
    buffers = {name: value + 9 * (name in frozen) for name, value in problem.moment.descent.velocity.items()}
    other = problem.with_velocity(buffers)
    again_omega_B, again_lambda_B = meta_gradient(engine, meta_problem(other))
    assert omega_B.any()
    assert torch.equal(omega_B, again_omega_B)
    assert torch.equal(lambda_B, again_lambda_B)


def textbook_l2r(problem) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Ren et al. 2018, algorithm 1: −∂L^p(θ − α ∇Σ ε_i ℓ_i)/∂ε at ε = 0 is α⟨∇L^p, ∇ℓ_i⟩, example by example."""
    model, batch = problem.fresh().model, problem.batch
    theta = list(model.parameters())
    logits_MK = model(batch.probe_MCHW)
    probe = torch.autograd.grad(F.cross_entropy(logits_MK, batch.probe_label_M), theta)
    loss_B = F.cross_entropy(model(batch.weak_BCHW), batch.label_B, reduction="none")
    each = [torch.autograd.grad(loss, theta, retain_graph=True) for loss in loss_B]
    raw_B = torch.stack(
        [sum((p * g).sum() for p, g in zip(probe, gradient, strict=True)) for gradient in each]
    ).clamp_min(0)
    share_B = problem.moment.lr * raw_B / (problem.moment.lr * raw_B.sum() + 1e-5)
    gradient = [sum(w * g[j] for w, g in zip(share_B, each, strict=True)) for j in range(len(theta))]
    return share_B, gradient


def gradient_of(objective, problem):
    model = problem.fresh().model
    outcome = objective(model, problem.batch, problem.moment, Alone())
    outcome.total.backward()
    return outcome, [value.grad for value in model.parameters()]


@pytest.mark.parametrize("engine", ["forward", "second_order"])
def test_reweight_is_textbook_l2r(problem, engine):
    share_B, expected = textbook_l2r(problem)
    outcome, gradient = gradient_of(Reweight(engine=engine), problem)
    assert 0 < (share_B > 0).sum() < len(share_B)
    torch.testing.assert_close(outcome.coefficients.weight_B, share_B * len(share_B), rtol=1e-9, atol=1e-12)
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_ablation_m1_is_l2r(problem):
    flat = [torch.cat([g.flatten() for g in gradient_of(m, problem)[1]]) for m in (METHODS["M-1"](), Reweight())]
    assert F.cosine_similarity(*flat, 0) == pytest.approx(1, abs=1e-6)
    assert flat[0].norm() == pytest.approx(float(flat[1].norm()), rel=1e-2)  # up to the normalisation's epsilon


def test_weights_sum_to_the_batch_or_are_all_zero():
    raw_B = torch.tensor([0.3, -1.0, 0.1, 0.0], dtype=torch.float64)
    expected_B = 4 * torch.tensor([0.3, 0.0, 0.1, 0.0], dtype=torch.float64) / (0.4 + 1e-5)
    torch.testing.assert_close(normalised_weights(raw_B, Alone()), expected_B, rtol=1e-12, atol=0)
    assert not normalised_weights(-raw_B.abs(), Alone()).any()


class Random(torch.nn.Module):
    """Dropout twice, around a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.head = torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(torch.tanh(self.first(x)), 0.4)
        return self.head(F.dropout(torch.tanh(self.second(x)).mean((2, 3)), 0.4))


@pytest.mark.parametrize("keeps", [True, False])
def test_random_layers_draw_in_forward_mode_what_they_drew_before(keeps, problem):
    torch.manual_seed(0)
    problem = dataclasses.replace(problem.with_velocity({}), model=Random().double())
    with Recorded(keeps=keeps) as recorded:
        logits_BK = problem.model(problem.batch.weak_BCHW)
    posed = dataclasses.replace(meta_problem(problem), logits_BK=logits_BK, recorded=recorded)
    found = []
    for engine in ("forward", "second_order"):
        torch.manual_seed(1)  # trusted images are seen by the same draws
        found.append(meta_gradient(engine, posed))
    for one_B, other_B in zip(*found, strict=True):
        assert relative(one_B, other_B) < 1e-12


@dataclasses.dataclass(frozen=True)
class Uneven(SgdDescent):
    """SGD that moves every parameter in another measure: D is diagonal, and differs from the unit matrix."""

    def measure(self, value) -> torch.Tensor:
        return torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).view_as(value)

    def look_ahead(self, values, gradients, rate, *, momentum=True):
        moved = [self.measure(gradient) * gradient for gradient in gradients]
        return super().look_ahead(values, moved, rate, momentum=momentum)

    def pull_back(self, direction, gradients, *, momentum=True):
        return {name: self.measure(value) * value for name, value in direction.items()}


@pytest.mark.parametrize("scope", ["all", "last_block", "last_layer"])
def test_forward_mode_is_exact_for_an_optimiser_that_scales_gradients(problem, scope):
    held = problem.moment.descent
    moment = dataclasses.replace(problem.moment, descent=Uneven(**vars(held)))
    posed = dataclasses.replace(meta_problem(dataclasses.replace(problem, moment=moment)), scope=scope)
    found = [meta_gradient(engine, posed) for engine in ("forward", "second_order")]
    plain_B, _ = meta_gradient("forward", dataclasses.replace(meta_problem(problem.fresh()), scope=scope))
    for found_B, exact_B in zip(*found, strict=True):
        assert relative(found_B, exact_B) <= 1e-10
    assert relative(found[0][0], plain_B) > 1e-2
