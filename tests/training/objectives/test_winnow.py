"""The `winnow` preset: pseudo labels and consistency earn their weight; one answer to all images earns none."""

import pytest
import torch

from training.objectives.ieg import winnow
from training.objectives.interface import Alone
from training.objectives.losses import forward_aside

K = 10


def guesses(logits_BK: torch.Tensor) -> torch.Tensor:
    return winnow()._guesses(logits_BK, logits_BK, Alone())


@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.999])
def test_one_answer_to_all_images_makes_no_pseudo_label(confidence):
    answer_K = torch.full((K,), (1 - confidence) / (K - 1))
    answer_K[3] = confidence
    torch.testing.assert_close(guesses(answer_K.log().expand(40, K)), torch.full((40, K), 1 / K))


def test_sure_and_balanced_answers_stay():
    torch.testing.assert_close(guesses(60 * torch.eye(K).repeat(4, 1)), torch.eye(K).repeat(4, 1))


def test_a_class_that_no_image_can_be_leaves_no_nan():
    logits_BK = torch.eye(K).repeat(4, 1)
    logits_BK[:, 7] = -1e4
    assert torch.isfinite(guesses(logits_BK)).all()


def test_what_is_said_of_every_image_is_divided_out():
    """Adding the same logits to every image's hardly changes what they say of one another."""
    logits_BK = torch.randn(200, K, generator=torch.Generator().manual_seed(0)).double()
    shift_K = torch.linspace(-1.5, 1.5, K, dtype=torch.float64)
    plain_BK, shifted_BK = guesses(logits_BK), guesses(logits_BK + shift_K)
    same = (plain_BK.argmax(1) == shifted_BK.argmax(1)).double().mean()
    unaligned = ((logits_BK + shift_K).argmax(1) == logits_BK.argmax(1)).double().mean()
    assert same > 0.9 > 0.7 > unaligned


def test_paced_loss_is_the_stated_sum(problem):
    """Pseudo labels, pace and weights of the terms, recomputed from the two views' logits."""
    objective, batch, classes = winnow(), problem.batch, problem.batch.classes
    copy = problem.fresh().model
    weak_BK, strong_BK = copy(batch.weak_BCHW).softmax(1), forward_aside(copy, batch.strong_BCHW).softmax(1)
    outcome = objective(problem.model, batch, problem.moment, Alone())

    guess_BK = (weak_BK + strong_BK) / 2
    guess_BK = guess_BK / guess_BK.mean(0)
    guess_BK = guess_BK / guess_BK.sum(1, keepdim=True)
    sure_B = (guess_BK.max(1).values - 1 / classes) / (1 - 1 / classes)
    sharp_BK = guess_BK**2 / (guess_BK**2).sum(1, keepdim=True)
    pseudo_BK = sure_B[:, None] * sharp_BK + (1 - sure_B[:, None]) * torch.eye(classes).double()[batch.label_B]
    given_BK = torch.eye(classes).double()[batch.label_B]
    target_BK = torch.where(outcome.coefficients.trust_B[:, None] > 0, given_BK, pseudo_BK)
    relabelled = -(target_BK * weak_BK.log()).sum(1).mean()
    torch.testing.assert_close(outcome.parts["relabelled"], relabelled.detach())
    torch.testing.assert_close(outcome.coefficients.pseudo_label_B, guess_BK.argmax(1))
    torch.testing.assert_close(outcome.coefficients.confidence_B, sharp_BK.max(1).values.detach())

    pace, parts = float(sure_B.mean().detach()), outcome.parts
    assert 0 < pace < 1
    total = 0.5 * (parts["weighted"] + parts["relabelled"]) + parts["mixed_probe"]
    total = total + 5**pace * parts["mixed_noisy"] + 20 * pace * parts["consistency"]
    torch.testing.assert_close(outcome.total.detach(), total)
