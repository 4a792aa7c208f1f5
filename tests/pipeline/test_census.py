"""The census of stored images, and the job that brings rows together by key, on real Ray Data."""

import functools

import numpy as np
import pyarrow as pa
import pytest

from pipeline import census as census_module
from pipeline import keyed
from pipeline.census import census
from pipeline.dataset import Examples, InputError
from pipeline.index import Index, write_shard
from tests.pipeline.layouts import jpeg, photos


def squares(task: pa.Table) -> pa.Table:
    numbers = np.arange(task["start"][0].as_py(), task["stop"][0].as_py())
    return pa.table({"number": numbers % 97, "square": numbers**2})


def sums(rows: pa.Table) -> pa.Table:
    return rows.group_by("number").aggregate([("square", "sum"), ("square", "count")])


def test_all_rows_of_a_key_come_to_one_task(local_ray, monkeypatch):
    monkeypatch.setattr(keyed, "TASK_ROWS", 250)  # four tasks
    tasks = [pa.table({"start": [start], "stop": [start + 250]}) for start in range(0, 1000, 250)]
    tables = list(keyed.reduce_by_key(tasks, squares, "number", 1000, sums))
    assert len([table for table in tables if len(table)]) > 3
    made = pa.concat_tables(tables).to_pydict()
    assert sorted(made["number"]) == list(range(97))  # each once
    for number, total, count in zip(made["number"], made["square_sum"], made["square_count"], strict=True):
        expected = [n**2 for n in range(1000) if n % 97 == number]
        assert (total, count) == (sum(expected), len(expected))


def test_tasks_without_a_key_are_left_out(local_ray, monkeypatch):
    monkeypatch.setattr(keyed, "TASK_ROWS", 1)
    tasks = [pa.table({"start": [0], "stop": [2]}), pa.table({"start": [97], "stop": [99]})]
    tables = list(keyed.reduce_by_key(tasks, squares, "number", 6, sums))
    assert {n for table in tables for n in table["number"].to_pylist()} == {0, 1}
    assert all(len(table) for table in tables)


def broken(task: pa.Table, message: str) -> pa.Table:
    raise InputError(message)


@pytest.mark.parametrize("which", ["read", "reduce"])
def test_what_the_user_can_mend_comes_through_as_one_line(local_ray, which):
    functions = {"read": squares, "reduce": sums, which: functools.partial(broken, message="part 7 is damaged")}
    tasks = [pa.table({"start": [0], "stop": [5]})]
    with pytest.raises(InputError) as error:
        list(keyed.reduce_by_key(tasks, functions["read"], "number", 5, functions["reduce"]))
    assert str(error.value) == "part 7 is damaged"


def images() -> tuple[Examples, Examples]:
    """50 training and 4 trusted images; three are stored again: under another label, the same one, and as trusted."""
    stored = [image for of_class in photos(5, 10) for image in of_class]
    label = np.repeat(np.arange(5), 10)
    stored[40] = stored[7]  # labels 4 and 0
    stored[12] = stored[11]  # 1 and 1
    trusted = [stored[25], stored[33], jpeg(np.zeros((32, 32, 3), np.uint8)), jpeg(np.ones((32, 32, 3), np.uint8))]
    train = Examples(np.arange(50) * 7, label, pa.array(stored, pa.binary()))
    return train, Examples(np.arange(4) + 1000, np.array([0, 3, 1, 2]), pa.array(trusted, pa.binary()))


@pytest.mark.parametrize("kind", ["memory", "shards", "pixels"])
def test_wanted_images_are_found_and_torn_ones_told(local_ray, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(census_module, "READ_ROWS", 8)
    monkeypatch.setattr(census_module, "TASKS", 3)
    train, probe = images()
    if kind == "pixels":
        train, probe = (
            Examples(s.id_N, s.label_N, np.stack([s.image(row) for row in range(len(s))])) for s in (train, probe)
        )
    names = [str(number) for number in train.id_N]
    if kind == "shards":
        rows = [
            {"id": i, "key": f"{i}.jpg", "label": k, "split": "train", "trusted": False, "image": image}
            for i, k, image in zip(train.id_N, train.label_N, train.image_N.to_pylist(), strict=True)
        ]
        made = [write_shard(f"{tmp_path}/{n}", rows[n * 25 : (n + 1) * 25], 5) for n in range(2)]
        train = Index("custom", "", tuple("abcde"), tuple(made)).of(str(tmp_path), "train")
        names = [f"{name}.jpg" for name in names]
    found = census(train, probe, wanted=np.array([21, 7 * 33, 7 * 7, 999_999])).to_pylist()
    told = {(row["id"], row["label"], row["row"], row["trusted"], row["torn"]) for row in found}
    assert told == {
        (21, 0, 3, False, False),
        (7 * 33, 3, 33, False, False),
        (7 * 7, 0, 7, False, True),
        (7 * 40, 4, 40, False, True),
        (7 * 25, 2, 25, False, True),
        (1000, 0, 0, True, True),
    }
    assert len(found) == 6
    digest = {row["id"]: row["digest"] for row in found}
    assert digest[49] == digest[280] != digest[175] == digest[1000]
    assert train.names(np.array([33, 0])) == [names[33], names[0]]
