"""Benchmarks of heads: what stands beside them has seen nothing of what it judges, and all read the same features.

Shapes: N rows, L looks, D numbers of an embedding.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import features as speed
from benchmarks.carry_over import HIGH, LOW, points
from benchmarks.heads import FOLDS, Sample, opinion, out_of_fold, regression, store
from pipeline.features import Features, Made
from pipeline.index import read_index
from training.audit import audit
from training.audit.evidence import SCHEMA

CLASSES, WIDTH = 3, 6
HOW = Made("made_up", "0" * 64, 32, 1.0, "bilinear", WIDTH, 1, 0)


@pytest.fixture(scope="module")
def made() -> tuple[Sample, np.ndarray]:
    """Two looks at 150 rows whose classes lie apart, a third of the training labels wrong."""
    rng = np.random.default_rng(0)
    true_N, split_N = rng.integers(0, CLASSES, 150), np.repeat(["train", "probe", "test"], [90, 30, 30])
    label_N = np.where((split_N == "train") & (rng.random(150) < 1 / 3), (true_N + 1) % CLASSES, true_N)
    centre_KD = 2 * rng.standard_normal((CLASSES, WIDTH))
    looks_NLD = (centre_KD[true_N][:, None] + rng.standard_normal((150, 2, WIDTH))).astype(np.float16)
    names = ("ant", "bee", "cat")
    return Sample("made_up", 7 * np.arange(150), [b""] * 150, label_N, true_N, split_N, names), looks_NLD


def test_regression_judges_rows_whose_labels_it_has_not_seen(made):
    of, looks_NLD = made
    x_NLD = torch.from_numpy(looks_NLD.astype(np.float32))
    before_NK = out_of_fold(of, x_NLD, steps=30, seed=0)
    np.testing.assert_allclose(before_NK.sum(1), 1)
    assert (before_NK.argmax(1) == of.true_N[of.of("train")]).mean() > 0.8
    held = np.arange(90) % FOLDS == 2
    label_N = of.label_N.copy()
    label_N[of.of("train")[held]] = 0
    after_NK = out_of_fold(Sample(**{**vars(of), "label_N": label_N}), x_NLD, steps=30, seed=0)
    np.testing.assert_array_equal(after_NK[held], before_NK[held])
    assert not np.allclose(after_NK[~held], before_NK[~held])


def test_regression_finds_what_separates_the_classes(made):
    of, looks_NLD = made
    layer = regression(torch.from_numpy(looks_NLD.astype(np.float32)), of.true_N, CLASSES, 200, seed=0)
    answer_N = layer(torch.from_numpy(looks_NLD[:, 0].astype(np.float32))).argmax(1).numpy()
    assert (answer_N == of.true_N).mean() > 0.95


def test_what_is_stored_is_a_data_set_of_features_and_opinions_come_in_its_order(made, tmp_path):
    of, looks_NLD = made
    store(of, HOW, looks_NLD, str(tmp_path))
    assert read_index(str(tmp_path)).class_names == of.names
    dataset = Features("custom", WIDTH).load(str(tmp_path), seed=0)
    held = dataset.train.take(np.arange(90))
    assert np.array_equal(held.id_N, of.id_N[:90])
    assert np.array_equal(held.image_N[:, 0], looks_NLD[:90])
    columns = {field.name: np.zeros(90) for field in SCHEMA} | {"id": of.id_N[:90][::-1], "quality": np.arange(90)}
    table = pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)
    (tmp_path / "audit").mkdir()
    pq.write_table(table, tmp_path / audit.LABELS)
    assert opinion(str(tmp_path), of.id_N[:90]).quality_N.tolist() == list(range(90))[::-1]


def test_points_lie_in_their_ranges_and_apart():
    drawn = [(np.log2(each.p), np.log2(each.kl), each.lambda0) for each in points(8)]
    assert (np.array(drawn) >= np.array(LOW) - 0.01).all()
    assert (np.array(drawn) <= np.array(HIGH) + 0.01).all()
    assert len(set(drawn)) == 8


def test_a_step_stands_beside_softmax_regression_on_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "STEPS", 2)
    settings = speed.Settings(out="", rows=2_000, width=WIDTH)
    speed.write(str(tmp_path), settings.rows, WIDTH)
    told = speed.steps(str(tmp_path), settings)
    assert told["ratio"] == pytest.approx(told["method_ms"] / told["softmax_ms"], rel=0.05)
