"""The meta gradient through every optimiser's own next update, in the middle of training: networks × optimisers.

Forward mode against double backward through the same update, and against central differences of the probe loss, in
float64, after real updates.

Shapes: B noisy examples, M probe examples, K classes.
"""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.engine import networks
from training.engine.adamw import AdamW
from training.engine.clipping import Clipped
from training.engine.layers import Scaled
from training.engine.optimiser import Sgd, kernels
from training.objectives.interface import Alone, Batch, Moment
from training.objectives.meta import MetaProblem, meta_gradient

ALPHA, LAMBDA0, CLASSES, SIZE = 0.03, 0.7, 4, 32


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES
    )


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), num_classes=CLASSES)


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=CLASSES)


NETWORKS = {
    "wrn": lambda: networks.build("wrn-10-1", 3, CLASSES, seed=3),
    "resnet": resnet,
    "vit": vit,
    "convnext": convnext,
}
OPTIMISERS = {
    "sgd": lambda model: Sgd(model, nn.Module(), momentum=0.9, weight_decay=0.03, decays=kernels),
    "adamw": lambda model: AdamW(model, nn.Module(), momentum=0.9, weight_decay=0.05, decays=kernels, beta2=0.99),
    "adamw clipped": lambda model: Clipped(
        AdamW(model, nn.Module(), momentum=0.9, weight_decay=0.05, decays=kernels, beta2=0.99),
        list(model.parameters()),
        norm=0.5,
    ),
    "adamw by layer": lambda model: Scaled(
        AdamW(model, nn.Module(), momentum=0.9, weight_decay=0.05, decays=kernels, beta2=0.99),
        model,
        {name: 0.8**place for place, name in enumerate(dict(model.named_parameters()))},
    ),
}


def posed(network: str, optimiser: str, lookahead: str) -> MetaProblem:
    """A meta step after three updates on the batch before it."""
    rng = torch.Generator().manual_seed(7)
    torch.manual_seed(3)
    model = NETWORKS[network]().double().train()

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, 3, SIZE, SIZE, generator=rng, dtype=torch.float64)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(CLASSES, (count,), generator=rng)

    updates = OPTIMISERS[optimiser](model)
    for _ in range(3):
        updates.zero_grad()
        F.cross_entropy(model(images(6)), labels(6)).backward()
        updates.update(ALPHA if optimiser == "sgd" else ALPHA / 10)
    updates.zero_grad()
    weak_BCHW, label_B = images(6), labels(6)
    batch = Batch(
        weak_BCHW=weak_BCHW,
        strong_BCHW=weak_BCHW,
        label_B=label_B,
        row_B=torch.arange(6),
        probe_MCHW=images(5),
        probe_label_M=labels(5),
        group_keys=(1,),
        classes=CLASSES,
    )
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
        logits_BK = model(weak_BCHW)
    return MetaProblem(
        model=model,
        batch=batch,
        moment=Moment(ALPHA, updates.descent()),
        workers=Alone(),
        logits_BK=logits_BK,
        given_BK=F.one_hot(label_B, CLASSES).double(),
        pseudo_BK=torch.randn(6, CLASSES, generator=rng, dtype=torch.float64).softmax(1),
        lambda0=LAMBDA0,
        alpha=ALPHA,
        lookahead=lookahead,
        probe_decay=True,
    )


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("lookahead", ["momentum", "sgd"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_forward_mode_equals_double_backward(network, optimiser, lookahead):
    problem = posed(network, optimiser, lookahead)
    omega_B, lambda_B = meta_gradient("forward", problem)
    with sdpa_kernel(SDPBackend.MATH):
        exact_omega_B, exact_lambda_B = meta_gradient("second_order", problem)
    assert relative(omega_B, exact_omega_B) <= 1e-10
    assert relative(lambda_B, exact_lambda_B) <= 1e-10


@pytest.mark.parametrize("engine", ["forward", "second_order"])
def test_a_parameter_that_is_not_used_changes_nothing(engine, monkeypatch):
    def idle() -> nn.Module:
        model = NETWORKS["wrn"]()
        model.idle = nn.Linear(2, 2)
        return model

    expected = meta_gradient(engine, posed("wrn", "sgd", "momentum"))
    monkeypatch.setitem(NETWORKS, "idle", idle)
    for found_B, expected_B in zip(meta_gradient(engine, posed("idle", "sgd", "momentum")), expected, strict=True):
        torch.testing.assert_close(found_B, expected_B, rtol=1e-12, atol=0)


def probe_loss_ahead(problem: MetaProblem, optimiser: str, omega_B, lambda_B) -> float:
    """The probe loss after the optimiser's own update on the weighted loss: nothing looks ahead here."""
    model, batch = problem.model, problem.batch

    def logits(values, image_BCHW):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, {**values, **buffers}, (image_BCHW,))

    theta = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    target_BK = lambda_B[:, None] * problem.given_BK + (1 - lambda_B[:, None]) * problem.pseudo_BK
    inner = -(omega_B[:, None] * target_BK * logits(theta, batch.weak_BCHW).log_softmax(1)).sum()
    gradients = torch.autograd.grad(inner, list(theta.values()))
    with torch.no_grad():
        values = {name: value.detach() for name, value in theta.items()}
        ahead = problem.moment.descent.look_ahead(values, gradients, ALPHA)
        log_MK = logits(ahead, batch.probe_MCHW).log_softmax(1)
        loss = -log_MK[torch.arange(len(log_MK)), batch.probe_label_M].mean()
        return float(loss + problem.moment.descent.penalty(ahead))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("network", ["wrn", "vit"])
def test_forward_mode_agrees_with_central_differences(network, optimiser):
    problem = posed(network, optimiser, "momentum")
    found = dict(zip(("omega", "lambda"), meta_gradient("forward", problem), strict=True))
    start = {"omega": torch.full((6,), 1 / 6).double(), "lambda": torch.full((6,), LAMBDA0).double()}
    for which in ("omega", "lambda"):
        direction_B = torch.randn(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        step, ends = 1e-7, []  # AdamW moves weights of small gradients far: the loss is straight on small steps alone
        for sign in (1, -1):
            moved = start | {which: start[which] + sign * step * direction_B}
            ends.append(probe_loss_ahead(problem, optimiser, moved["omega"], moved["lambda"]))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(float(found[which] @ direction_B) - slope) <= 1e-6 * max(abs(slope), float(found[which].norm()))


def test_the_lookahead_is_the_optimiser_s_own_update():
    """What the meta step sees ahead of AdamW with clipped gradients is what the update then does."""
    problem = posed("vit", "adamw clipped", "momentum")
    model = problem.model
    updates = OPTIMISERS["adamw clipped"](model)
    for value in model.parameters():
        value.grad = torch.randn_like(value)
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    ahead = updates.descent().look_ahead(values, [value.grad for value in model.parameters()], ALPHA)
    updates.update(ALPHA)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), ahead[name], rtol=1e-12, atol=1e-13)


def test_another_precision_keeps_the_numbers():
    descent = posed("wrn", "adamw clipped", "momentum").moment.descent
    half = descent.to(torch.float32)
    assert {value.dtype for value in half.inner.mean.values()} == {torch.float32}
    assert dataclasses.replace(half, inner=descent.inner) == descent
