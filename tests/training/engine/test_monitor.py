import pytest
import torch

from training.engine.monitor import WINDOW, Monitor, NotFiniteError
from training.objectives.interface import Outcome
from training.objectives.losses import plain_coefficients


def outcome(prediction_BK, total: float = 1.0) -> Outcome:
    logits_BK = torch.zeros(len(prediction_BK), prediction_BK.shape[1])
    coefficients = plain_coefficients(logits_BK, torch.zeros(len(prediction_BK), dtype=torch.int64))
    return Outcome(torch.tensor(total), {"weighted": torch.tensor(total / 2)}, coefficients, prediction_BK)


LABELS = torch.tensor([0, 1, 2, 3])


def watched(prediction_BK, label_B=LABELS, steps: int = WINDOW) -> Monitor:
    monitor = Monitor(prediction_BK.shape[1])
    for step in range(steps):
        monitor.add(step, outcome(prediction_BK), label_B)
    return monitor


@pytest.mark.parametrize(
    ("prediction_BK", "expected"),
    [
        (torch.eye(4), 1.0),  # confident and balanced
        (0.01 * torch.eye(4) + 0.2475, 1.0),  # nearly flat, yet each image has its own answer
        (torch.full((4, 4), 0.25), 0.0),  # undecided
        (torch.eye(4)[[2] * 4], 0.0),  # one confident answer
        (torch.tensor([[0.6, 0.2, 0.1, 0.1]] * 4), 0.0),  # one unsure answer
        (torch.eye(4)[[0, 1, 0, 1]], 0.5),  # two of four classes
    ],
)
def test_diversity_is_the_entropy_of_answers_over_that_of_labels(prediction_BK, expected):
    assert watched(prediction_BK).diversity() == pytest.approx(expected, abs=1e-6)


def test_diversity_is_measured_against_unbalanced_labels_too():
    answers = torch.eye(4)[[0, 0, 0, 1]]
    assert watched(answers, torch.tensor([2, 2, 2, 3])).diversity() == pytest.approx(1)


def test_one_answer_a_step_is_a_collapse_though_it_changes():
    monitor = Monitor(4)
    for step in range(WINDOW):
        monitor.add(step, outcome(torch.eye(4)[[step % 4] * 4]), LABELS)
    assert monitor.diversity() == pytest.approx(0)


def test_collapse_warns_once_when_a_window_has_passed():
    collapsed = torch.full((4, 4), 0.25)
    monitor = watched(collapsed, steps=WINDOW - 1)
    assert monitor.collapse_warning() is None
    monitor.add(WINDOW, outcome(collapsed), LABELS)
    warning = monitor.collapse_warning()
    assert warning is not None
    assert "\n" not in warning
    assert "--method winnow" in warning
    assert monitor.collapse_warning() is None


def test_only_the_last_window_is_judged():
    monitor = watched(torch.eye(4), steps=3 * WINDOW)
    assert monitor.collapse_warning() is None
    for step in range(WINDOW - 1):
        monitor.add(step, outcome(torch.full((4, 4), 0.25)), LABELS)
    assert monitor.diversity() == pytest.approx(0.01)
    assert monitor.collapse_warning() is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_named_with_its_step_and_terms(bad):
    monitor = Monitor(4)
    for step, total in enumerate([1.0, 2.0, bad, 3.0, bad]):
        monitor.add(step + 40, outcome(torch.eye(4), total), LABELS)
    with pytest.raises(NotFiniteError, match=rf"the loss is {bad} at step 42 \(weighted {bad}\).*step 30.*schedule.lr"):
        monitor.check_finite("step 30")


def test_finite_losses_are_looked_at_once():
    monitor = Monitor(4)
    monitor.check_finite("none")
    monitor.add(0, outcome(torch.eye(4)), LABELS)
    monitor.check_finite("none")
    assert monitor.unchecked == []
    monitor.add(1, outcome(torch.eye(4), float("nan")), LABELS)
    with pytest.raises(NotFiniteError, match=r"at step 1 .*checkpoint: none"):
        monitor.check_finite("none")
