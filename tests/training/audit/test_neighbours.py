"""Who lies next to whom among stored features, against comparing all with all.

Shapes: N rows, C components, J neighbours.
"""

import numpy as np
import pytest

from pipeline.features import Embedded
from tests.pipeline.test_features import COUNTS, true_of, write
from training.audit import neighbours
from training.audit.neighbours import SCHEMA, SIDE, around, flattened, nearest


def lengthened(position_NC: np.ndarray) -> np.ndarray:
    """Of length 1."""
    return (position_NC / np.linalg.norm(position_NC, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def position_NC() -> np.ndarray:
    rng = np.random.default_rng(0)
    centre_KC = 2 * rng.standard_normal((12, 8))
    return lengthened(centre_KC[rng.integers(0, 12, 3_000)] + rng.standard_normal((3_000, 8)))


@pytest.fixture(scope="module")
def of_features(tmp_path_factory) -> Embedded:
    folder = str(tmp_path_factory.mktemp("features"))
    index = write(folder)
    return Embedded(index.of(folder, "train"), ("embedding",))


def brute(position_NC: np.ndarray, count: int) -> np.ndarray:
    similarity_NN = position_NC @ position_NC.T
    np.fill_diagonal(similarity_NN, -2)
    return np.argsort(-similarity_NN, axis=1)[:, :count]


def test_the_nearest_are_those_of_comparing_all_with_all(position_NC):
    similarity_NJ, row_NJ = nearest(position_NC, 5)
    expected_NJ = brute(position_NC, 5)
    assert (row_NJ == expected_NJ).mean() > 0.999  # but for ties
    np.testing.assert_allclose(similarity_NJ[:, 0], (position_NC * position_NC[row_NJ[:, 0]]).sum(1), atol=1e-5)
    assert (np.diff(similarity_NJ, axis=1) <= 1e-6).all()


def test_of_many_rows_lists_find_nearly_all_of_them(position_NC, monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT", 100)
    _, row_NJ = nearest(position_NC, 5)
    assert not (row_NJ == np.arange(len(row_NJ))[:, None]).any()
    found = [len(set(a) & set(b)) / 5 for a, b in zip(row_NJ, brute(position_NC, 5), strict=True)]
    assert np.mean(found) > 0.9


def test_a_copy_is_next_to_its_original_and_no_row_to_itself(position_NC):
    copied_NC = np.concatenate([position_NC[:50]] * 3)  # more copies than neighbours are asked for
    similarity_NJ, row_NJ = nearest(copied_NC, 1)
    assert (row_NJ[:, 0] % 50 == np.arange(150) % 50).all()
    assert (row_NJ[:, 0] != np.arange(150)).all()
    np.testing.assert_allclose(similarity_NJ, 1, atol=1e-5)


def test_all_rows_have_their_surroundings(of_features):
    found = around(of_features)
    assert found.table.schema == SCHEMA
    assert len(found.table) == COUNTS["train"]
    column = {name: found.table[name].to_numpy() for name in SCHEMA.names}
    row_of = {id_: row for row, id_ in enumerate(column["id"].tolist())}
    other_N = np.array([row_of[id_] for id_ in column["nearest"].tolist()])
    assert (column["label"][other_N] == column["nearest_label"]).all()
    true_N = true_of(COUNTS["train"])
    assert np.mean(true_N == true_N[other_N]) > 0.95  # classes lie apart
    again = around(of_features)
    assert again.table.equals(found.table)
    assert np.array_equal(again.map_P2, found.map_P2)


def test_pairs_come_once_and_have_different_labels(of_features):
    found = around(of_features)
    pairs = found.pairs(20)
    assert len(pairs) == 20
    assert all(row["label"] != row["nearest_label"] for row in pairs.to_pylist())
    assert len({frozenset((row["id"], row["nearest"])) for row in pairs.to_pylist()}) == 20
    assert (np.diff(pairs["similarity"].to_numpy()) <= 0).all()
    assert found.outliers(3)["isolation"].to_pylist() == sorted(found.table["isolation"].to_pylist())[::-1][:3]


def test_a_few_rows_are_no_reason_to_fail(tmp_path):
    index = write(tmp_path, counts={"train": 3, "probe": 2})
    found = around(Embedded(index.of(str(tmp_path), "train"), ("embedding",)))
    assert len(found.table) == len(found.map_P2) == 3
    assert len(found.outliers(20)) == 3


def test_on_the_map_neighbours_stay_neighbours(position_NC):
    point_P2 = flattened(position_NC[:600], seed=0)
    assert point_P2.min() >= 0
    assert point_P2.max() <= SIDE
    distance_PP = np.linalg.norm(point_P2[:, None] - point_P2[None], axis=2)
    np.fill_diagonal(distance_PP, np.inf)
    near = brute(position_NC[:600], 30)
    kept = [row in near[place] for place, row in enumerate(distance_PP.argmin(1))]
    assert np.mean(kept) > 0.8
