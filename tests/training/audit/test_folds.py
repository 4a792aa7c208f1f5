"""Labels judged from stored features: by heads that have not seen them, without a run, and together with one.

Shapes: N rows, L looks at each, K classes.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from pipeline.dataset import InputError
from tests.pipeline.test_features import CLASSES, COUNTS, WIDTH, true_of, write
from training.audit import audit, folds
from training.audit.audit import Options, _reduce
from training.audit.confusion import learned
from training.audit.evidence import reduce_visits
from training.audit.folds import Folds
from training.engine.batch import normalised
from training.runs import ledger, model_file

FOLDS = 3


def console() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def features(local_ray, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write(folder)
    audit.audit(Options(features=str(folder), folds=FOLDS, suggest=5), console())
    return folder


@pytest.fixture(scope="module")
def heads(features) -> Folds:
    return Folds(str(features), FOLDS, "winnow")


def trained(heads: Folds, fold: int) -> str:
    recipe = heads.recipe(fold)
    return f"{recipe.storage}/{recipe.name}"


def test_every_row_is_judged_once_by_the_head_that_has_not_seen_it(features, heads):
    all_ids, judged = set(), []
    for fold in range(FOLDS):
        held = heads.held_out(fold)
        ids = set(held.take(np.arange(len(held))).id_N.tolist())
        seen = set(ledger.read(trained(heads, fold))["id"].to_pylist())
        assert not ids & seen
        assert len(ids | seen) == COUNTS["train"]
        assert not ids & all_ids
        all_ids |= ids
    for table in heads.visits(console()):
        judged += table["id"].to_pylist()
    assert sorted(judged) == sorted([*all_ids] * 3)  # three looks each
    labels = pq.read_table(features / audit.LABELS)
    assert sorted(labels["id"].to_pylist()) == sorted(all_ids)
    assert set(labels["visits"].to_pylist()) == {3}


def test_the_judge_s_accuracy_is_that_on_the_evaluation_set(heads, tmp_path):
    """Whatever the order in which the index has its splits."""
    assert heads.index.splits == ("probe", "test", "train")
    assert heads.tests == heads.recipe(0).dataset.evaluate == ("test",)
    assert heads.trusted()[1] > 0.95
    write(tmp_path, counts={"train": 9, "probe": 6})
    with pytest.raises(InputError, match="has no evaluation set, only train and probe"):
        Folds(str(tmp_path), FOLDS, "winnow").images("")


def test_wrong_labels_are_found_without_a_run(features):
    labels = pq.read_table(features / audit.LABELS).sort_by("id")
    true_N, label_N = true_of(COUNTS["train"]), labels["label"].to_numpy()
    assert roc_auc_score(label_N != true_N, -labels["quality"].to_numpy()) > 0.97
    wrong_N, proposed_N = label_N != true_N, labels["proposed"].to_numpy()
    assert np.mean(proposed_N[wrong_N] == true_N[wrong_N]) > 0.95
    assert (proposed_N != label_N).all()  # what it would be if the label were wrong
    assert np.mean(labels["suspect"].to_numpy(zero_copy_only=False) == wrong_N) > 0.95


def test_judging_is_a_step_of_the_method_without_its_update(heads):
    """No weight moves, and a second look decides the same."""
    first = next(table for place, table in enumerate(heads.visits(console())) if place == 1)
    again = next(table for place, table in enumerate(heads.visits(console())) if place == 1)
    assert first.equals(again)
    assert len(np.unique(first["weight"].to_numpy())) > len(first) / 4


def test_quality_is_what_answers_and_the_labels_confusion_come_to(heads):
    logits, held = [], [heads.held_out(fold) for fold in range(FOLDS)]
    held = [each.take(np.arange(len(each))) for each in held]
    for fold, rows in enumerate(held):
        network = model_file.read(trained(heads, fold)).network()
        looks = [normalised(torch.from_numpy(rows.image_N[:, :, look : look + 1].copy())) for look in range(3)]
        logits.append(sum(network(look).detach().double() for look in looks) / 3)
    label_N = torch.from_numpy(np.concatenate([rows.label_N for rows in held]))
    posterior_NK = learned(torch.cat(logits), label_N).posterior(torch.cat(logits), label_N)
    expected = posterior_NK.gather(1, label_N[:, None])[:, 0].numpy()
    rows = pa.concat_tables(heads.visits(console()))
    found = reduce_visits(rows, CLASSES)
    assert found["id"].to_pylist() == sorted(np.concatenate([rows.id_N for rows in held]).tolist())
    order = np.argsort(np.concatenate([rows.id_N for rows in held]))
    np.testing.assert_allclose(found["quality"].to_numpy(), expected[order], atol=1e-4)


def test_the_page_says_what_judged_and_shows_no_pictures(features):
    told = (features / audit.PAGE).read_text()
    assert (
        "3 heads trained by winnow on features of test_resnet, each judging images that it has not seen, by 3 views"
        in told
    )
    assert "<img" not in told
    assert all(title in told for title in ("Map of the features", "Look-alikes with different labels", "Outliers"))
    neighbours = pq.read_table(features / audit.NEIGHBOURS)
    assert sorted(neighbours["id"].to_pylist()) == sorted(pq.read_table(features / audit.LABELS)["id"].to_pylist())
    suggested = (features / audit.SUGGESTIONS).read_text().splitlines()
    assert len(suggested) == 6
    assert suggested[1].startswith("train/")


def test_heads_that_are_trained_are_not_trained_again(features, monkeypatch):
    monkeypatch.setattr("training.launch._train_here", None)
    before = pq.read_table(features / audit.LABELS)
    audit.audit(Options(features=str(features), folds=FOLDS), console())
    assert pq.read_table(features / audit.LABELS).equals(before)


def test_both_sources_of_evidence_count_alike(heads):
    """However many visits each has: the mean of their means."""
    rng = np.random.default_rng(0)

    def visits(count: int, from_heads: bool) -> pa.Table:
        return pa.table(
            {
                "id": np.repeat(np.arange(7), count), "label": np.repeat(np.arange(7) % CLASSES, count),
                "pseudo_label": rng.integers(0, CLASSES, 7 * count), "trust": rng.random(7 * count),
                "weight": rng.random(7 * count), "confidence": rng.random(7 * count), "loss": rng.random(7 * count),
                "settled": rng.random(7 * count), "heads": np.full(7 * count, from_heads),
            }
        )  # fmt: skip

    of_run, of_heads = visits(4, False), visits(2, True)
    both = _reduce(pa.concat_tables([of_run, of_heads]), CLASSES)
    means = [
        reduce_visits(part.drop_columns("heads"), CLASSES)["probability"].to_numpy() for part in (of_run, of_heads)
    ]
    np.testing.assert_allclose(both["probability"].to_numpy(), np.mean(means, axis=0), rtol=1e-6)
    written = heads.write(console())
    assert sum(rows for _, rows in written) == 3 * COUNTS["train"]
    assert set(folds.read(written[0][0]).column_names) >= {"settled", "heads", "loss"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": ""}, "nothing to audit: give the folder of a run, or --features"),
        ({"folds": 1}, "folds is 1: it must be 2 or more"),
        ({"method": "best"}, "method is 'best': choose one of winnow"),
    ],
)
def test_what_cannot_be_audited_is_one_line(options, said, features):
    with pytest.raises((InputError, ValueError), match=said):
        audit.audit(Options(**{"features": str(features), **options}), console())


def test_features_of_other_images_are_refused(heads, tmp_path):
    write(tmp_path, counts={"probe": 6, "test": 6, "train": 9}, width=WIDTH)
    other = Folds(str(tmp_path), FOLDS, "winnow").images("")
    with pytest.raises(InputError, match="has features of 557 training images and the data set 9"):
        heads.require_same(other)
