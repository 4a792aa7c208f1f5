"""Judge every label by heads on stored features that have never seen it: one head a fold, trained on all other rows.

ω and λ are those of a step of the method without its update, beside the trusted images, one visit for each look at an
image. How probable labels are, and which class is the likeliest other one, is told by the head's answers, their mean
over the looks, and by how annotators confuse the classes (`training.audit.confusion`).

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
from training.audit.confusion import Confusion, learned
from training.audit.evidence import probability
from training.engine.batch import normalised
from training.launch import run
from training.objectives.interface import Alone, Batch, Coefficients, Moment, Outcome
from training.recipe import Recipe
from training.runs import checkpoint, model_file

FOLDER = "audit/heads"  # of the heads' own runs, below the features
CHUNK = 1 << 14  # rows read at once
LEAST = 1e-30  # probability


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
        judges = []
        for fold in range(self.folds):
            recipe = self.recipe(fold)
            result = run(recipe, console)
            judges.append(_Judge(recipe, model_file.read(result.folder).network(), result.dataset))
        confused = self._confusion(judges)
        for fold, judge in enumerate(judges):
            held = self.held_out(fold)
            for start in range(0, len(held), CHUNK):
                some = np.arange(start, min(start + CHUNK, len(held)))
                # Mixed, as in training: methods judge answers by the average of those beside them.
                rows = generator(judge.recipe.seed, Purpose.ORDER, start).permutation(some)
                yield judge(held.take(rows), start, confused)

    def _confusion(self, judges: list[_Judge]) -> Confusion:
        # What the heads' answers to the first rows of each fold, a chunk of all, say of the labels.
        logits, labels = [], []
        for fold, judge in enumerate(judges):
            held = self.held_out(fold)
            first = held.take(np.arange(min(CHUNK // self.folds, len(held))))
            logits.append(judge.logits(first))
            labels.append(torch.from_numpy(first.label_N))
        return learned(torch.cat(logits), torch.cat(labels))

    def write(self, console: Console) -> list[tuple[str, int]]:
        """Write the visits as files beside the heads; return their paths and numbers of rows."""
        folder = storage.join(self.url, FOLDER)
        written = []
        for number, table in enumerate(self.visits(console)):
            name = storage.join(folder, f"{self.method}-of-{self.folds}-{number:05d}.parquet")
            storage.write_table(*storage.connect(name), table)
            written.append((name, len(table)))
        return written

    @property
    def rows(self) -> Embedded:
        """Return the rows of all folds."""
        return Embedded(self.index.of(self.url, "train"), self.how.columns)

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

    def logits(self, held: Examples) -> torch.Tensor:
        """Return the head's answers to some rows, the mean over their looks, N×K float64."""
        looks = range(held.image_N.shape[2])
        with torch.no_grad():
            return torch.stack([self.network(_one(held, look)).double() for look in looks]).mean(0)

    def __call__(self, held: Examples, first: int, confused: Confusion) -> pa.Table:
        """Return the visits of some rows, of which the first is row `first` of their fold."""
        class_NK = confused.posterior(self.logits(held), torch.from_numpy(held.label_N)).numpy()
        tables = []
        for start in range(0, len(held), self.recipe.batch):
            rows = np.arange(start, min(start + self.recipe.batch, len(held)))
            some, looks = held.take(rows), held.image_N.shape[2]
            for look in range(looks):
                decided = self._decided(some, first + start, look, (look + 1) % looks)
                tables.append(_visits(some, class_NK[rows], decided))
        return pa.concat_tables(tables)

    def _decided(self, some: Examples, number: int, weak: int, strong: int) -> Coefficients:
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
        return outcome.coefficients


def _visits(some: Examples, class_NK: np.ndarray, decided: Coefficients) -> pa.Table:
    # One of each row: the label's probability as `quality` takes it, and the likeliest of the other classes.
    row_N, classes = np.arange(len(some)), class_NK.shape[1]
    right_N, other_NK = class_NK[row_N, some.label_N], class_NK.copy()
    other_NK[row_N, some.label_N] = -1
    columns = {
        "id": some.id_N,
        "label": some.label_N,
        "settled": np.ones(len(some), np.float32),  # all visits count alike
        "pseudo_label": other_NK.argmax(1),
        "trust": decided.trust_B.numpy(),
        "weight": decided.weight_B.numpy(),
        "confidence": other_NK.max(1),
        "loss": -np.log(np.maximum(probability(right_N, classes), LEAST)),
    }
    return pa.table(columns)


def _one(held: Examples, look: int) -> torch.Tensor:
    return normalised(torch.from_numpy(np.ascontiguousarray(held.image_N[:, :, look : look + 1])))
