"""Baselines that mix examples against their papers' algorithms, followed by hand through a linear network.

Shapes: B noisy examples, M probe examples, N of the training set, K classes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from tests.training.tables import B, K, N, Plane, Table, batch_of, draw, mixed, plane_batch, taken
from training.objectives.baselines.m_correction import MCorrection
from training.objectives.baselines.mixmatch import MixMatch, mixmatch_kl
from training.objectives.interface import Alone, Moment

# --- M-correction


@pytest.mark.parametrize(("share", "right", "wrong"), [(0.4, (2.0, 9.0), (8.0, 3.0)), (0.7, (2.0, 20.0), (9.0, 3.0))])
def test_m_correction_recovers_a_mixture(share, right, wrong):
    """Losses of known betas, stretched: P(wrong | loss) is near the true one, which it judges labels as well as."""
    rng, count = np.random.default_rng(0), 40_000
    is_wrong_N = rng.random(count) < share
    x_N = np.where(is_wrong_N, rng.beta(*wrong, count), rng.beta(*right, count))
    memory = MCorrection().memory(Table(draw(1, K)), count, K)
    memory.loss_N.copy_(torch.from_numpy(0.2 + 5 * x_N))
    memory.fit()
    low, high = np.percentile(0.2 + 5 * x_N, [5, 95])
    np.testing.assert_allclose(memory.range_2, [low, high], rtol=1e-6)
    assert float(memory.share_2[1]) == pytest.approx(share, abs=0.15)

    of_right, of_wrong = (1 - share) * stats.beta(*right).pdf(x_N), share * stats.beta(*wrong).pdf(x_N)
    found_N = memory.wrong(memory.loss_N).numpy()
    assert np.abs(found_N - of_wrong / (of_right + of_wrong)).mean() < 0.1
    assert ((found_N > 0.5) == is_wrong_N).mean() > 0.97 * ((of_wrong > of_right) == is_wrong_N).mean()
    assert (np.diff(found_N[np.argsort(x_N)]) > -1e-9).mean() > 0.999


def test_m_correction_fits_by_weighted_moments_as_the_paper_s_em():
    """The fit against the same iterations with SciPy's densities."""
    rng = np.random.default_rng(1)
    loss_N = np.concatenate([rng.gamma(2, 0.2, 300), rng.gamma(9, 0.3, 200)])
    memory = MCorrection().memory(Table(draw(1, K)), len(loss_N) + 5, K)
    memory.loss_N[: len(loss_N)] = torch.from_numpy(loss_N)  # five were never seen
    memory.fit()
    low, high = np.percentile(loss_N, [5, 95])
    x_N = loss_N[(loss_N >= low) & (loss_N <= high)]
    x_N = np.clip((x_N - low) / (high - low + 1e-6), 1e-3, 1 - 1e-3)
    alpha, beta, shares = np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.array([0.5, 0.5])
    for _ in range(10):
        joint_2N = shares[:, None] * stats.beta.pdf(x_N, alpha[:, None], beta[:, None])
        r_2N = joint_2N / joint_2N.sum(0)
        mean = (r_2N * x_N).sum(1) / r_2N.sum(1)
        variance = (r_2N * (x_N - mean[:, None]) ** 2).sum(1) / r_2N.sum(1)
        alpha = mean * (mean * (1 - mean) / variance - 1)
        beta, shares = alpha * (1 - mean) / mean, r_2N.sum(1) / len(x_N)
    np.testing.assert_allclose(memory.alpha_2, alpha, rtol=1e-6)
    np.testing.assert_allclose(memory.beta_2, beta, rtol=1e-6)
    np.testing.assert_allclose(memory.share_2, shares, rtol=1e-6)


