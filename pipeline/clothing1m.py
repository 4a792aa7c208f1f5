"""Clothing1M: a million clothing photos of 14 classes with noisy labels, and 72,409 with clean ones (Xiao 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.layout import Layout, Listing, TextList, findings_of, looked_around, rows, settle
from pipeline.tree import Tree

# split, list of its keys, list of their labels
_LISTS = (
    ("train", "noisy_train_key_list.txt", "noisy_label_kv.txt"),
    ("probe", "clean_train_key_list.txt", "clean_label_kv.txt"),
    ("val", "clean_val_key_list.txt", "clean_label_kv.txt"),
    ("test", "clean_test_key_list.txt", "clean_label_kv.txt"),
)
_PUBLISHED = {"train": 1_000_000, "probe": 47_570, "val": 14_313, "test": 10_526}


@dataclass(frozen=True)
class Clothing1M(Layout):
    """Clothing1M as its authors distribute it: lists in the folder or its annotations/, and images/ or images/0.tar ….

    The noisy million is train, clean train is the probe; the clean val and test sets are the evaluation sets.
    """

    name: ClassVar[str] = "clothing1m"

    def listing(self, url: str, *, look_around: bool = False) -> Listing:
        """Return the lists of the data set at `url`, settled; with `look_around`, unlisted files are counted too.

        Raises InputError where a list is missing or cannot be read.
        """
        tree = Tree.open(url)
        class_names = tuple(name.strip() for name in _read(tree, "category_names_eng.txt").lines)
        label_of = {name: _labels(tree, name, len(class_names)) for name in dict.fromkeys(list_[2] for list_ in _LISTS)}
        tables = []
        for split, list_name, labels_name in _LISTS:
            listed = _read(tree, list_name)
            keys, labels = listed.keys(), label_of[labels_name]
            label_N = np.fromiter((labels.get(key, -1) for key in keys), np.int32, len(keys))
            unlabelled = np.flatnonzero(label_N < 0)
            if len(unlabelled):
                raise listed.refuse(int(unlabelled[0]), f"an image that {labels_name} gives a label")
            tables.append(rows(self.name, split, keys, label_N, tree.places(keys)))
        listing = Listing(pa.concat_tables(tables), class_names, findings_of(tree), _PUBLISHED)
        return settle(looked_around(listing, tree) if look_around else listing)


def _read(tree: Tree, name: str) -> TextList:
    return TextList.read(tree, name, f"annotations/{name}")


def _labels(tree: Tree, name: str, classes: int) -> dict[str, int]:
    keys, label_N = _read(tree, name).labelled(classes)
    return dict(zip(keys, label_N.tolist(), strict=True))
