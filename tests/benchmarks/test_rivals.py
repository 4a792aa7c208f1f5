"""What rivals' authors set by noise, size and length, against their papers and code."""

from dataclasses import replace

import pytest

from benchmarks.tables import Settings, chosen_cells, recipe_of

FULL = Settings(data="data", storage="runs")
SMALL = replace(FULL, scale="small")


def recipe(name, settings):
    (cell,) = chosen_cells((name,))
    return recipe_of(cell, settings, seed=0)


@pytest.mark.parametrize(("settings", "share"), [(FULL, 5_000 / 85_498), (SMALL, 1.0)])
def test_co_teaching_leaves_out_more_and_more_for_ten_epochs(settings, share):
    objective = recipe("A:cifar10:uniform:0.8:co-teaching", settings).objective
    assert objective.warm_up == pytest.approx(share)
    assert objective.noise_rate == pytest.approx(0.72)


def test_incv_tells_kinds_of_noise_apart():
    found = {
        noise: recipe(f"A:cifar10:{noise}:incv", SMALL).objective for noise in ("uniform:0.4", "uniform:0.8", "human")
    }
    assert [each.symmetric for each in found.values()] == [True, True, False]
    assert {each.pace for each in found.values()} == {1.0}  # ten epochs are more than is left
    assert recipe("A:cifar10:uniform:0.4:incv", FULL).objective.pace == pytest.approx(5_000 / 42_749)


@pytest.mark.parametrize("method", ["forward", "glc"])
@pytest.mark.parametrize("settings", [FULL, SMALL])
def test_corrections_begin_where_a_cycle_ends(method, settings):
    made = recipe(f"A:cifar10:uniform:0.4:{method}", settings)
    begins = made.objective.warm_up * made.schedule.steps
    assert round(begins) in made.schedule.ends
    assert made.schedule.learning_rate(round(begins) - 1) < 0.001
    assert made.schedule.steps == recipe("A:cifar10:uniform:0.4:supervised", settings).schedule.steps


def test_glc_s_trusted_images_count_once_an_epoch():
    assert recipe("A:cifar10:uniform:0.4:glc", SMALL).objective.trusted_weight == pytest.approx(0.05)
    assert recipe("A:cifar10:uniform:0.4:glc", FULL).objective.trusted_weight == pytest.approx(0.002)


@pytest.mark.parametrize("settings", [FULL, SMALL])
def test_m_correction_begins_after_the_rate_has_dropped(settings):
    made = recipe("A:cifar10:uniform:0.4:m-correction", settings)
    begins = made.objective.warm_up * made.schedule.steps
    rates = [made.schedule.learning_rate(round(step)) for step in (0, begins, made.schedule.steps - 1)]
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_elr_knows_asymmetric_noise():
    found = [recipe(f"A:cifar10:{noise}:elr", SMALL).objective for noise in ("asymmetric:0.4", "uniform:0.4")]
    assert [(each.strength, each.beta) for each in found] == [(1.0, 0.9), (3.0, 0.7)]


def test_others_are_left_as_they_are():
    made = recipe("A:cifar10:human:winnow", SMALL)
    assert made.schedule.ends == [400]
