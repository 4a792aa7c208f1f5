"""Judge every label by heads on stored features that have never seen it: one head a fold, trained on all other rows.

Judging is a step of the method without its update: what ω, λ and pseudo label the finished head gives rows it was not
trained on, beside the trusted images, and how probable it holds their labels. Each look at an image is a visit.

Shapes: N rows, L looks at each, M trusted rows, K classes, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from pipeline import features, storage
from pipeline.dataset import Dataset, Examples, InputError
from pipeline.features import Embedded, Features
from pipeline.index import Index, Sharded, read_index
from pipeline.plan import Purpose, generator, key, probe_rows
from training import custom
from training.engine.batch import normalised
from training.launch import run
from training.objectives.interface import Alone, Batch, Moment, Outcome
from training.recipe import Recipe
from training.runs import checkpoint, model_file

FOLDER = "audit/heads"  # of the heads' own runs, below the features
CHUNK = 1 << 14  # rows read at once


@dataclass(frozen=True)
class Folds:
    """Judge features by heads of `method`, one a fold. Heads that are trained already are not trained again."""

    url: str
    folds: int
    method: str

    @cached_property
    def index(self) -> Index:
        """Return the features' index."""
        return read_index(self.url)

    @cached_property
    def how(self) -> features.Made:
        """Return how the features were made. Raises InputError where they are images."""
        return features.made(self.index, self.url)

    @property
    def tests(self) -> tuple[str, ...]:
        """Return the evaluation sets. Raises InputError where there are none."""
        tests = tuple(split for split in self.index.splits if split not in ("train", "probe"))
        if not tests:
            raise InputError(f"{self.url} has no evaluation set, only train and probe: embed shards that have one")
        return tests

    def recipe(self, fold: int) -> Recipe:
        """Return the run of the head that sees nothing of `fold`."""
        rows = self.index.count("train") * (self.folds - 1) // self.folds
        made = custom.features(self.method, rows)
        return replace(
            made,
            name=f"{self.method}-{fold}-of-{self.folds}",
            dataset=Features(self.index.dataset, self.how.width, self.tests, self.folds, fold),
            data=self.url,
            storage=storage.join(self.url, FOLDER),
        )

    @property
    def told(self) -> str:
        """Return a line on the evidence."""
        heads = f"{self.folds} heads trained by {self.method} on features of {self.how.network}"
        return f"{heads}, each judging images that it has not seen, by {1 + self.how.looks} views"

    def images(self, data: str) -> Dataset:
        """Return the data set at `data` that the features were made of; that of the features where it is ""."""
        if not data:
            return Features(self.index.dataset, self.how.width, self.tests).load(self.url, seed=0)
        dataset = Sharded(self.index.dataset, evaluate=()).load(data, seed=0)
        self.require_same(dataset)
        return dataset

    def require_same(self, dataset: Dataset) -> None:
        """Raise InputError unless the features are of the data set's images."""
        ours, theirs = self.index.count("train"), len(dataset.train)
        if dataset.class_names != self.index.class_names or ours != theirs:
            what = f"{self.url} has features of {ours:,} training images and the data set {theirs:,}, or other classes"
            raise InputError(f"{what}: give features and --data of the same images")

    def visits(self, console: Console) -> Iterator[pa.Table]:
        """Yield what the heads say of all rows, as the audit reads visits; all of an id are in one table.

        Raises InputError for what cannot be trained.
        """
        for fold in range(self.folds):
            recipe, held = self.recipe(fold), self.held_out(fold)
            result = run(recipe, console)
            judge = _Judge(recipe, model_file.read(result.folder).network(), result.dataset)
            for start in range(0, len(held), CHUNK):
                some = np.arange(start, min(start + CHUNK, len(held)))
                # Mixed, as in training: methods judge answers by the average of those beside them.
                yield judge(held.take(generator(recipe.seed, Purpose.ORDER, start).permutation(some)), start)

    def write(self, console: Console) -> list[tuple[str, int]]:
        """Write the visits as files beside the heads; return their paths and numbers of rows."""
        folder = storage.join(self.url, FOLDER)
        written = []
        for number, table in enumerate(self.visits(console)):
            file = pa.BufferOutputStream()
            pq.write_table(table, file)
            name = storage.join(folder, f"{self.method}-of-{self.folds}-{number:05d}.parquet")
            storage.write(*storage.connect(name), file.getvalue().to_pybytes())
            written.append((name, len(table)))
        return written

    def held_out(self, fold: int) -> Embedded:
        """Return the rows of a fold."""
        return Embedded(self.index.of(self.url, "train"), self.how.columns, self.folds, fold, inside=True)

    def trusted(self) -> tuple[np.ndarray, float]:
        """Return the means of the trained heads' probabilities of the trusted rows, M×K, and of their accuracies.

        All heads were trained on the trusted rows.
        """
        probe, recipes = self.images("").probe, [self.recipe(fold) for fold in range(self.folds)]
        folders = [storage.join(recipe.storage, recipe.name) for recipe in recipes]
        probability_MK = np.mean([model_file.read(folder).probabilities(probe) for folder in folders], axis=0)
        return probability_MK, float(np.mean([checkpoint.commits(folder)[-1].top1 for folder in folders]))


