"""Ranges as they are written, checked against recipes, and the points where recipes lie."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from pipeline.dataset import InputError
from training import digits
from tuning import cifar, clothing1m, custom, food101n, space, webvision
from tuning import digits as tuned_digits

NUMBER = st.floats(1e-6, 1e6)


@given(NUMBER, NUMBER, st.booleans())
def test_ranges_survive_being_written(low, high, log):
    if low >= high:
        return
    made = {"a.b": (tune.loguniform if log else tune.uniform)(low, high)}
    again = space.parse(f"{path}={text}" for path, text in space.as_text(made).items())["a.b"]
    assert (again.lower, again.upper, space.logarithmic(again)) == (low, high, log)


@given(st.integers(1, 1000), st.integers(1, 1000), st.booleans())
def test_ranges_of_whole_numbers_hold_both_ends(low, more, log):
    text = f"schedule.first-cycle={'log:' if log else ''}{low}..{low + more}"
    domain = space.parse([text])["schedule.first_cycle"]
    drawn = set(domain.sample(size=200)) if low + more < 6 and not log else set()
    assert drawn <= set(range(low, low + more + 1))
    assert (domain.lower, domain.upper) == (low, low + more + 1)
    assert space.as_text({"schedule.first_cycle": domain}) == {"schedule.first_cycle": text.partition("=")[2]}


def test_values_keep_their_kind():
    (domain,) = space.parse(["x=1,0.5,forward"]).values()
    assert domain.categories == [1, 0.5, "forward"]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("objective.p", "names nothing to search"),
        ("=1..2", "names nothing to search"),
        ("objective.p=2..1", "empty range"),
        ("objective.p=1..1", "empty range"),
        ("objective.p=log:0..1", "above 0"),
        ("objective.p=1..many", "many is not a number"),
        ("objective.p=..3", "nothing is not a number"),
        ("objective.p=1..inf", "inf is not a number"),
        ("objective.p=1..nan", "nan is not a number"),
    ],
)
def test_what_is_no_range_is_refused(word, why):
    with pytest.raises(InputError, match=why):
        space.parse([word])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("objective.kll=1..2", "objective.kl"),
        ("objective.p=-1.0..2", "must be 0 or more"),
        ("schedule.first_cycle=0.5..2.5", "schedule.first"),
        ("objective.engine=forward,backwards", "backwards"),
    ],
)
def test_what_a_recipe_cannot_be_is_refused(word, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        space.check(space.parse([word]), digits.recipe("winnow"))
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("script", [cifar, clothing1m, custom, food101n, webvision, tuned_digits])
def test_every_space_fits_its_recipe_and_starts_from_it(script):
    recipe = script.recipe("winnow")
    space.check(script.SPACE, recipe)
    (point,) = space.points(script.SPACE, [recipe])
    assert {"objective.p", "objective.kl", "objective.threshold", "objective.lambda0", "objective.lookahead_lr"} <= set(
        point
    )
    assert point["objective.p"] == recipe.objective.p


def test_points_are_whole_and_within_their_ranges_and_repeat_nothing():
    searched = space.parse(["objective.p=1..3", "objective.lookahead_lr=0.1,0.2", "schedule.first_cycle=500..900"])
    plain = digits.recipe("reference")  # p 5, first cycle 400
    follows = replace(plain, objective=replace(plain.objective, p=2.0, lookahead_lr=None))
    within = replace(plain, objective=replace(plain.objective, p=0.5, lookahead_lr=0.2))
    assert space.points(searched, [plain, plain, follows, within]) == [
        {"objective.p": 3.0, "objective.lookahead_lr": 0.1, "schedule.first_cycle": 500},
        {"objective.p": 2.0, "objective.lookahead_lr": 0.1, "schedule.first_cycle": 500},
        {"objective.p": 1.0, "objective.lookahead_lr": 0.2, "schedule.first_cycle": 500},
    ]
    OptunaSearch(
        space=searched, metric="top1", mode="max", points_to_evaluate=space.points(searched, [plain, follows])
    )  # refuses points with less than all fields
