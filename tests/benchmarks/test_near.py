import pytest

from benchmarks.near import measure


@pytest.mark.parametrize("kind", ["random", "skewed", "equal"])
def test_planted_copies_are_found(kind):
    row = measure(kind, 3000)
    assert row["planted_found"] == row["planted"] == (0 if kind == "equal" else 3)
    assert row["pairs"] < 3 * 3 * 3000