def read(url: str) -> pa.Table:
    """Return a file of `Folds.write`, with the column that tells its rows from a run's."""
    rows = pq.read_table(pa.BufferReader(storage.read(*storage.connect(url))))
    return rows.append_column("heads", pa.array(np.ones(len(rows), bool)))


class _Judge:
    """Make steps of a recipe's objective with a finished head, without updates."""

    def __init__(self, recipe: Recipe, network: torch.nn.Module, dataset: Dataset) -> None:
        self.recipe, self.network = recipe, network.train()
        self.probe, self.classes = dataset.probe, len(dataset.class_names)
        # What an objective remembers of rows it was trained on says nothing of these.
        self.memory = recipe.objective.memory(network, 1, self.classes)

    def __call__(self, held: Examples, first: int) -> pa.Table:
        """Return the visits of some rows, of which the first is row `first` of their fold."""
        tables = []
        for start in range(0, len(held), self.recipe.batch):
            some = held.take(np.arange(start, min(start + self.recipe.batch, len(held))))
            looks = some.image_N.shape[2]
            tables += [self._look(some, first + start, look, (look + 1) % looks) for look in range(looks)]
        return pa.concat_tables(tables)

    def _look(self, some: Examples, number: int, weak: int, strong: int) -> pa.Table:
        rows = probe_rows(self.probe.label_N, self.recipe.probe_batch, self.recipe.seed, number)
        trusted = self.probe.take(rows)
        batch = Batch(
            weak_BCHW=_one(some, weak),
            strong_BCHW=_one(some, strong),
            label_B=torch.from_numpy(some.label_N),
            row_B=torch.zeros(len(some), dtype=torch.int64),
            probe_MCHW=_one(trusted, weak),
            probe_label_M=torch.from_numpy(trusted.label_N),
            group_keys=(key(self.recipe.seed, Purpose.MIXUP, number),),
            classes=self.classes,
        )
        steps = self.recipe.schedule.steps
        moment = Moment(self.recipe.schedule.lr, step=steps - 1, steps=steps, memory=self.memory)
        outcome: Outcome = self.recipe.objective(self.network, batch, moment, Alone())
        decided = outcome.coefficients
        columns = {
            "settled": torch.ones(len(some)),  # all visits count alike
            "pseudo_label": decided.pseudo_label_B,
            "trust": decided.trust_B,
            "weight": decided.weight_B,
            "confidence": decided.confidence_B,
            "loss": decided.loss_B,
        }
        return pa.table(
            {"id": some.id_N, "label": some.label_N, **{name: column.numpy() for name, column in columns.items()}}
        )


def _one(held: Examples, look: int) -> torch.Tensor:
    return normalised(torch.from_numpy(np.ascontiguousarray(held.image_N[:, :, look : look + 1])))
