"""Shards read back: any rows in any order, one request a row group, bounded memory, damage named in one line."""

import hashlib
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import index as indexing
from pipeline import storage
from pipeline.dataset import InputError
from pipeline.index import SHARD_SCHEMA, Index, Shard, Sharded, read_index

GROUP = 4


def write(url: str, rows: dict[str, list[int]], encoded: bytes = b"") -> Index:
    """Shards of `rows` (split → rows of each file), where image i is the bytes of its id, unless `encoded` is given."""
    shards, first = [], 0
    fs, path = storage.connect(url)
    for split, counts in rows.items():
        for number, count in enumerate(counts):
            id_N = np.arange(first, first + count) * 7
            first += count
            table = pa.table(
                [id_N, [f"{split}/{i},ü.jpg" for i in id_N], id_N % 3, [split] * count, [split != "train"] * count,
                 [encoded or b"%d" % i for i in id_N]],
                schema=SHARD_SCHEMA,
            )  # fmt: skip
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, row_group_size=GROUP, compression="none", use_dictionary=False)
            data = sink.getvalue().to_pybytes()
            name = f"{split}-{number:05d}-of-{len(counts):05d}.parquet"
            storage.write(fs, storage.join(path, name), data)
            footer = int.from_bytes(data[-8:-4], "little") + 8
            per_class = tuple(np.bincount(id_N % 3, minlength=3).tolist())
            shards.append(Shard(name, split, count, len(data), footer, hashlib.sha256(data).hexdigest(), per_class))
    index = Index("custom", "made", ("a", "b", "c"), tuple(shards), row_group=GROUP)
    storage.write(fs, storage.join(path, "index.json"), index.as_json().encode())
    return index


@pytest.fixture
def url(tmp_path) -> str:
    write(str(tmp_path), {"train": [10, 3, 8], "probe": [6], "test": [5]})
    return str(tmp_path)


def test_an_index_is_read_as_it_was_written(url):
    index = read_index(url)
    assert index == write(url, {"train": [10, 3, 8], "probe": [6], "test": [5]})
    assert index.splits == ("train", "probe", "test")
    assert [index.count(split) for split in index.splits] == [21, 6, 5]


def test_row_groups_are_full_but_the_last_of_a_file(url):
    train = read_index(url).of(url, "train")
    assert train.row_groups.tolist() == [4, 4, 2, 3, 4, 4]
    assert len(train) == 21
    parts = [pq.ParquetFile(f"{url}/{shard.name}").metadata for shard in train.shards]
    assert [part.row_group(g).num_rows for part in parts for g in range(part.num_row_groups)] == [4, 4, 2, 3, 4, 4]


@pytest.mark.parametrize("rows", [range(21), [20, 0, 13, 13, 5, 12, 9, 10], [7], range(20, -1, -1)])
def test_take_gives_the_rows_asked_for_in_order(url, rows):
    taken = read_index(url).of(url, "train").take(np.array(rows))
    assert taken.id_N.tolist() == [7 * row for row in rows]
    assert taken.label_N.tolist() == [7 * row % 3 for row in rows]
    assert [image.as_py() for image in taken.image_N] == [b"%d" % (7 * row) for row in rows]


def test_a_row_group_is_one_request_and_a_footer_one_a_file(url, monkeypatch):
    train, asked = read_index(url).of(url, "train"), []
    indexing._packed_footer.cache_clear()
    original = storage.read
    monkeypatch.setattr(
        storage, "read", lambda fs, path, start, end: asked.append(end - start) or original(fs, path, start, end)
    )
    train.take(np.arange(21))
    assert len(asked) == 3 + 6
    asked.clear()
    train.take(np.array([0, 1, 9]))
    assert len(asked) == 2
    assert sum(asked) < train.shards[0].bytes


def test_shards_on_cloud_storage_read_as_local_ones(bucket, url):
    write(f"{bucket}/deep/folder", {"train": [10, 3, 8], "probe": [6], "test": [5]})
    remote = read_index(f"{bucket}/deep/folder").of(f"{bucket}/deep/folder", "train").take(np.arange(21))
    local = read_index(url).of(url, "train").take(np.arange(21))
    np.testing.assert_array_equal(remote.id_N, local.id_N)
    assert remote.image_N == local.image_N


def test_the_source_gives_named_sets_and_the_probe_in_memory(url):
    data = Sharded("custom", evaluate=("test", "probe"), size=16).load(url, seed=0)
    assert len(data.train) == 21
    assert list(data.tests) == ["test", "probe"]
    assert data.probe.id_N.tolist() == [7 * row for row in range(21, 27)]
    assert data.noise_rate is None


@pytest.mark.parametrize(
    ("source", "where", "message"),
    [
        (Sharded("custom"), "", "no shards given: --data"),
        (Sharded("custom"), "nowhere", "no index.json in .*nowhere: make shards first, python -m pipeline.shards"),
        (Sharded("webvision"), "here", "holds shards of custom, not webvision"),
        (Sharded("custom", evaluate=("imagenet",)), "here", "has no imagenet set, only train, probe, test"),
        (Sharded("custom"), "damaged", "index.json is damaged"),
        (Sharded("custom"), "old", "index.json is damaged"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(url, tmp_path, source, where, message):
    for name, text in (("damaged", "{"), ("old", '{"shards": [{"name": "x"}]}')):
        storage.write(*storage.connect(f"{tmp_path}/{name}/index.json"), text.encode())
    with pytest.raises(InputError, match=message) as caught:
        source.load({"here": url, "": ""}.get(where, f"{tmp_path}/{where}"), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", ["removed", "cut", "scrambled"])
def test_a_harmed_shard_is_named(url, harm):
    train = read_index(url).of(url, "train")
    path = f"{url}/{train.shards[1].name}"
    indexing._packed_footer.cache_clear()
    fs = fsspec.filesystem("file")
    data = fs.cat_file(path)
    fs.rm(path)
    if harm != "removed":
        fs.pipe_file(path, data[:50] if harm == "cut" else bytes(255 - byte for byte in data))
    with pytest.raises(InputError, match=rf"shard .*{train.shards[1].name} is missing or damaged"):
        train.take(np.arange(21))
    assert train.take(np.arange(10)).id_N[-1] == 63


def test_an_empty_split_has_no_row_groups(url):
    nothing = read_index(url).of(url, "val")
    assert len(nothing) == 0
    assert nothing.row_groups.tolist() == []


def test_a_split_of_many_shards_keeps_small_footers(tmp_path):
    index = write(str(tmp_path), {"train": [1] * 200})
    indexing._packed_footer.cache_clear()
    index.of(str(tmp_path), "train").take(np.arange(200))
    assert indexing._packed_footer.cache_info().currsize == 200
    assert indexing._packed_footer.cache_info().maxsize == indexing.FOOTERS


def test_equal_shards_of_two_places_are_not_mixed_up(tmp_path):
    first = write(f"{tmp_path}/a", {"train": [3]})
    second = write(f"{tmp_path}/b", {"train": [3]}, encoded=b"other")
    assert replace(second.shards[0], bytes=0, sha256="", footer=0) == replace(
        first.shards[0], bytes=0, sha256="", footer=0
    )
    assert first.of(f"{tmp_path}/a", "train").take(np.array([0])).image_N[0].as_py() == b"0"
    assert second.of(f"{tmp_path}/b", "train").take(np.array([0])).image_N[0].as_py() == b"other"
