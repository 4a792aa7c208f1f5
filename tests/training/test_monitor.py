import math

import pytest
import torch

from training.monitor import COLLAPSED, WINDOW, Monitor, NotFiniteError
from training.objectives.interface import Outcome
from training.objectives.losses import plain_coefficients


def outcome(prediction_BK, total: float = 1.0) -> Outcome:
    logits_BK = torch.zeros(len(prediction_BK), prediction_BK.shape[1])
    coefficients = plain_coefficients(logits_BK, torch.zeros(len(prediction_BK), dtype=torch.int64))
    return Outcome(torch.tensor(total), {"weighted": torch.tensor(total / 2)}, coefficients, prediction_BK)


def watched(prediction_BK, steps: int = WINDOW) -> Monitor:
    monitor = Monitor(prediction_BK.shape[1])
    for step in range(steps):
        monitor.add(step, outcome(prediction_BK))
    return monitor


def test_information_is_mutual_information_in_shares_of_log_k():
    prediction_BK = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    mean = prediction_BK.mean(0)
    by_hand = sum(
        float(p * (p / m).log()) / 2 for row in prediction_BK for p, m in zip(row, mean, strict=True)
    ) / math.log(3)  # mean KL(prediction ‖ mean prediction)
    assert watched(prediction_BK).information() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("prediction_BK", "expected"),
    [
        (torch.eye(4), 1.0),  # confident and balanced
        (torch.full((6, 4), 0.25), 0.0),  # undecided
        (torch.eye(4)[[2] * 6], 0.0),  # one confident answer
        (torch.tensor([[0.6, 0.2, 0.1, 0.1]] * 5), 0.0),  # one unsure answer
        (torch.eye(4)[[0, 1, 0, 1]], 0.5),  # two of four classes
    ],
)
def test_information_at_its_ends(prediction_BK, expected):
    assert watched(prediction_BK).information() == pytest.approx(expected, abs=1e-6)


def test_balance_may_come_from_different_steps():
    monitor = Monitor(4)
    for step in range(WINDOW):
        monitor.add(step, outcome(torch.eye(4)[[step % 4] * 3]))
    assert monitor.information() == pytest.approx(1)


def test_collapse_warns_once_when_a_window_has_passed():
    collapsed = torch.full((6, 4), 0.25)
    monitor = watched(collapsed, WINDOW - 1)
    assert monitor.collapse_warning() is None
    monitor.add(WINDOW, outcome(collapsed))
    warning = monitor.collapse_warning()
    assert warning is not None
    assert "\n" not in warning
    assert "--method winnow" in warning
    assert monitor.collapse_warning() is None


def test_only_the_last_window_is_judged():
    monitor = watched(torch.eye(4), 3 * WINDOW)
    assert monitor.collapse_warning() is None
    for step in range(WINDOW - 1):
        monitor.add(step, outcome(torch.full((6, 4), 0.25)))
    assert monitor.information() == pytest.approx(math.log(4) / math.log(4) - 0.99, abs=0.03)
    monitor.add(WINDOW, outcome(torch.full((6, 4), 0.25)))
    assert monitor.information() == pytest.approx(0, abs=1e-6)
    assert monitor.collapse_warning() is not None


def test_the_limit_lies_between_healthy_and_collapsed():
    assert 0.01 < COLLAPSED < 0.06


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_named_with_its_step_and_terms(bad):
    monitor = Monitor(4)
    for step, total in enumerate([1.0, 2.0, bad, 3.0, bad]):
        monitor.add(step + 40, outcome(torch.eye(4), total))
    with pytest.raises(NotFiniteError, match=rf"the loss is {bad} at step 42 \(weighted {bad}\).*step 30.*schedule.lr"):
        monitor.check_finite("step 30")


def test_finite_losses_are_looked_at_once():
    monitor = Monitor(4)
    monitor.check_finite("none")
    monitor.add(0, outcome(torch.eye(4)))
    monitor.check_finite("none")
    assert monitor.unchecked == []
    monitor.add(1, outcome(torch.eye(4), float("nan")))
    with pytest.raises(NotFiniteError, match=r"at step 1 .*checkpoint: none"):
        monitor.check_finite("none")
