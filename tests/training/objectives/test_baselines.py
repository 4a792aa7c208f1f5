"""Baselines that change the loss against their papers' equations, written out a second time in NumPy.

Shapes: B noisy examples, M probe examples, N of the training set, K classes.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.training.tables import B, K, N, Table, batch_of, draw, of_labels, pointers, softmax, taken
from training.objectives.baselines import bootstrap
from training.objectives.baselines.co_teaching import CoTeaching
from training.objectives.baselines.elr import Elr
from training.objectives.baselines.forward import Forward
from training.objectives.baselines.gce import Gce
from training.objectives.baselines.glc import Glc


@pytest.fixture
def table() -> Table:
    return Table(draw(N, K))


@pytest.fixture
def batch():
    return batch_of(range(B), np.arange(B) * 7 % K)


# --- GCE


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_gce_is_the_box_cox_of_the_likelihood(q, table, batch):
    p_B = of_labels(softmax(table, range(B)), batch)
    outcome, gradient_NK = taken(Gce(q=q), table, batch)
    assert float(outcome.total.detach()) == pytest.approx(np.mean((1 - p_B**q) / q), rel=1e-12)
    np.testing.assert_allclose(outcome.coefficients.weight_B, p_B**q, rtol=1e-12)
    plain_NK = torch.autograd.grad(F.cross_entropy(table(batch.weak_BCHW), batch.label_B), table.logits_NK)[0].numpy()
    np.testing.assert_allclose(gradient_NK[:B], p_B[:, None] ** q * plain_NK[:B], rtol=1e-9, atol=1e-15)


def test_gce_lies_between_cross_entropy_and_the_absolute_error(table, batch):
    p_BK = softmax(table, range(B))
    p_B = of_labels(p_BK, batch)
    absolute = np.abs(p_BK - np.eye(K)[batch.label_B]).sum(1).mean()
    assert float(taken(Gce(q=1.0), table, batch)[0].total.detach()) == pytest.approx(absolute / 2, rel=1e-12)
    assert float(taken(Gce(q=1e-3), table, batch)[0].total.detach()) == pytest.approx(-np.log(p_B).mean(), rel=1e-2)


# --- bootstrapping


def test_soft_bootstrapping_is_regression_with_less_entropy(table, batch):
    """−Σ (β·y + (1−β)·q) log q = β·CE + (1−β)·entropy, whose gradient goes through q."""
    p_BK = softmax(table, range(B))
    outcome, gradient_NK = taken(bootstrap.soft(), table, batch)
    entropy_B = -(p_BK * np.log(p_BK)).sum(1)
    expected_B = -0.95 * np.log(of_labels(p_BK, batch)) + 0.05 * entropy_B
    assert float(outcome.total.detach()) == pytest.approx(expected_B.mean(), rel=1e-12)
    of_entropy_BK = -p_BK * (np.log(p_BK) + entropy_B[:, None])
    slope_BK = 0.95 * (p_BK - np.eye(K)[batch.label_B]) + 0.05 * of_entropy_BK
    np.testing.assert_allclose(gradient_NK[:B], slope_BK / B, rtol=1e-9, atol=1e-15)


def test_hard_bootstrapping_believes_the_likeliest_class(table, batch):
    p_BK = softmax(table, range(B))
    target_BK = 0.8 * np.eye(K)[batch.label_B] + 0.2 * np.eye(K)[p_BK.argmax(1)]
    outcome, gradient_NK = taken(bootstrap.hard(), table, batch)
    assert float(outcome.total.detach()) == pytest.approx(-(target_BK * np.log(p_BK)).sum(1).mean(), rel=1e-12)
    np.testing.assert_allclose(gradient_NK[:B], (p_BK - target_BK) / B, rtol=1e-9, atol=1e-15)
    assert set(outcome.coefficients.trust_B.tolist()) == {0.8}


# --- corrections of the loss


def corrected(p_BK: np.ndarray, transition_KK: np.ndarray, label_B) -> tuple[np.ndarray, np.ndarray]:
    """(−log (Tᵀp)_y, P(the label is right | p, y)) by sums over classes."""
    noisy_BK = p_BK @ transition_KK
    rows, label_B = np.arange(len(p_BK)), np.asarray(label_B)
    right_B = p_BK[rows, label_B] * transition_KK[label_B, label_B] / noisy_BK[rows, label_B]
    return -np.log(noisy_BK[rows, label_B]), right_B


def test_forward_reads_t_from_the_perfect_examples_and_corrects_with_it(table, batch):
    objective, steps = Forward(warm_up=0.5, percentile=100), 6
    memory = objective.memory(table, N, K)
    for step in range(3):  # all 30 examples, by 12, in the warm-up
        held = batch_of((np.arange(B) + B * step) % N, np.zeros(B, int))
        outcome, _ = taken(objective, table, held, memory=memory, step=step, steps=steps)
        assert set(outcome.parts) == {"label"}
    p_NK = softmax(table, range(N))
    np.testing.assert_allclose(memory.prediction_NK, p_NK, rtol=1e-12)
    outcome, gradient_NK = taken(objective, table, batch, memory=memory, step=3, steps=steps)
    transition_KK = np.stack([p_NK[p_NK[:, i].argmax()] for i in range(K)])
    np.testing.assert_allclose(memory.transition_KK, transition_KK, rtol=1e-12)
    loss_B, right_B = corrected(p_NK[:B], transition_KK, batch.label_B)
    assert float(outcome.total.detach()) == pytest.approx(loss_B.mean(), rel=1e-12)
    np.testing.assert_allclose(outcome.coefficients.trust_B, right_B, rtol=1e-10)
    # theorem 2: as if the network ended in a linear layer T
    theirs_NK = table.logits_NK.softmax(1) @ torch.from_numpy(transition_KK)
    theirs = F.nll_loss(theirs_NK[:B].log(), batch.label_B)
    np.testing.assert_allclose(gradient_NK, torch.autograd.grad(theirs, table.logits_NK)[0], rtol=1e-9, atol=1e-15)
    # T stays, whatever the network predicts later
    table.logits_NK.data.neg_()
    taken(objective, table, batch, memory=memory, step=4, steps=steps)
    np.testing.assert_allclose(memory.transition_KK, transition_KK, rtol=1e-12)


@pytest.mark.parametrize("percentile", [0, 50, 97, 100])
def test_forward_at_a_percentile(percentile, table):
    memory = Forward().memory(table, N, K)
    p_NK = softmax(table, range(N))
    memory.prediction_NK.copy_(torch.from_numpy(p_NK))
    memory.estimate(percentile)
    for i in range(K):
        value = np.percentile(p_NK[:, i], percentile, method="inverted_cdf")
        assert memory.transition_KK[i, i] == pytest.approx(value, rel=1e-12)
        assert any(np.allclose(memory.transition_KK[i], row, rtol=1e-12) for row in p_NK)


def test_glc_averages_what_is_predicted_of_trusted_images(table, batch):
    objective, steps = Glc(warm_up=0.5), 8  # an epoch of 3 steps: those before step 4 count
    memory = objective.memory(table, N, K)
    probe_rows, probe_label = [[20, 21, 22], [23, 24, 25], [26, 27, 28], [29, 20, 24]], [0, 1, 0]
    for step in range(4):
        held = replace(batch, probe_MCHW=pointers(probe_rows[step]), probe_label_M=torch.tensor(probe_label))
        outcome, _ = taken(objective, table, held, memory=memory, step=step, steps=steps)
        assert set(outcome.parts) == {"label"}
    p_NK = softmax(table, range(N))
    counted = probe_rows[1:]
    expected_KK = np.eye(K)  # classes 2 and 3 were not seen
    expected_KK[0] = p_NK[[row for rows in counted for row in (rows[0], rows[2])]].mean(0)
    expected_KK[1] = p_NK[[rows[1] for rows in counted]].mean(0)
    np.testing.assert_allclose(memory.estimate(), expected_KK, rtol=1e-12)

    held = replace(batch, probe_MCHW=pointers([5, 20, 21]), probe_label_M=torch.tensor([1, 2, 3]))
    outcome, gradient_NK = taken(objective, table, held, memory=memory, step=4, steps=steps)
    loss_B, right_B = corrected(p_NK[:B], expected_KK, batch.label_B)
    probe_M = -np.log(p_NK[[5, 20, 21], [1, 2, 3]])
    assert float(outcome.total.detach()) == pytest.approx(np.concatenate([loss_B, probe_M]).mean(), rel=1e-9)
    np.testing.assert_allclose(outcome.coefficients.trust_B, right_B, rtol=1e-8)
    assert gradient_NK[20].any()  # trusted images teach
    lighter, _ = taken(replace(objective, trusted_weight=0.1), table, held, memory=memory, step=4, steps=steps)
    expected = (loss_B.sum() + 0.1 * probe_M.sum()) / (B + 0.1 * 3)
    assert float(lighter.total.detach()) == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(memory.estimate(), expected_KK, rtol=1e-12)


# --- ELR


def test_elr_is_cross_entropy_pulled_towards_past_predictions(table):
    """t by its recursion over three visits, one of them with a row twice; the gradient is the paper's."""
    objective = Elr(beta=0.7, strength=3.0)
    memory, t_NK = objective.memory(table, N, K), np.zeros((N, K))
    for rows in (range(B), range(6, 6 + B), [3, 3, *range(10, 20)]):
        held = batch_of(list(rows), np.arange(B) * 5 % K)
        outcome, gradient_NK = taken(objective, table, held, memory=memory)
        p_NK = softmax(table, range(N))
        for row in set(rows):
            t_NK[row] = 0.7 * t_NK[row] + 0.3 * p_NK[row]
        np.testing.assert_allclose(memory.average_NK, t_NK, atol=3e-4)  # predictions are kept 1e-4 from 0 and 1
        p_BK, t_BK = p_NK[list(rows)], memory.average_NK.numpy()[list(rows)]
        inner_B = (p_BK * t_BK).sum(1)
        loss_B = -np.log(of_labels(p_BK, held)) + 3 * np.log(1 - inner_B)
        assert float(outcome.total.detach()) == pytest.approx(loss_B.mean(), abs=1e-3)
        pull_BK = p_BK / (1 - inner_B)[:, None] * (inner_B[:, None] - t_BK)
        slope_NK = np.zeros((N, K))
        np.add.at(slope_NK, list(rows), (p_BK - np.eye(K)[held.label_B] + 3 * pull_BK) / B)
        np.testing.assert_allclose(gradient_NK, slope_NK, atol=2e-4)
        table.logits_NK.data.add_(0.3 * draw(N, K, seed=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gce(q=0.0), "objective.q is 0.0: it must be between 0.001 and 1"),
        (lambda: bootstrap.Bootstrap(hard=True, beta=1.2), "objective.beta is 1.2: it must be between 0 and 1"),
        (lambda: Elr(strength=-1.0), "objective.strength is -1.0: it must be 0 or more"),
        (lambda: Forward(warm_up=math.nan), "objective.warm_up is nan"),
        (lambda: CoTeaching(noise_rate=1.5), "objective.noise_rate is 1.5"),
    ],
)
def test_impossible_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
