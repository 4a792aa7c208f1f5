"""Baselines that select examples against their papers' algorithms, written out a second time in NumPy.

Shapes: B noisy examples, M probe examples, N of the training set, K classes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.tables import B, K, N, Table, batch_of, draw, of_labels, softmax, taken
from training.objectives.baselines.co_teaching import CoTeaching
from training.objectives.baselines.incv import Incv, noise_rate
from training.objectives.baselines.mentornet import MentorNet


@pytest.fixture
def batch():
    return batch_of(range(B), np.arange(B) * 7 % K)


# --- co-teaching and INCV


def pair(objective, seed=1):
    """The model f and a memory whose second network g is another table."""
    f, g = Table(draw(N, K)), Table(draw(N, K, seed=seed))
    memory = objective.memory(f, N, K)
    if isinstance(objective, CoTeaching):
        return f, g, g
    memory.network = g
    return f, g, memory


@pytest.mark.parametrize(("step", "kept"), [(0, 12), (2, 10), (4, 7), (30, 7)])
def test_co_teaching_exchanges_small_losses(step, kept, batch):
    """τ = 0.4 of 12 after T_k = 4 of 40 steps: R = 1, 0.8, 0.6, 0.6, of 12: 12, 9.6, 7.2, 7.2."""
    objective = CoTeaching(noise_rate=0.4, warm_up=0.1)
    f, g, memory = pair(objective)
    outcome, gradient_NK = taken(objective, f, batch, memory=memory, step=step, steps=40)
    loss_f_B, loss_g_B = (-np.log(of_labels(softmax(table, range(B)), batch)) for table in (f, g))
    good_for_g, good_for_f = np.argsort(loss_f_B)[:kept], np.argsort(loss_g_B)[:kept]
    assert float(outcome.parts["kept"]) == pytest.approx(loss_f_B[good_for_f].mean(), rel=1e-12)
    assert float(outcome.parts["kept_by_peer"]) == pytest.approx(loss_g_B[good_for_g].mean(), rel=1e-12)
    expected_B = np.zeros(B)
    expected_B[good_for_f] = B / kept
    np.testing.assert_allclose(outcome.coefficients.weight_B, expected_B, rtol=1e-12)
    assert set(np.flatnonzero(gradient_NK.any(1))) == set(good_for_f)
    (gradient_of_g_NK,) = torch.autograd.grad(outcome.total, g.logits_NK)
    assert set(np.flatnonzero(gradient_of_g_NK.any(1))) == set(good_for_g)
    assert set(good_for_f) != set(good_for_g) or kept == B


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.45, 0.7])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_incv_solves_for_the_noise_rate(rate, classes):
    agreement = torch.tensor((1 - rate) ** 2 + rate**2 / (classes - 1), dtype=torch.float64)
    if rate <= 1 - 1 / classes:
        assert float(noise_rate(agreement, classes)) == pytest.approx(rate, abs=1e-6)
    assert float(noise_rate(torch.tensor(0.0), classes)) == pytest.approx(1 - 1 / classes)


def test_incv_selects_by_the_network_that_left_an_example_out():
    """One round over 24 of the 30 examples, by hand."""
    objective, W = Incv(warm_up=0.5, rounds=2), 24
    f, g, memory = pair(objective)
    second_N = memory.second_N.numpy().copy()
    assert second_N.sum() == N // 2
    p_f_NK, p_g_NK = softmax(f, range(N)), softmax(g, range(N))
    left_out_NK = np.where(second_N[:, None], p_f_NK, p_g_NK)
    label_N = np.where(np.arange(N) % 2 == 0, (left_out_NK.argmax(1) + 1) % K, left_out_NK.argmax(1))
    held = batch_of(range(W), label_N[:W])
    outcome, _ = taken(objective, f, held, memory=memory, step=0, steps=8)
    f_learns, g_learns = ~second_N[:W], second_N[:W]
    loss_f_B, loss_g_B = (-np.log(of_labels(p_NK[:W], held)) for p_NK in (p_f_NK, p_g_NK))
    assert float(outcome.parts["kept"]) == pytest.approx(loss_f_B[f_learns].mean(), rel=1e-12)
    assert float(outcome.parts["kept_by_peer"]) == pytest.approx(loss_g_B[g_learns].mean(), rel=1e-12)
    assert not memory.selected_N.any()

    taken(objective, f, held, memory=memory, step=2, steps=8)  # the second round begins
    right_B = np.arange(W) % 2 != 0
    np.testing.assert_array_equal(memory.selected_N[:W], right_B)
    assert not memory.selected_N[W:].any()  # nobody judged them
    rate = float(noise_rate(torch.tensor(right_B.mean()), K))
    assert float(memory.noise_rate) == pytest.approx(rate, rel=1e-12)
    for half_B in (second_N[:W], ~second_N[:W]):
        wrong = np.flatnonzero(~right_B & half_B)
        count = int(min(rate / (1 - rate), 2) * (right_B & half_B).sum())
        loss_B = -np.log(of_labels(left_out_NK[:W], held))
        worst = wrong[np.argsort(-loss_B[wrong])][:count]
        assert 0 < len(worst) < len(wrong)
        assert set(np.flatnonzero(memory.removed_N[:W].numpy() & half_B)) == set(worst)


def test_incv_removes_nothing_where_noise_is_not_symmetric():
    """Right labels agree with a share a of predictions; (1−ε)² + ε² = a."""
    objective = Incv(warm_up=0.5, rounds=2, symmetric=False)
    f, g, memory = pair(objective)
    left_out_NK = np.where(memory.second_N.numpy()[:, None], softmax(f, range(N)), softmax(g, range(N)))
    label_N = np.where(np.arange(N) % 4 == 0, (left_out_NK.argmax(1) + 1) % K, left_out_NK.argmax(1))
    held = batch_of(range(N), label_N)
    for step in (0, 2):
        taken(objective, f, held, memory=memory, step=step, steps=8)
    agreement = 1 - np.mean(np.arange(N) % 4 == 0)
    assert float(memory.noise_rate) == pytest.approx(0.5 - np.sqrt(2 * agreement - 1) / 2, rel=1e-9)
    assert not memory.removed_N.any()
    assert int(memory.selected_N.sum()) == round(agreement * N)


def test_incv_then_co_teaches_on_what_it_selected():
    objective = Incv(warm_up=0.5, rounds=2, pace=0.25, selected_only=0.5)
    f, g, memory = pair(objective)
    memory.selected_N[:8] = True
    memory.removed_N[8] = True
    memory.noise_rate.fill_(0.5)
    held = batch_of(range(B), np.arange(B) % K)
    loss_f_B, loss_g_B = (-np.log(of_labels(softmax(table, range(B)), held)) for table in (f, g))
    wrong = 0.5**2 / (0.5**2 + (K - 1) * 0.5**2)  # a quarter of what was selected
    candidates = [*range(8), 9, 10, 11]
    for step, among, kept in ((4, range(8), 8), (6, candidates, round(8 * (1 - wrong)))):
        outcome, _ = taken(objective, f, held, memory=memory, step=step, steps=8)
        good = np.array(among)[np.argsort(loss_g_B[among])][:kept]
        expected_B = np.zeros(B)
        expected_B[good] = B / kept
        np.testing.assert_allclose(outcome.coefficients.weight_B, expected_B, rtol=1e-12)
        assert float(outcome.parts["kept"]) == pytest.approx(loss_f_B[good].mean(), rel=1e-12)
    assert memory.selected_N.sum() == 8  # nothing was judged


# --- MentorNet


def test_mentornet_follows_the_predefined_curriculum(batch):
    table = Table(draw(N, K))
    objective = MentorNet(percentile=0.75, softness=2.0)
    memory = objective.memory(table, N, K)
    loss_B = -np.log(of_labels(softmax(table, range(B)), batch))
    average = 0.0
    for progress in (0.0, 0.1, 0.17, 0.18, 0.5, 0.89, 0.9, 0.99):
        outcome, _ = taken(objective, table, batch, memory=memory, step=round(100 * progress), steps=100)
        average = 0.5 * average + 0.5 * np.quantile(loss_B, 0.75)
        if progress < 0.18:
            expected_B = np.ones(B)
        elif progress < 0.9:
            expected_B = (loss_B <= average).astype(float)
        else:
            expected_B = np.clip(1 - (loss_B - average) / 2, 0, 1)
        weight_B = outcome.coefficients.weight_B.numpy()
        kept_B = weight_B > 0
        np.testing.assert_allclose(weight_B[kept_B], expected_B[kept_B], rtol=1e-12)
        assert not kept_B[expected_B == 0].any()
        assert float(outcome.total.detach()) == pytest.approx((weight_B * loss_B).mean(), rel=1e-12)


def test_mentornet_drops_examples_by_the_groups_keys():
    rows = 2000
    table = Table(draw(N, K))
    held = replace(batch_of(np.zeros(rows, int), np.zeros(rows, int)), group_keys=(1, 2))
    objective = MentorNet()

    def kept(step, keys):
        memory = objective.memory(table, N, K)
        memory.average.fill_(1e3)
        outcome, _ = taken(objective, table, replace(held, group_keys=keys), memory=memory, step=step, steps=100)
        return outcome.coefficients.weight_B > 0

    assert float(kept(0, (1, 2)).double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(kept(50, (1, 2)).double().mean()) == pytest.approx(0.95, abs=0.02)
    assert torch.equal(kept(0, (1, 2))[rows // 2 :], kept(0, (7, 2))[rows // 2 :])
    assert not torch.equal(kept(0, (1, 2)), kept(0, (7, 2)))
