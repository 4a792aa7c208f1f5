"""The real layouts from raw files to a trained model: check, ingest to cloud storage, two epochs, id for id.

Photographs and lists are real ones where ../shared/data is there, and small made-up ones where it is not.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.check import check
from pipeline.clothing1m import Clothing1M
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.food101n import Food101N
from pipeline.index import Sharded, read_index
from pipeline.layout import Layout, stable_ids
from pipeline.shards import Options, ingest
from pipeline.webvision import WebVision
from tests.pipeline import layouts
from training.clean import Request, clean
from training.engine.schedule import Schedule
from training.launch import run
from training.objectives.baselines.supervised import Supervised
from training.objectives.ieg import winnow
from training.recipe import Recipe
from training.runs import ledger

DATA = Path(__file__).parents[3] / "shared" / "data"
BATCH, GROUP = 6, 3


def photographs(file: str, column: str, classes: int, per_class: int, size: int) -> layouts.Images:
    """Real photographs, `per_class` of each of `classes` labels in the file's order; made-up ones without the file."""
    if not (DATA / file).exists():
        return layouts.photos(classes, per_class, size)
    table = pq.ParquetFile(DATA / file).read_row_groups([0, 1])
    images = iter(table[column].to_pylist())
    return [[next(images) for _ in range(per_class)] for _ in range(classes)]


@dataclass(frozen=True)
class Case:
    """One layout: who writes it, who reads it, and which of its sets are evaluated."""

    write: Callable[[str], layouts.Written]
    layout: Callable[[str], Layout]
    folder: str
    roots: dict[str, str]  # split → the name that its ids begin with, where it is not the layout's
    evaluate: tuple[str, ...]


def webvision(root: str) -> layouts.Written:
    real = DATA / "webvision" / "synsets.txt"
    synsets = real.read_text().splitlines() if real.exists() else None
    images = photographs("imagenette_64.parquet", "image_jpeg", 50, 7, 64)
    written = layouts.write_webvision(root, images, synsets=synsets)
    del written["flickr"]  # not of the mini version
    return written


def clothing1m(root: str) -> layouts.Written:
    real = DATA / "clothing1m" / "clean_train_key_list.txt"
    keys = real.read_text().splitlines()[::500] if real.exists() else None  # from all of its folders
    images = photographs("clothing_photos.parquet", "image_jpeg", 14, 6, 40)
    return layouts.write_clothing1m(root, images, archives=True, keys=keys)


def food101n(root: str) -> layouts.Written:
    return layouts.write_food101n(root, photographs("food101_slice.parquet", "image_jpeg", 10, 9, 40), archives=True)


def custom(root: str) -> layouts.Written:
    images = layouts.photos(3, 8)
    written: layouts.Written = {"train": {}, "probe": {}, "test": {}}
    for k, of_class in enumerate(images):
        for number, image in enumerate(of_class):
            split = {0: "probe", 1: "test"}.get(number, "train")
            written[split][f"{split}/ölass, {k}/{number}.jpg"] = k, image
    layouts.write(root, {key: image for part in written.values() for key, (_, image) in part.items()})
    return written


