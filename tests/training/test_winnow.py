"""The `winnow` preset: a pseudo label counts for the information it carries, from nothing to all."""

from dataclasses import replace

import pytest
import torch

from training.objectives.ieg import winnow
from training.objectives.interface import Alone

K = 10


def credence(pseudo_BK: torch.Tensor) -> torch.Tensor:
    return winnow()._credence(pseudo_BK, Alone())


@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.999])
def test_one_answer_for_all_images_counts_for_nothing(confidence):
    answer_K = torch.full((K,), (1 - confidence) / (K - 1))
    answer_K[3] = confidence
    torch.testing.assert_close(credence(answer_K.expand(40, K)), torch.zeros(40), atol=1e-6, rtol=0)


def test_sure_and_balanced_answers_count_wholly():
    torch.testing.assert_close(credence(torch.eye(K).repeat(4, 1)), torch.ones(4 * K))


def test_mean_credence_is_the_mutual_information():
    pseudo_BK = torch.randn(64, K, generator=torch.Generator().manual_seed(0)).softmax(1).double()
    entropy_of_mean = torch.special.entr(pseudo_BK.mean(0)).sum()
    mean_entropy = torch.special.entr(pseudo_BK).sum(1).mean()
    information = (entropy_of_mean - mean_entropy) / torch.log(torch.tensor(float(K)))
    torch.testing.assert_close(credence(pseudo_BK).mean(), information.double())


def test_without_pace_every_pseudo_label_counts_wholly():
    torch.testing.assert_close(replace(winnow(), paced=False)._credence(torch.ones(5, K) / K, Alone()), torch.ones(5))
