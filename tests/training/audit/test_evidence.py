"""The reduction of a ledger against pandas, row by row, and what it comes to against plain counting."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.audit import evidence
from training.audit.evidence import HISTOGRAMS, SCHEMA, Findings, lowest, quality, reduce_visits, settled
from training.engine.schedule import Schedule

CLASSES = 4


def visits(rng: np.random.Generator, ids: int, count: int) -> pa.Table:
    """`count` random visits of `ids` examples, each of one label; values in eighths, so that sums are exact."""
    which = np.concatenate([np.arange(ids), rng.integers(ids, size=count - ids)])
    name = rng.choice(2**62, ids, replace=False)
    label = rng.integers(CLASSES, size=ids)
    eighths = lambda low, high: rng.integers(low, high, count).astype(np.float32) / 8  # noqa: E731
    return pa.table(
        {
            "id": name[which],
            "label": label[which].astype(np.int32),
            "pseudo_label": rng.integers(CLASSES, size=count).astype(np.int32),
            "trust": rng.integers(2, size=count).astype(np.float32),
            "weight": eighths(0, 30),
            "confidence": eighths(1, 9),
            "loss": eighths(0, 40),
            "settled": eighths(1, 9),
        }
    )


def by_pandas(table: pa.Table, classes: int = CLASSES) -> pd.DataFrame:
    """The same reduction, an id at a time."""
    made = []
    for name, rows in table.to_pandas().groupby("id"):
        w = rows["settled"]
        votes = (w * rows["confidence"]).groupby(rows["pseudo_label"]).sum()
        proposed = votes.index[votes == votes.max()].min()
        voted = rows["pseudo_label"] == proposed
        probability = np.average(np.exp(-rows["loss"].astype(float)), weights=w)
        quality = probability / (probability + (1 - probability) / (classes - 1))
        label = rows["label"].iloc[0]
        made.append(
            {
                "id": name,
                "label": label,
                "proposed": proposed,
                "quality": quality,
                "suspect": quality < 0.5 and proposed != label,
                "probability": probability,
                "weight": rows["weight"].mean(),
                "trust": rows["trust"].mean(),
                "confidence": np.average(rows["confidence"].where(voted, 0), weights=w),
                "stability": w[voted].sum() / w.sum(),
                "visits": len(rows),
            }
        )
    return pd.DataFrame(made)


@pytest.mark.parametrize(("ids", "count"), [(1, 1), (1, 9), (40, 40), (40, 400), (7, 2000)])
def test_reduction_agrees_with_pandas(ids, count):
    table = visits(np.random.default_rng(ids + count), ids, count)
    made = reduce_visits(table, CLASSES)
    assert made.schema == SCHEMA
    pd.testing.assert_frame_equal(made.to_pandas(), by_pandas(table), check_dtype=False, rtol=1e-6)


@given(seed=st.integers(0, 10**6), ids=st.integers(1, 8), more=st.integers(0, 30))
def test_the_order_of_visits_is_nothing_and_values_stay_in_bounds(seed, ids, more):
    rng = np.random.default_rng(seed)
    table = visits(rng, ids, ids + more)
    made = reduce_visits(table, CLASSES)
    assert made.equals(reduce_visits(table.take(pa.array(rng.permutation(len(table)))), CLASSES))
    assert len(made) == ids
    assert sum(made["visits"].to_pylist()) == len(table)
    for name in ("quality", "probability", "trust", "confidence", "stability"):
        assert all(0 <= value <= 1 for value in made[name].to_pylist()), name
    assert np.all(np.diff(made["id"].to_numpy()) > 0)


def test_the_quality_is_bayes_rule():
    probability = np.array([0.0, 0.1, 0.25, 0.9, 1.0])
    right, wrong = probability * 0.5, (1 - probability) * 0.5 / 3  # a wrong label is one of three others
    np.testing.assert_allclose(quality(probability, 4), right / (right + wrong))
    assert quality(np.array([1 / CLASSES]), CLASSES) == 0.5


def test_visits_count_more_the_further_the_rate_of_their_cycle_has_fallen():
    schedule = Schedule(lr=0.1, first_cycle=10, cycles=3, t_mul=2.0)
    weight = settled(np.arange(schedule.steps), schedule)
    for first, last in ((0, 9), (10, 29), (30, 69)):
        assert np.all(np.diff(weight[first : last + 1]) > 0)
        assert weight[first] == pytest.approx(evidence.FRESH)
    assert settled(np.array([35, 5, 35]), schedule).tolist() == [weight[35], weight[5], weight[35]]


# ---- what all rows come to -------------------------------------------------------------------------------------------


def findings(tables: list[pa.Table], trusted=(1, 1, 1, 1), **keep: int) -> Findings:
    found = Findings(np.array(trusted), **{"per_class": 3, "overall": 5, "suggestions": 6, **keep})
    for table in tables:
        found.add(table)
    return found


@pytest.fixture(scope="module")
def reduced() -> pa.Table:
    return reduce_visits(visits(np.random.default_rng(3), 300, 1500), CLASSES)


def test_counts_agree_with_pandas(reduced):
    found, rows = findings([reduced]), reduced.to_pandas()
    for k, of_class in rows.groupby("label"):
        assert found.count_K[k] == len(of_class)
        assert found.suspect_K[k] == of_class["suspect"].sum()
        assert found.wrong_K[k] == pytest.approx((1 - of_class["quality"].astype(float)).sum())
        for other, moved in of_class.groupby("proposed"):
            expected = 0 if other == k else (1 - moved["quality"].astype(float)).sum()
            assert found.moved_KK[k, other] == pytest.approx(expected)
    assert found.visits == 1500
    for name, (end, bins) in HISTOGRAMS.items():
        edges = np.append(np.linspace(0, end, bins + 1)[:-1], np.inf)
        for row, chosen in enumerate((rows["suspect"], ~rows["suspect"])):
            expected = pd.cut(rows[name][chosen], edges, right=False).value_counts(sort=False)
            assert (
                abs(found.histograms[name][row].cumsum() - expected.to_numpy().cumsum()).max() <= 4
            )  # values on edges
            assert found.histograms[name][row].sum() == chosen.sum()


def test_tables_may_come_in_any_pieces(reduced):
    whole, pieces = findings([reduced]), findings([reduced.slice(200), reduced.slice(0, 20), reduced.slice(20, 180)])
    for name in ("suspects", "hardest", "unsure"):
        assert getattr(whole, name).equals(getattr(pieces, name)), name
    np.testing.assert_array_equal(whole.count_K, pieces.count_K)
    np.testing.assert_allclose(whole.moved_KK, pieces.moved_KK)


def test_kept_rows_are_the_extreme_ones(reduced):
    found, rows = findings([reduced]), reduced.to_pandas()
    for k, of_class in rows[rows["suspect"]].groupby("label"):
        expected = of_class.sort_values(["quality", "id"])["id"].head(3).tolist()
        assert [row["id"] for row in found.suspects.to_pylist() if row["label"] == k] == expected
    belief = np.maximum(rows["probability"], rows["confidence"])
    assert found.hardest["id"].to_pylist() == rows["id"][np.lexsort((rows["id"], belief))].head(5).tolist()


def test_suggestions_are_unsure_ones_of_classes_with_little_trust():
    quality = np.array([0.5, 0.49, 0.48, 0.1, 0.5, 0.45, 0.9, 0.5], np.float32)
    proposed = np.array([0, 0, 0, 0, 1, 1, 1, 2], np.int32)
    rows = {name: np.zeros(8) for name in SCHEMA.names} | {"id": np.arange(8), "quality": quality, "proposed": proposed}
    table = pa.table([pa.array(rows[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)
    found = findings([table], trusted=(0, 0, 9), suggestions=4).suggested()
    # Worth: 1, .98/2, .96/3 … of class 0; 1, .9/2 of class 1; 1/10 of class 2.
    assert found["id"].to_pylist() == [0, 4, 1, 5]
    assert findings([table], trusted=(0, 0, 9), suggestions=0).suggested().num_rows == 0
    assert len(findings([table], trusted=(0, 0, 9), suggestions=99).suggested()) == 8


def test_lowest_of_each_value_of_a_column():
    empty = SCHEMA.append(pa.field("key", pa.float64())).empty_table()
    columns = {name: np.zeros(6) for name in SCHEMA.names} | {"id": np.arange(6), "label": np.array([0, 1, 0, 1, 0, 1])}
    table = pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)
    key = np.array([3.0, 1.0, 2.0, 1.0, 9.0, 0.0])
    assert lowest(empty, table, key, 2, "label")["id"].to_pylist() == [2, 0, 5, 1]
    assert lowest(lowest(empty, table, key, 2), table.slice(0, 0), key[:0], 2)["id"].to_pylist() == [5, 1]
