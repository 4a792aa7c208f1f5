"""Ingest as a real Ray Data job: what is stored, what is rejected, and that it can be killed, repeated and resumed."""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline import shards, storage
from pipeline.dataset import InputError
from pipeline.images import decode
from pipeline.index import ROW_GROUP, read_index
from pipeline.job import WORK
from pipeline.layout import Layout, Listing, rows, settle
from pipeline.shards import SHARD_ROWS, Options, ingest, make_shard, plan_shards

SPLITS = {"train": 60, "probe": 9, "test": 21}


@dataclass(frozen=True)
class Folder(Layout):
    """Files SPLIT/NUMBER.jpg of three classes."""

    name: ClassVar[str] = "folder"
    shift: int = 0

    def listing(self, url: str, *, look_around: bool = False) -> Listing:
        tables = []
        for split, count in SPLITS.items():
            keys = [f"{split}/{number}, ü.jpg" for number in range(count)]
            label_N = (np.arange(count) + self.shift) % 3
            tables.append(rows("folder", split, keys, label_N, [(f"{url}/{key}", 0, -1, "file") for key in keys]))
        return settle(Listing(pa.concat_tables(tables), ("a", "b", "c")))


def photo(number: int, height: int = 40, width: int = 50) -> bytes:
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, (width, height)), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


