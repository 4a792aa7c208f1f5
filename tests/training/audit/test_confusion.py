"""How annotators confuse classes, learned from their labels and the answers of a judge who has not seen these.

Shapes: N rows, K classes.
"""

import numpy as np
import pytest
import torch

from training.audit.confusion import TEMPERATURES, Confusion, learned
from training.audit.evidence import probability, quality

ROWS, CLASSES = 20_000, 4
# Of class 1 every other label says 2; of class 3 one in five says 0.
LABELS = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.1, 0.1, 0.8, 0.0], [0.2, 0.0, 0.0, 0.8]]).double()


@pytest.fixture(scope="module")
def drawn():
    """True classes, labels, and the log-probabilities of a judge who is right about how sure it is."""
    rng = torch.Generator().manual_seed(0)
    log_NK = (3 * torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)).log_softmax(1)
    class_N = torch.multinomial(log_NK.exp(), 1, generator=rng)[:, 0]
    label_N = torch.multinomial(LABELS[class_N], 1, generator=rng)[:, 0]
    return class_N, label_N, log_NK


def test_confusion_is_found_from_labels_and_answers(drawn):
    _, label_N, log_NK = drawn
    found = learned(log_NK, label_N)
    assert found.temperature == 1
    torch.testing.assert_close(found.label_KK, LABELS, rtol=0, atol=0.03)
    torch.testing.assert_close(found.label_KK.sum(1), torch.ones(CLASSES).double())


@pytest.mark.parametrize("temperature", [TEMPERATURES[0], TEMPERATURES[5]])
def test_a_judge_who_is_too_sure_or_not_sure_enough_is_seen_through(drawn, temperature):
    _, label_N, log_NK = drawn
    found = learned(temperature * log_NK, label_N)
    assert found.temperature == temperature
    torch.testing.assert_close(found.label_KK, learned(log_NK, label_N).label_KK)


def test_the_posterior_is_bayes_rule_and_as_often_right_as_it_says(drawn):
    class_N, label_N, log_NK = drawn
    posterior_NK = Confusion(LABELS, 1.0).posterior(log_NK, label_N)
    joint_NK = log_NK.exp() * LABELS[:, label_N].T
    torch.testing.assert_close(posterior_NK, joint_NK / joint_NK.sum(1, keepdim=True))
    right_N = (class_N == label_N).double()
    said_N = learned(log_NK, label_N).posterior(log_NK, label_N).gather(1, label_N[:, None])[:, 0]
    for low in np.arange(0, 1, 0.1):
        of_bin = (said_N >= low) & (said_N < low + 0.1)
        assert abs(float(said_N[of_bin].mean() - right_N[of_bin].mean())) < 0.06
    best_N = (class_N == posterior_NK.argmax(1)).double().mean()
    assert best_N > max(right_N.mean(), (class_N == log_NK.argmax(1)).double().mean()) + 0.02


def test_of_few_rows_nothing_is_certain():
    found = learned(torch.zeros(3, 50).double(), torch.tensor([4, 4, 9]))
    assert bool((found.label_KK > 0).all())
    assert bool(torch.isfinite(found.joint(torch.zeros(3, 50).double(), torch.tensor([0, 4, 49]))).all())


def test_a_known_quality_survives_the_way_through_probabilities():
    quality_N = np.linspace(0, 1, 11)
    np.testing.assert_allclose(quality(probability(quality_N, 7), 7), quality_N, atol=1e-12)
    assert probability(np.array([0.5]), 7) == pytest.approx(1 / 7)
