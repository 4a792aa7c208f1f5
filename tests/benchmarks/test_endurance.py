import pytest

from benchmarks import endurance


def test_slopes_are_of_the_last_three_quarters_and_of_what_is_mostly_there():
    samples = [
        {"step": step, "seconds": 1.0, "driver": 100.0, "worker": 50 + 3e-3 * step} for step in range(0, 900, 100)
    ]
    samples[0]["driver"] = 7.0  # not yet warm
    samples[5]["actor"] = 1.0  # came and went
    del samples[3]["worker"]  # was being replaced
    samples[8]["driver"] = 900.0  # the end
    found = endurance.slopes(samples, 800)
    assert set(found) == {"driver", "worker"}
    assert found["driver"] == pytest.approx(0, abs=1e-9)
    assert found["worker"] == pytest.approx(3)