CASES = {
    "webvision": Case(
        webvision, lambda root: WebVision(imagenet=f"{root}/imagenet", probe_per_class=2), "/webvision",
        {"probe": "imagenet", "imagenet": "imagenet"}, ("imagenet", "val"),
    ),
    "clothing1m": Case(clothing1m, lambda _: Clothing1M(), "", {}, ("test", "val")),
    "food101n": Case(
        food101n, lambda root: Food101N(food101=f"{root}/food101", spool=f"{root}/spool"), "/food101n",
        {"test": "food101"}, ("test", "val"),
    ),
    "custom": Case(custom, lambda _: Custom(), "", {}, ("test",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_from_raw_files_to_a_model(name, bucket, tmp_path, local_ray):
    case, console = CASES[name], Console(file=io.StringIO(), width=300)
    raw, out = f"{bucket}/raw", f"{bucket}/shards/{name}"
    written = case.write(raw)
    layout = case.layout(raw)

    report = check(layout, raw + case.folder, sample=20)
    assert report.count("error") == 0, report.findings

    index = ingest(layout, raw + case.folder, Options(out), console)
    assert {split: index.count(split) for split in index.splits} == {
        split: len(part) for split, part in written.items()
    }
    assert index.rejected == 0
    of_id = {
        split: dict(zip(stable_ids(case.roots.get(split, name), part).tolist(), part.values(), strict=True))
        for split, part in written.items()
    }
    for split, part in of_id.items():
        stored = index.of(out, split)
        held = stored.take(range(len(stored)))
        found = zip(held.id_N.tolist(), held.label_N.tolist(), held.image_N.to_pylist(), strict=True)
        assert {id_: (label, image) for id_, label, image in found} == part

    count = len(written["train"])
    steps = -(-2 * count // BATCH)
    recipe = Recipe(
        name=name,
        dataset=Sharded(name, evaluate=case.evaluate, size=24),
        objective=winnow(),
        data=out,
        storage=f"{bucket}/runs",
        network="wrn-10-1",
        schedule=Schedule(first_cycle=steps, cycles=1),
        batch=BATCH,
        probe_batch=BATCH,
        group=GROUP,
        workers=int(name == "webvision"),  # once by Ray's worker and actors, else in this process
    )
    result = run(recipe, console)
    table = ledger.read(result.folder).sort_by("step").to_pylist()[: 2 * count]
    for epoch in (0, 1):
        seen = {row["id"]: row["label"] for row in table if row["epoch"] == epoch}
        assert len(seen) == sum(row["epoch"] == epoch for row in table) == count
        assert seen == {id_: label for id_, (label, _) in of_id["train"].items()}
    first, *others = case.evaluate
    assert {"top1", "top5", *(f"{other}_top1" for other in others)} <= result.history[-1].keys()
    assert first not in str(result.history[-1].keys())
    assert f"{count:,} noisy and {len(written['probe']):,} trusted images" in console.file.getvalue()
    assert read_index(out) == index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_stops_the_run_with_its_name(workers, tmp_path, local_ray, monkeypatch):
    custom(f"{tmp_path}/raw")
    console = Console(file=io.StringIO(), width=300)
    index = ingest(Custom(), f"{tmp_path}/raw", Options(f"{tmp_path}/out"), console)
    recipe = Recipe(
        name="run", dataset=Sharded("custom", size=24), objective=winnow(), data=f"{tmp_path}/out",
        storage=f"{tmp_path}/runs", network="wrn-10-1", schedule=Schedule(first_cycle=2, cycles=1), batch=6,
        probe_batch=6, group=3, workers=workers, actors=1,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    recipe = replace(recipe, data="out")  # workers run in other folders
    (tmp_path / "out" / index.shards[0].name).unlink()
    with pytest.raises(InputError, match=rf"shard {tmp_path}/out/{index.shards[0].name} is missing or damaged"):
        run(recipe, console)


def test_a_run_resumes_on_the_same_data_only(tmp_path, local_ray):
    console = Console(file=io.StringIO(), width=300)
    for name, photos in (("a", 8), ("b", 9)):
        images = layouts.photos(3, photos)
        files = {f"{'probe' if n == 0 else 'test' if n == 1 else 'train'}/{k}/{n}.jpg": image
                 for k, of_class in enumerate(images) for n, image in enumerate(of_class)}  # fmt: skip
        layouts.write(f"{tmp_path}/raw-{name}", files)
        ingest(Custom(), f"{tmp_path}/raw-{name}", Options(f"{tmp_path}/{name}"), console)
    recipe = Recipe(
        name="run", dataset=Sharded("custom", size=24), objective=Supervised(), data=f"{tmp_path}/a",
        storage=f"{tmp_path}/runs", network="wrn-10-1", schedule=Schedule(first_cycle=2, cycles=1), batch=6,
        probe_batch=6, group=3, workers=0, actors=1,
    )  # fmt: skip
    run(recipe, console)
    with pytest.raises(InputError, match=r"made with another checksum of the data: .* choose another --name"):
        run(replace(recipe, data=f"{tmp_path}/b"), console)


def test_a_supervised_run_trains_on_cleaned_shards(tmp_path, local_ray):
    """Every label but one is wrong to the audit; the run learns from the corrected ones, under the same ids."""
    custom(f"{tmp_path}/raw")
    console = Console(file=io.StringIO(), width=300)
    index = ingest(Custom(), f"{tmp_path}/raw", Options(f"{tmp_path}/data"), console)
    train = index.of(f"{tmp_path}/data", "train")
    given = train.take(np.arange(len(train)))
    right_N = (given.label_N + 1) % 3
    ones = np.ones(len(train), np.float32)
    doubt = {"quality": np.append(0 * ones[1:], 1), "weight": 0.1 * ones, "confidence": ones}
    layouts.write(
        f"{tmp_path}/audited",
        {"recipe.json": b'{"dataset": {"kind": "Sharded", "dataset": "custom"}}', "audit/.keep": b""},
    )
    audit = pa.table({"id": given.id_N, "label": given.label_N, "proposed": right_N, **doubt})
    pq.write_table(audit, f"{tmp_path}/audited/audit/labels.parquet")
    clean(Request(f"{tmp_path}/audited", f"{tmp_path}/data", f"{tmp_path}/clean"), console)

    recipe = Recipe(
        name="run", dataset=Sharded("custom", size=24), objective=Supervised(), data=f"{tmp_path}/clean",
        storage=f"{tmp_path}/runs", network="wrn-10-1", schedule=Schedule(first_cycle=3, cycles=1), batch=6,
        probe_batch=6, group=3, workers=0, actors=1,
    )  # fmt: skip
    table = ledger.read(run(recipe, console).folder)
    expected = dict(zip(given.id_N.tolist(), [*right_N[:-1].tolist(), int(given.label_N[-1])], strict=True))
    assert dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)) == expected
