"""A folder of predictions: which rows are in which part, and how a stream of results becomes parts."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import predictions
from pipeline.predictions import PART_ROWS, Predictions, regrouped


def tables(lengths: list[int]) -> list[pa.Table]:
    """Tables of these lengths whose column counts on through all of them."""
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return [
        pa.table({"n": pa.array(range(start, start + length), pa.int64())})
        for start, length in zip(starts, lengths, strict=True)
    ]


@given(st.lists(st.integers(0, 7), min_size=1), st.lists(st.integers(1, 9)))
def test_rows_are_regrouped_in_order(came, wanted):
    rows, enough = list(range(sum(came))), [n for n in range(len(wanted)) if sum(wanted[: n + 1]) <= sum(came)]
    ends = [sum(wanted[: n + 1]) for n in enough]
    expected = [rows[end - wanted[n] : end] for n, end in zip(enough, ends, strict=True)]
    found = [table["n"].to_pylist() for table in regrouped(tables(came), wanted[: len(enough)])]
    assert found == expected
    if len(enough) < len(wanted):
        with pytest.raises(RuntimeError, match=r"the results end \d rows too early"):
            list(regrouped(tables(came), wanted))


@pytest.mark.parametrize("rows", [1, PART_ROWS - 1, PART_ROWS, PART_ROWS + 1, 10 * PART_ROWS])
def test_parts_hold_every_row_once(rows):
    about = Predictions("model", "data", "", rows, ("a", "b"), 1, False)
    held = [row for part in range(about.parts) for row in about.rows_of(part)]
    assert held == list(range(rows))
    assert max(len(about.rows_of(part)) for part in range(about.parts)) <= PART_ROWS
    assert len({about.name(part) for part in range(about.parts)}) == about.parts


def test_what_is_written_is_read_back(tmp_path):
    about = Predictions("model", "data", "train", PART_ROWS + 3, ("a", "b"), 1, False)
    assert predictions.begin(str(tmp_path), about) == [0, 1]
    assert predictions.read(str(tmp_path)) == about
    columns = {field.name: pa.nulls(3, field.type) for field in predictions.SCHEMA}
    predictions.write_part(str(tmp_path), about, 1, pa.table({**columns, "id": [7, 8, 9]}))
    assert predictions.begin(str(tmp_path), about) == [0]
    assert predictions.missing(str(tmp_path), about) == [0]
    rows = predictions.read_rows(str(tmp_path), about, range(PART_ROWS + 1, PART_ROWS + 3), ("id",))
    assert rows["id"].to_pylist() == [8, 9]
