import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.engine.schedule import Schedule

# Numbers that a decimal fraction names: t_mul is 1, 1.1 … 3, and what binary rounding does to it must not show.
SCHEDULES = st.builds(
    Schedule,
    lr=st.floats(1e-4, 1),
    first_cycle=st.integers(1, 700),
    cycles=st.integers(1, 9),
    t_mul=st.integers(10, 30).map(lambda tenths: tenths / 10),
    m_mul=st.floats(0.3, 1.5),
)


def exact_starts(schedule: Schedule) -> list[Fraction]:
    """Where each cycle starts, one cycle after the other in exact arithmetic."""
    length, starts = Fraction(schedule.first_cycle), [Fraction(0)]
    for _ in range(schedule.cycles):
        starts.append(starts[-1] + length)
        length *= Fraction(round(schedule.t_mul * 10), 10)
    return starts


def test_table_1_ends_at_step_85498():
    assert Schedule(first_cycle=500, cycles=11).ends[-1] == Schedule().steps == 85_498


def test_first_cycles_of_the_reference():
    # lengths 500, 750, 1125, 1687.5: the fourth ends inside step 4062
    assert Schedule(first_cycle=500, cycles=4).ends == [500, 1250, 2375, 4063]


@given(schedule=SCHEDULES)
def test_ends_are_the_first_whole_step_past_each_cycle(schedule):
    assert schedule.ends == [math.ceil(start) for start in exact_starts(schedule)[1:]]
    assert schedule.steps == schedule.ends[-1]


@given(schedule=SCHEDULES, share=st.floats(0, 1, exclude_max=True))
def test_learning_rate_is_sgdr_step_by_step(schedule, share):
    step = int(share * schedule.steps)
    starts = exact_starts(schedule)
    cycle = sum(start <= step for start in starts) - 1
    done = (step - starts[cycle]) / (starts[cycle + 1] - starts[cycle])
    expected = schedule.lr * schedule.m_mul**cycle * math.cos(math.pi / 2 * float(done)) ** 2  # (1 + cos 2x)/2 = cos² x
    assert schedule.cycle(step) == cycle
    assert schedule.learning_rate(step) == pytest.approx(expected, rel=1e-6, abs=1e-12 * schedule.lr)


@given(schedule=SCHEDULES)
def test_a_cycle_end_is_the_next_cycle_s_first_step(schedule):
    for cycle, end in enumerate(schedule.ends):
        assert schedule.cycle(end - 1) <= cycle < schedule.cycle(end)
        # a real cycle start lies less than a step behind its first step
        length = schedule.start(cycle + 2) - schedule.start(cycle + 1)
        if length > 100:
            restart = schedule.lr * schedule.m_mul ** (cycle + 1)
            assert restart * (1 - (math.pi / 2 / length) ** 2) <= schedule.learning_rate(end) * (1 + 1e-9)


@pytest.mark.parametrize("t_mul", [1.0, 2.0, 3.0])
def test_whole_cycles_restart_high_and_end_at_the_floor(t_mul):
    schedule = Schedule(lr=0.1, first_cycle=200, cycles=5, t_mul=t_mul, m_mul=0.9)
    begins = [0, *schedule.ends]
    for cycle in range(5):
        assert begins[cycle + 1] - begins[cycle] == 200 * t_mul**cycle
        rates = [schedule.learning_rate(step) for step in range(begins[cycle], begins[cycle + 1])]
        assert rates[0] == pytest.approx(0.1 * 0.9**cycle)
        assert rates[len(rates) // 2] == pytest.approx(rates[0] / 2)
        assert rates == sorted(rates, reverse=True)
        assert 0 < rates[-1] < 1e-4 * rates[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("lr", -0.1), ("m_mul", 0.0), ("first_cycle", 0), ("cycles", 0), ("t_mul", 0.99)],
)
def test_impossible_schedules_name_the_field_and_its_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.* {value}"):
        Schedule(**{field: value})


@given(
    first=st.integers(1, 500),
    cycles=st.integers(1, 6),
    t_mul=st.floats(1, 3),
    steps=st.integers(1, 20_000),
)
def test_whole_cycles_fill_the_steps(first, cycles, t_mul, steps):
    wished = Schedule(first_cycle=first, cycles=cycles, t_mul=t_mul)
    filled = wished.filling(steps)
    cycle_weights = Schedule(first_cycle=1, cycles=filled.cycles, t_mul=t_mul).start(filled.cycles)
    assert filled.steps <= steps + 1 or filled.first_cycle == 1
    assert filled.steps > steps - cycle_weights - 1  # one step more in the first cycle would be too many
    assert (filled.lr, filled.t_mul, filled.m_mul) == (wished.lr, wished.t_mul, wished.m_mul)


def test_a_schedule_fills_its_own_steps():
    for made in (Schedule(), Schedule(first_cycle=57, cycles=3, t_mul=2), Schedule(first_cycle=10, cycles=7, t_mul=1)):
        assert made.filling(made.steps) == made


def test_drops_are_the_standard_decay_of_figure_2():
    schedule = Schedule(lr=0.1, first_cycle=60_000, cycles=1, drops=(40_000, 50_000))
    rates = [schedule.learning_rate(step) for step in (0, 39_999, 40_000, 49_999, 50_000, 59_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert schedule.steps == 60_000


def test_warm_up_rises_to_the_schedules_rate_or_is_a_tenth_of_it():
    plain = Schedule(lr=0.2, first_cycle=20, cycles=2)
    line, tenth = replace(plain, warm_up=4), replace(plain, warm_up=4, warm_up_kind="constant")
    for step in range(plain.steps):
        full = plain.learning_rate(step)
        assert line.learning_rate(step) == pytest.approx(full * min((step + 1) / 5, 1))
        assert tenth.learning_rate(step) == pytest.approx(full * (0.1 if step < 4 else 1))
    assert (line.ends, line.steps) == (plain.ends, plain.steps)
    with pytest.raises(ValueError, match=r"schedule.warm_up is -1: it must be 0 or more"):
        replace(plain, warm_up=-1)
