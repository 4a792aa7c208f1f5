"""MW-Net and MLC: the gradient that forward mode gives their second networks, against double backward.

Shapes: B noisy examples, K classes, D features.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from training.objectives.baselines.meta_label_correction import MetaLabelCorrection
from training.objectives.baselines.meta_weight_net import MetaWeightNet
from training.objectives.interface import Alone
from training.objectives.memory import with_features

EXAMPLES = 40


def logits_with(model, values, image_BCHW):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, {**values, **buffers}, (image_BCHW,))


def probe_loss(problem, ahead):
    return F.cross_entropy(logits_with(problem.model, ahead, problem.batch.probe_MCHW), problem.batch.probe_label_M)


def gradients_of(objective, problem, memory):
    """The outcome, and the total's gradients in the model and in the memory."""
    moment = replace(problem.moment, memory=memory)
    outcome = objective(problem.model, problem.batch, moment, Alone())
    both = [*problem.model.parameters(), *memory.parameters()]
    slopes = torch.autograd.grad(outcome.total, both)
    models = len(list(problem.model.parameters()))
    return outcome, slopes[:models], slopes[models:]


@pytest.mark.parametrize("engine", ["forward", "second_order"])
def test_mw_net_descends_the_trusted_loss_after_a_step(problem, engine):
    """∂L^p(θ − α ∇mean V(ℓ_i; Θ)·ℓ_i)/∂Θ by double backward; its size is divided by the root mean square of ∂L^p/∂ω."""
    objective, batch = MetaWeightNet(rate=0.5, engine=engine), problem.batch
    memory = objective.memory(problem.model, EXAMPLES, batch.classes)
    outcome, of_model, of_memory = gradients_of(objective, problem, memory)

    theta = dict(problem.model.named_parameters())
    loss_B = F.cross_entropy(logits_with(problem.model, theta, batch.weak_BCHW), batch.label_B, reduction="none")
    weight_B = memory(loss_B.detach())
    inner = (weight_B * loss_B).mean()
    steps = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
    ahead = {name: value - 0.05 * step for (name, value), step in zip(theta.items(), steps, strict=True)}
    loss = probe_loss(problem, ahead)
    of_weight_B, *expected = torch.autograd.grad(loss, [weight_B, *memory.parameters()])
    scale = 0.5 / (len(of_weight_B) * of_weight_B).square().mean().sqrt()
    for found, slope in zip(of_memory, expected, strict=True):
        torch.testing.assert_close(found, scale * slope, rtol=1e-7, atol=1e-10)
    assert any(slope.any() for slope in expected)

    plain = (weight_B.detach() * loss_B).mean()
    for found, slope in zip(of_model, torch.autograd.grad(plain, list(theta.values())), strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outcome.total, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(outcome.coefficients.weight_B, weight_B.detach())


def halves(batch, rows):
    """Of each group's trusted rows those that judge, and those that the model learns from."""
    rows_nR = rows.unflatten(0, (len(batch.group_keys), -1))
    return rows_nR[:, :2].flatten(0, 1), rows_nR[:, 2:].flatten(0, 1)


def test_mlc_descends_the_trusted_loss_after_a_step(problem):
    """∂L^p(θ')/∂α by double backward; θ' is the optimiser's own next step on corrected and trusted labels."""
    objective, batch, moment = MetaLabelCorrection(rate=0.3), problem.batch, problem.moment
    memory = objective.memory(problem.model, EXAMPLES, batch.classes)
    (judging_MCHW, taught_MCHW), (judging_M, taught_M) = (
        halves(batch, rows) for rows in (batch.probe_MCHW, batch.probe_label_M)
    )
    feature_BD = with_features(problem.model, batch.weak_BCHW, batch.classes, aside=True)[1]
    outcome, of_model, of_memory = gradients_of(objective, problem, memory)

    theta = dict(problem.model.named_parameters())
    log_BK = logits_with(problem.model, theta, batch.weak_BCHW).log_softmax(1)
    corrected_BK = memory(feature_BD, batch.label_B)
    of_taught = F.cross_entropy(logits_with(problem.model, theta, taught_MCHW), taught_M, reduction="sum")
    inner = (of_taught - (corrected_BK * log_BK).sum()) / (12 + 6)
    steps = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
    ahead = {}
    for (name, value), step in zip(theta.items(), steps, strict=True):
        decay = moment.descent.weight_decay * value if name in moment.descent.decayed else 0.0
        ahead[name] = value - moment.lr * (step + decay + moment.descent.momentum * moment.descent.velocity[name])
    judged = F.cross_entropy(logits_with(problem.model, ahead, judging_MCHW), judging_M)
    of_label_BK, *expected = torch.autograd.grad(judged, [corrected_BK, *memory.parameters()])
    scale = 0.3 / len(of_label_BK) / of_label_BK.square().mean().sqrt()
    for found, slope in zip(of_memory, expected, strict=True):
        torch.testing.assert_close(found, scale * slope, rtol=1e-7, atol=1e-10)

    for found, slope in zip(of_model, torch.autograd.grad(inner, list(theta.values())), strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outcome.total, inner, rtol=1e-12, atol=0)
    said = outcome.coefficients
    torch.testing.assert_close(said.trust_B, corrected_BK.detach()[torch.arange(12), batch.label_B])
    torch.testing.assert_close(said.loss_B, -log_BK.detach()[torch.arange(12), batch.label_B])
    assert torch.equal(said.pseudo_label_B, corrected_BK.argmax(1))
    torch.testing.assert_close(corrected_BK.sum(1), torch.ones(12, dtype=torch.float64))


def test_mlc_reads_both_features_and_label(problem):
    memory = MetaLabelCorrection().memory(problem.model, EXAMPLES, 5)
    feature_BD = torch.rand(6, problem.model.head.in_features, dtype=torch.float64)
    label_B = torch.arange(6) % 5
    first_BK = memory(feature_BD, label_B)
    assert not torch.allclose(memory(feature_BD, (label_B + 1) % 5), first_BK)
    assert not torch.allclose(memory(feature_BD.flip(0), label_B), first_BK)