@pytest.fixture
def raw(tmp_path) -> str:
    for split, count in SPLITS.items():
        for number in range(count):
            storage.write(*storage.connect(f"{tmp_path}/raw/{split}/{number}, ü.jpg"), photo(number))
    return f"{tmp_path}/raw"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 25)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_every_image_is_stored_once_with_its_label(raw, tmp_path, local_ray, bucket):
    console = quiet()
    out = f"{bucket}/shards/folder"
    index = ingest(Folder(), raw, Options(out), console)
    assert index == read_index(out)
    assert {split: index.count(split) for split in index.splits} == SPLITS
    assert [shard.rows for shard in index.shards if shard.split == "train"] == [25, 25, 10]
    assert index.options == {"shift": 0, "short_side": 256}
    for split, count in SPLITS.items():
        held = index.of(out, split).take(np.arange(count))
        listed = Folder().listing(raw).table.to_pylist()
        label_of = {row["id"]: (row["label"], row["key"]) for row in listed if row["split"] == split}
        assert sorted(held.id_N.tolist()) == sorted(label_of)
        for i, id_ in enumerate(held.id_N):
            label, key = label_of[id_]
            assert held.label_N[i] == label
            number = int(key.split("/")[1].split(",")[0])
            assert held.image_N[i].as_py() == photo(number)  # nothing to change, so not a byte changes
        per_class = np.sum([shard.per_class for shard in index.shards if shard.split == split], 0)
        np.testing.assert_array_equal(per_class, np.bincount(held.label_N, minlength=3))
    assert "60 train, 9 probe, 21 test; 3 classes, 5 shards, 0 rejected" in console.file.getvalue()
    fs, path = storage.connect(out)
    assert not storage.exists(fs, f"{path}/{WORK}")
    assert pq.read_table(io.BytesIO(storage.read(fs, f"{path}/rejected.parquet"))).num_rows == 0
    for shard in index.shards:
        data = storage.read(fs, f"{path}/{shard.name}")
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        table = pq.read_table(io.BytesIO(data))
        assert set(table["trusted"].to_pylist()) == {shard.split != "train"}
        assert pq.ParquetFile(io.BytesIO(data)).metadata.num_row_groups == -(-shard.rows // ROW_GROUP)

    again = quiet()
    assert ingest(Folder(), raw, Options(out), again) == index
    assert "is whole already" in again.file.getvalue()
    with pytest.raises(InputError, match="holds shards of other data or options: choose another --out"):
        ingest(Folder(shift=1), raw, Options(out), quiet())
    with pytest.raises(InputError, match="holds shards of other data or options"):
        ingest(Folder(), raw, Options(out, short_side=20), quiet())


def test_larger_images_are_shrunk_to_the_short_side(raw, tmp_path, local_ray):
    index = ingest(Folder(), raw, Options(f"{tmp_path}/out", short_side=20), quiet())
    held = index.of(f"{tmp_path}/out", "test").take(np.arange(21))
    assert {decode(image.as_py()).shape for image in held.image_N} == {(20, 25, 3)}


def test_the_order_is_a_shuffle_that_needs_no_seed(raw):
    table = Folder().listing(raw).table
    tasks = plan_shards(table)
    assert list(tasks) == [
        "train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet",
        "probe-00000-of-00001.parquet", "test-00000-of-00001.parquet",
    ]  # fmt: skip
    ids = np.concatenate([task["id"].to_numpy() for task in tasks.values()])
    assert sorted(ids.tolist()) == sorted(table["id"].to_pylist())
    reordered = plan_shards(table.take(np.random.default_rng(0).permutation(len(table))))
    for name in tasks:
        assert tasks[name]["id"].equals(reordered[name]["id"])
    assert min(np.bincount(tasks["train-00000-of-00003.parquet"]["label"].to_numpy(), minlength=3)) > 2


def test_rows_of_a_parquet_source_stay_in_runs(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 1000)
    count = 20_000
    places = [(f"s{row // 5_000}.parquet", row % 5_000, -1, "row") for row in range(count)]
    table = rows("custom", "train", [str(row) for row in range(count)], np.zeros(count), places)
    for task in plan_shards(table).values():
        runs = {
            (file, start // shards.RUN_ROWS)
            for file, start in zip(task["file"].to_pylist(), task["start"].to_pylist(), strict=True)
        }
        assert len(runs) <= 1000 / shards.RUN_ROWS + 4
        assert len({file for file, _ in runs}) >= 2


def test_unusable_images_are_listed_with_the_reason(raw, tmp_path, local_ray):
    for number, harm in enumerate([b"", b"<html>404</html>", photo(0)[:200]]):
        storage.write(*storage.connect(f"{raw}/train/{number}, ü.jpg"), harm)
    storage.connect(raw)[0].rm(f"{raw}/probe/4, ü.jpg")
    out = f"{tmp_path}/out"
    index = ingest(Folder(), raw, Options(out, reject=0.05), quiet())
    assert (index.rejected, index.count("train"), index.count("probe")) == (4, 57, 8)
    rejected = pq.read_table(f"{out}/rejected.parquet").sort_by("key").to_pylist()
    assert [(row["key"], row["split"]) for row in rejected] == [
        ("probe/4, ü.jpg", "probe"), ("train/0, ü.jpg", "train"), ("train/1, ü.jpg", "train"),
        ("train/2, ü.jpg", "train"),
    ]  # fmt: skip
    assert rejected[0]["reason"] == "missing"
    assert all(row["reason"] for row in rejected)
    held = index.of(out, "train").take(np.arange(57))
    assert not {row["id"] for row in rejected} & set(held.id_N.tolist())


def test_too_many_unusable_images_stop_the_run_and_finished_shards_stay(raw, tmp_path, local_ray):
    out = f"{tmp_path}/out"
    for number in range(10):
        storage.write(*storage.connect(f"{raw}/train/{number}, ü.jpg"), b"no image")
    with pytest.raises(
        InputError, match=r"of 90 images cannot be used, more than 5.0%: train/\d, ü.jpg \(not an image"
    ):
        ingest(Folder(), raw, Options(out, reject=0.05), quiet())
    fs, path = storage.connect(out)
    assert not storage.exists(fs, f"{path}/index.json")
    with pytest.raises(InputError, match=r"no index\.json"):
        read_index(out)
    index = ingest(Folder(), raw, Options(out, reject=0.2), quiet())
    assert index.rejected == 10


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (range(1, 9, 3), r"no trusted image of b can be used: probe/\d, ü.jpg \(not an image\), .*: copy them again"),
        (range(9), "no trusted image|no image of probe can be used"),
    ],
)
def test_a_class_that_loses_its_trusted_images_stops_the_run(raw, tmp_path, local_ray, lost, message):
    for number in lost:
        storage.write(*storage.connect(f"{raw}/probe/{number}, ü.jpg"), b"no image")
    with pytest.raises(InputError, match=message):
        ingest(Folder(), raw, Options(f"{tmp_path}/out", reject=0.5), quiet())
    with pytest.raises(InputError, match=r"no index\.json"):
        read_index(f"{tmp_path}/out")