@pytest.mark.parametrize("stage", ["warm-up", "corrected"])
def test_m_correction_mixes_bootstrapped_targets(stage):
    held, plane, objective = plane_batch(), Plane(), MCorrection(warm_up=0.5, alpha=4.0, regularisation=0.7)
    memory = objective.memory(plane, N, K)
    memory.loss_N.copy_(draw(N, seed=8).abs())
    memory.fit()
    step = 10 if stage == "corrected" else 2  # neither starts an epoch of 3 steps
    outcome, _ = taken(objective, plane, held, memory=memory, step=step, steps=20)
    with torch.no_grad():
        logits_BK = plane(held.weak_BCHW)
        loss_B = F.cross_entropy(logits_BK, held.label_B, reduction="none")
    torch.testing.assert_close(memory.loss_N[:B], loss_B)
    wrong_B = memory.wrong(loss_B) if stage == "corrected" else torch.zeros(B, dtype=torch.float64)
    assert 0 < wrong_B.sum() < B or stage == "warm-up"
    eye = torch.eye(K, dtype=torch.float64)
    target_BK = (1 - wrong_B)[:, None] * eye[held.label_B] + wrong_B[:, None] * eye[logits_BK.argmax(1)]
    total, answers = 0.0, []
    for group, key in enumerate(held.group_keys):
        rows = slice(group * B // 2, (group + 1) * B // 2)
        image, target = mixed([held.weak_BCHW[rows], target_BK[rows]], key, alpha=4.0, fold=False)
        answers.append(plane(image).log_softmax(1))
        total = total - (target * answers[-1]).sum() / B
    if stage == "corrected":  # Tanaka's prior: KL of uniform to the mean prediction
        mean_K = torch.cat(answers).exp().mean(0)
        total = total + 0.7 * (1 / K * (1 / K / mean_K).log()).sum()
    torch.testing.assert_close(outcome.total, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(outcome.coefficients.trust_B, 1 - wrong_B)


def test_m_correction_fits_once_an_epoch():
    objective = MCorrection()
    memory = objective.memory(Plane(), N, K)
    fits = []
    for step in range(8):
        held = batch_of((np.arange(B) + B * step) % N, np.arange(B) % K)
        before = memory.alpha_2.clone()
        objective(
            Plane(),
            replace(held, weak_BCHW=draw(B, 1, 1, 2, seed=step)),
            Moment(0.1, step=step, steps=9, memory=memory),
            Alone(),
        )
        fits.append(not torch.equal(before, memory.alpha_2))
    assert [step for step, fitted in enumerate(fits) if fitted] == [3, 6]


# --- MixMatch


@pytest.mark.parametrize("objective", [MixMatch(lambda_u=30.0, warm_up=4), mixmatch_kl()])
@pytest.mark.parametrize("step", [0, 2, 20_000])
def test_mixmatch_is_algorithm_1(objective, step):
    held, plane = plane_batch(), Plane()
    outcome, gradient = taken(objective, plane, held, step=step, steps=30_000)
    with torch.no_grad():
        guess_BK = (plane(held.weak_BCHW).softmax(1) + plane(held.strong_BCHW).softmax(1)) / 2
        guess_BK = guess_BK**2 / (guess_BK**2).sum(1, keepdim=True)
    eye, labelled, unlabelled = torch.eye(K, dtype=torch.float64), [], []
    for group, key in enumerate(held.group_keys):
        noisy, trusted = slice(group * 6, group * 6 + 6), slice(group * 3, group * 3 + 3)
        image = torch.cat([held.probe_MCHW[trusted], held.weak_BCHW[noisy], held.strong_BCHW[noisy]])
        target = torch.cat([eye[held.probe_label_M[trusted]], guess_BK[noisy], guess_BK[noisy]])
        image, target = mixed([image, target], key, alpha=0.75, fold=True)
        logits = plane(image)
        labelled.append(-(target * logits.log_softmax(1)).sum(1)[:3])
        unlabelled.append((target - logits.softmax(1)).square().sum(1)[3:])
    total = torch.cat(labelled).mean()
    pace = min(step / objective.warm_up, 1)
    total = total + pace * objective.lambda_u * torch.cat(unlabelled).mean() / K
    if objective.kl:
        p_BK = plane(held.weak_BCHW).softmax(1).detach()
        total = total + pace * 20 * (p_BK * (p_BK.log() - plane(held.strong_BCHW).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(outcome.total, total, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(total, plane.logits_NK)[0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    assert not outcome.coefficients.trust_B.any()
    other = objective(
        plane, replace(held, label_B=(held.label_B + 1) % K), Moment(0.1, step=step, steps=30_000), Alone()
    )
    assert torch.equal(other.total, outcome.total)  # noisy labels are not read
