"""Cleaned shards: every row as a plain dictionary of the audit would have it, whatever is killed or does not fit."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline import job, predictions, shards, storage
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.index import SHARD_SCHEMA, read_index
from pipeline.predictions import Predictions
from pipeline.shards import Options, ingest
from pipeline.unlabelled import open_images
from tests.pipeline import layouts
from training import clean
from training.clean import Request

CLASSES, TRAIN = 3, 60
Rows = list[dict]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def data(local_ray, tmp_path_factory) -> str:
    """Shards of 60 training images in files of 25, 3 trusted and 6 of a test set."""
    folder = tmp_path_factory.mktemp("data")
    files = {}
    for k, of_class in enumerate(layouts.photos(CLASSES, 23)):
        for number, image in enumerate(of_class):
            files[f"{ {0: 'probe', 1: 'test', 2: 'test'}.get(number, 'train') }/{k}/{number}.jpg"] = image
    layouts.write(f"{folder}/raw", files)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "SHARD_ROWS", 25)
        ingest(Custom(), f"{folder}/raw", Options(f"{folder}/shards"), quiet())
    return f"{folder}/shards"


def rows_of(url: str) -> Rows:
    """All rows of shards, in order, read as any tool would."""
    return [row for shard in read_index(url).shards for row in pq.read_table(f"{url}/{shard.name}").to_pylist()]


def audit_of(data: str) -> Rows:
    """An audit of all training images but the first two, shuffled, with every mixture of belief."""
    rng = np.random.default_rng(0)
    told = []
    for row in [row for row in rows_of(data) if row["split"] == "train"][2:]:
        told.append({"id": row["id"], "label": row["label"], "proposed": int(rng.integers(CLASSES)), "epochs": 2})
        told[-1] |= {name: float(np.float32(rng.random())) for name in ("quality", "trust", "confidence", "stability")}
        told[-1]["weight"] = float(np.float32(3 * rng.random()))
    return [told[row] for row in rng.permutation(len(told))]


def write_audit(run: Path, rows: Rows) -> str:
    (run / "audit").mkdir(exist_ok=True, parents=True)
    (run / "recipe.json").write_text('{"dataset": {"kind": "Sharded", "dataset": "custom"}}')
    float32 = {name: pa.float32() for name in ("quality", "weight", "trust", "confidence", "stability")}
    schema = pa.schema({name: float32.get(name, pa.int64()) for name in rows[0]})
    pq.write_table(pa.Table.from_pylist(rows, schema), run / "audit" / "labels.parquet")
    return str(run)


@pytest.fixture
def run(data, tmp_path) -> str:
    return write_audit(tmp_path / "run", audit_of(data))


def expected(data: str, quality: float, confidence: float) -> Rows:
    """What each row should be, from the definition."""
    said = {row["id"]: row for row in audit_of(data)}
    rows = []
    for row in rows_of(data):
        row = {**row, "given_label": row["label"], "weight": 1.0, "label_quality": 1.0}
        if row["split"] == "train":
            row["label_quality"] = None
        if one := said.get(row["id"]):
            row |= {"weight": np.float32(one["weight"]), "label_quality": one["quality"]}
            if one["quality"] < quality and one["confidence"] >= confidence and one["proposed"] != row["label"]:
                row |= {"label": one["proposed"], "weight": 1.0}
        rows.append(row)
    return rows


@pytest.mark.parametrize(("quality", "confidence"), [(0.5, 0.5), (0.8, 0.1), (0.0, 0.0)])
def test_every_row_is_as_the_audit_says(data, run, tmp_path, quality, confidence):
    console = quiet()
    out = f"{tmp_path}/out"
    index = clean.clean(Request(run, data, out, quality=quality, confidence=confidence), console)
    assert rows_of(out) == expected(data, quality, confidence)
    changed = sum(row["label"] != row["given_label"] for row in rows_of(out))
    assert changed if quality else not changed
    assert f"{changed} of 60 training labels are corrected" in console.file.getvalue()

    before = read_index(data)
    assert index == read_index(out)
    assert (index.dataset, index.class_names) == (before.dataset, before.class_names)
    assert [(shard.name, shard.split, shard.rows) for shard in index.shards] == [
        (shard.name, shard.split, shard.rows) for shard in before.shards
    ]
    for shard in index.shards:
        labels = pq.read_table(f"{out}/{shard.name}")["label"].to_numpy()
        assert shard.per_class == tuple(np.bincount(labels, minlength=CLASSES))
    assert index.options["cleaned"] == {"quality": quality, "confidence": confidence}
    assert pq.read_schema(f"{out}/{index.shards[0].name}").names[: len(SHARD_SCHEMA)] == SHARD_SCHEMA.names
    held = index.of(out, "train").take(np.arange(TRAIN))  # as training reads them
    assert held.label_N.tolist() == [row["label"] for row in rows_of(out) if row["split"] == "train"]
    assert not Path(out, job.WORK).exists()

    again = quiet()
    assert clean.clean(Request(run, data, out, quality=quality, confidence=confidence), again) == index
    assert "is whole already" in again.file.getvalue()
    with pytest.raises(InputError, match="holds shards of other data or options: choose another --out"):
        clean.clean(Request(run, data, out, quality=0.9, confidence=confidence), quiet())
    with pytest.raises(InputError, match="holds shards of other data or options"):
        clean.clean(Request(run, data, data), quiet())


def test_shards_and_audit_may_be_in_the_cloud(data, tmp_path, bucket):
    source, target = storage.connect(data), storage.connect(f"{bucket}/data")
    for name in ("index.json", *(shard.name for shard in read_index(data).shards)):
        storage.write(target[0], f"{target[1]}/{name}", storage.read(source[0], f"{source[1]}/{name}"))
    run = write_audit(tmp_path / "run", audit_of(data))
    fs, path = storage.connect(f"{bucket}/run")
    for name in (clean.LABELS, "recipe.json"):
        storage.write(fs, f"{path}/{name}", Path(run, name).read_bytes())
    index = clean.clean(Request(f"{bucket}/run", f"{bucket}/data", f"{bucket}/out"), quiet())
    held = index.of(f"{bucket}/out", "train").take(np.arange(TRAIN))
    assert held.label_N.tolist() == [row["label"] for row in expected(data, 0.5, 0.5) if row["split"] == "train"]


def test_a_label_that_a_person_gave_since_stays(data, tmp_path):
    """An image may have moved from the training set to the trusted ones after the audit."""
    (trusted,) = [row for row in rows_of(data) if row["split"] == "probe"][:1]
    doubt = {"label": 2 - trusted["label"], "proposed": (trusted["label"] + 1) % 3, "quality": 0.0, "confidence": 1.0}
    rows = audit_of(data)
    run = write_audit(tmp_path / "run", [*rows, {**rows[0], "id": trusted["id"], **doubt}])
    clean.clean(Request(run, data, f"{tmp_path}/out"), quiet())
    assert rows_of(f"{tmp_path}/out") == expected(data, 0.5, 0.5)


class Killed(BaseException):
    """Takes no notice of `except Exception`, as a signal does."""


def test_killed_and_started_again_it_goes_on(data, run, tmp_path, monkeypatch):
    whole = clean.clean(Request(run, data, f"{tmp_path}/whole"), quiet())
    out = f"{tmp_path}/out"
    make = job.make

    def killed(*arguments):
        coming = make(*arguments)
        yield next(coming)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(job, "make", killed)
        with pytest.raises(Killed):
            clean.clean(Request(run, data, out), quiet())
    with pytest.raises(InputError, match=r"no index.json"):
        read_index(out)
    records = sorted(Path(out, job.WORK).glob("*.json"))
    assert records
    for record in records[1:]:  # others may have been finished before the cluster heard of it, or may be yet
        record.unlink()
    kept = Path(out, records[0].name.removesuffix(".json"))
    made_at = kept.stat().st_mtime_ns
    console = quiet()
    assert clean.clean(Request(run, data, out), console) == whole
    assert re.search(rf"[1-9] of {len(whole.shards)} shards are done", console.file.getvalue())
    assert kept.stat().st_mtime_ns == made_at
    assert rows_of(out) == rows_of(f"{tmp_path}/whole")


# ---- the audit -------------------------------------------------------------------------------------------------------

IDS = st.integers(0, 2**63 - 1) | st.integers(0, 40)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    known=st.lists(IDS, min_size=1, max_size=30, unique=True), asked=st.lists(IDS, max_size=30), chunk=st.integers(1, 9)
)
def test_the_audit_is_looked_up_as_in_a_dictionary(tmp_path, monkeypatch, known, asked, chunk):
    """Chunk by chunk; the object store is a list here."""
    store: list = []
    monkeypatch.setattr(ray, "put", lambda value: store.append(value) or len(store) - 1)
    monkeypatch.setattr(ray, "get", lambda ref: store[ref])
    monkeypatch.setattr(clean, "CHUNK_ROWS", chunk)
    rows = [
        {"id": one, "label": n % 3, "proposed": (n + 1) % 3, "quality": n / 64, "weight": n / 8, "confidence": n / 32}
        for n, one in enumerate(known)
    ]
    audit = clean.read_audit(write_audit(tmp_path, rows), 3)
    assert len(store) == len(audit.chunks) == -(-len(known) // chunk)
    asked_N = np.array([*asked, *known[::2]], np.int64)
    known_N, said = audit.of(asked_N)
    table = {row["id"]: row for row in rows}
    assert known_N.tolist() == [one in table for one in asked_N.tolist()]
    for place, one in enumerate(asked_N.tolist()):
        if one in table:
            assert {name: values[place] for name, values in said.items()} == table[one]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].update(id=rows[2]["id"]), "labels.parquet has an id twice: audit the run again"),
        (lambda rows: rows[3].update(proposed=3), r"has a proposed outside 0…2: give the shards"),
        (lambda rows: rows[3].update(label=-1), r"has a label outside 0…2: give the shards"),
        (lambda rows: rows[3].update(id=5), r"has 1 ids that are not in .*: give the shards"),
        (lambda rows: [row.update(id=n) for n, row in enumerate(rows)], "knows none of the images of .*: give the"),
        (lambda rows: [row.update(label=(row["label"] + 1) % 3) for row in rows],
         r"image \d+ has label \d in .*shards and had \d in .*run: give the shards"),
        (lambda rows: [row.pop("quality") for row in rows], "has no column quality: audit the run again"),
    ],
)  # fmt: skip
def test_an_audit_that_does_not_fit_is_refused(data, tmp_path, change: Callable[[Rows], object], message):
    rows = audit_of(data)
    change(rows)
    run = write_audit(tmp_path / "run", rows)
    with pytest.raises(InputError, match=message):
        clean.clean(Request(run, data, f"{tmp_path}/out"), quiet())
    assert not Path(tmp_path, "out", "index.json").exists()


def test_what_is_not_there_is_refused(data, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty has no recipe.json: give the folder of a run"):
        clean.clean(Request(str(empty), data, f"{tmp_path}/out"), quiet())
    (empty / "recipe.json").write_text('{"dataset": {"kind": "Digits"}}')
    with pytest.raises(InputError, match=r"was trained on Digits, which has no shards .*: its .* in .*labels.parquet"):
        clean.clean(Request(str(empty), data, f"{tmp_path}/out"), quiet())
    (empty / "recipe.json").write_text('{"dataset": {"kind": "Sharded", "dataset": "custom"}}')
    with pytest.raises(
        InputError, match=r"no audit/labels.parquet in .*empty: make it first, python -m training.audit"
    ):
        clean.clean(Request(str(empty), data, f"{tmp_path}/out"), quiet())
    with pytest.raises(InputError, match=r"no index.json in .*empty: make shards first"):
        clean.clean(Request(run, str(empty), f"{tmp_path}/out"), quiet())
    Path(run, clean.LABELS).write_bytes(b"no Parquet")
    with pytest.raises(InputError, match=r"labels.parquet cannot be read"):
        clean.clean(Request(run, data, f"{tmp_path}/out"), quiet())
    with pytest.raises(ValueError, match=r"quality is 1.5: it must lie in 0…1"):
        Request(run, data, "out", quality=1.5)


# ---- predictions -----------------------------------------------------------------------------------------------------


def write_predictions(out: str, data: str, split: str, keep_all: bool = True) -> dict[int, list[float] | None]:
    """Made-up predictions of shards, as training.predict writes them; the probabilities by id."""
    images = open_images(data, split, 256)
    ids = [each.id for each in images.read(images.rows)]
    probabilities: list = np.random.default_rng(1).dirichlet(np.ones(CLASSES), len(ids)).astype(np.float32).tolist()
    probabilities[4] = None  # an image that could not be decoded
    about = Predictions("model", images.digest, split, len(ids), images.index.class_names, 1, keep_all)
    for part in predictions.begin(out, about):
        rows = about.rows_of(part)
        columns = {
            name: pa.nulls(len(rows), kind)
            for name, kind in zip(predictions.SCHEMA.names, predictions.SCHEMA.types, strict=True)
        }
        columns |= {"id": pa.array(ids[rows.start : rows.stop])}
        columns |= {"pred_probs": pa.array(probabilities[rows.start : rows.stop], pa.list_(pa.float32()))}
        predictions.write_part(out, about, part, pa.table(columns))
    return dict(zip(ids, probabilities, strict=True))


@pytest.mark.parametrize("split", ["", "train"])
def test_probabilities_of_the_model_come_along(data, run, tmp_path, split):
    url = f"{tmp_path}/predictions"
    probabilities = write_predictions(url, data, split)
    out = f"{tmp_path}/out"
    clean.clean(Request(run, data, out, predictions=url), quiet())
    rows = rows_of(out)
    assert sum(row["pred_probs"] is not None for row in rows) == len(probabilities) - 1
    for row, plain in zip(rows, expected(data, 0.5, 0.5), strict=True):
        assert row == {**plain, "pred_probs": probabilities.get(row["id"])}


def test_rows_of_predictions_are_found_in_their_parts(data, run, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "PART_ROWS", 16)
    url = f"{tmp_path}/predictions"
    ids = list(write_predictions(url, data, ""))
    about = predictions.read(url)
    assert about.parts == 5
    for rows in (range(0, 3), range(14, 18), range(16, 32), range(15, 69), range(68, 69)):
        found = predictions.read_rows(url, about, rows, ("id",))
        assert found["id"].to_pylist() == ids[rows.start : rows.stop]
    Path(url, about.name(1)).unlink()
    with pytest.raises(InputError, match=r"part-00001-of-00005.parquet is missing or damaged"):
        predictions.read_rows(url, about, range(14, 18), ("id",))
    with pytest.raises(InputError, match=r"1 parts of .*predictions are not made yet: python -m training.predict"):
        clean.clean(Request(run, data, f"{tmp_path}/out", predictions=url), quiet())


def test_predictions_that_do_not_fit_are_refused(data, run, tmp_path):
    wanted = Request(run, data, f"{tmp_path}/out")
    write_predictions(f"{tmp_path}/top", data, "", keep_all=False)
    write_predictions(f"{tmp_path}/test", data, "test")
    for name, message in [
        ("none", r"no predictions in .*none: make them first, python -m training.predict .*all-probabilities"),
        ("top", r"top has the probabilities of the top classes only: predict again with --all-probabilities"),
    ]:
        with pytest.raises(InputError, match=message):
            clean.clean(replace(wanted, predictions=f"{tmp_path}/{name}"), quiet())
    about = json.loads((tmp_path / "test" / predictions.NAME).read_text())
    (tmp_path / "test" / predictions.NAME).write_text(json.dumps({**about, "split": "train"}))
    with pytest.raises(InputError, match=r"test are predictions of other images than .*shards: predict these"):
        clean.clean(replace(wanted, predictions=f"{tmp_path}/test"), quiet())


def test_the_command_tells_mistakes_in_one_line(tmp_path, capsys):
    asked = [str(tmp_path), "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out"]
    for main, arguments in ((clean.main, asked), (shards.main, ["--from", *asked])):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == f"error: {tmp_path} has no recipe.json: give the folder of a run"
    with pytest.raises(SystemExit) as stopped:
        clean.main([str(tmp_path), "--data", "data", "--out", "out", "--confidence", "2"])
    assert stopped.value.code == 2
    assert "confidence is 2.0: it must lie in 0…1" in capsys.readouterr().err