def test_a_split_that_loses_all_images_stops_the_run(raw, tmp_path, local_ray):
    for number in range(SPLITS["test"]):
        storage.write(*storage.connect(f"{raw}/test/{number}, ü.jpg"), b"")
    with pytest.raises(InputError, match=r"no image of test can be used: test/.*\(empty\)"):
        ingest(Folder(), raw, Options(f"{tmp_path}/out", reject=0.9), quiet())


@pytest.mark.parametrize("split", ["../up", "a/b", ".hidden", "", "n\0l"])
def test_no_shard_is_named_to_lie_elsewhere(split):
    table = rows("folder", split, ["1.jpg"], np.zeros(1), [("x/1.jpg", 0, -1, "file")])
    with pytest.raises(InputError, match="cannot be the name of a split"):
        plan_shards(table)


def test_killed_anywhere_the_same_command_goes_on(raw, tmp_path, local_ray, monkeypatch):
    whole = ingest(Folder(), raw, Options(f"{tmp_path}/whole"), quiet())
    out = f"{tmp_path}/out"
    tasks = plan_shards(Folder().listing(raw).table)
    made_of = whole.made_of
    for name in ("train-00001-of-00003.parquet", "test-00000-of-00001.parquet"):  # what a killed run has left
        make_shard(tasks[name].append_column("name", [[name] * len(tasks[name])]), out, 256, made_of, 3)
    fs, path = storage.connect(out)
    times = {name: fs.modified(f"{path}/{name}") for name in ("train-00001-of-00003.parquet",)}
    storage.write(fs, f"{path}/train-00000-of-00003.parquet", b"half written, no record")
    storage.write(fs, f"{path}/train-00002-of-00003.parquet.0123.part", b"never named")
    console = quiet()
    index = ingest(Folder(), raw, Options(out), console)
    assert "2 of 5 shards are done" in console.file.getvalue()
    assert index == whole
    assert {name: fs.modified(f"{path}/{name}") for name in times} == times
    for shard in index.shards:
        assert hashlib.sha256(fs.cat_file(f"{path}/{shard.name}")).hexdigest() == shard.sha256


def test_another_data_set_half_made_there_is_refused(raw, tmp_path):
    out = f"{tmp_path}/out"
    record = {"name": "train-00000-of-00003.parquet", "made_of": "other", "listed": 1, "shard": None, "rejected": []}
    storage.write(*storage.connect(f"{out}/{WORK}/train-00000-of-00003.parquet.json"), json.dumps(record).encode())
    with pytest.raises(InputError, match="holds shards of other data"):
        ingest(Folder(), raw, Options(out), quiet())


def test_a_place_that_cannot_be_written_is_refused_at_once(raw):
    with pytest.raises(InputError, match="/proc/nowhere"):
        ingest(Folder(), raw, Options("/proc/nowhere"), quiet())


@pytest.mark.parametrize(
    ("change", "message"), [({"short_side": -1}, "short_side is -1"), ({"reject": 1.5}, "reject is 1.5")]
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Options("out", **change)


def test_shards_are_a_few_thousand_files_for_millions_of_images():
    assert 2_400_000 / SHARD_ROWS < 1_200
