"""Food-101N: 310,009 web photos of Food-101's classes with noisy labels (Lee et al. 2018), tested on Food-101.

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.layout import Finding, Layout, Listing, TextList, counted, findings_of, looked_around, rows, settle
from pipeline.tree import Tree

IMAGES, VERIFIED_TRAIN, VERIFIED_VAL, TEST = 310_009, 52_868, 4_741, 25_250  # lines of the lists, published
TEST_ROOT = "food101"  # of Food-101's stable ids


@dataclass(frozen=True)
class Food101N(Layout):
    """Food-101N_release as its authors distribute it, folder or zip, and Food-101's test images.

    The images that people found rightly labelled are the probe (verified_train) and the evaluation set val
    (verified_val); all others of the list are train, those found wrong too.
    """

    name: ClassVar[str] = "food101n"

    food101: str = ""
    """URL of Food-101 (folder, tar or food-101.tar.gz), for the evaluation set test."""
    spool: str = ""
    """Folder into which food-101.tar.gz is decompressed, once (5 GB)."""

    def listing(self, url: str, *, look_around: bool = False) -> Listing:
        """Return the lists of the data set at `url`, settled; with `look_around`, unlisted files are counted too.

        Raises InputError where a list is missing or cannot be read.
        """
        tree = Tree.open(url)
        class_names = tuple(TextList.read(tree, "meta/classes.txt").without_header("class_name").lines)
        images = TextList.read(tree, "meta/imagelist.tsv").without_header("class_name")
        train, train_N = _classed(images, images.keys(), class_names)
        probe, probe_N, checked = _verified(tree, "meta/verified_train.tsv", class_names)
        val, val_N, val_checked = _verified(tree, "meta/verified_val.tsv", class_names)
        findings = [
            *findings_of(tree),
            counted("meta/imagelist.tsv", len(train), IMAGES),
            counted("meta/verified_train.tsv", checked, VERIFIED_TRAIN),
            counted("meta/verified_val.tsv", val_checked, VERIFIED_VAL),
        ]
        moved = {*probe, *val}
        expected = {"train": IMAGES - len(moved.intersection(train))}
        file_names = {key.partition("/")[2] for key in moved}
        if elsewhere := sum(key.partition("/")[2] in file_names and key not in moved for key in train):
            what = f"{elsewhere:,} images of train have the file name of a verified image of another class"
            findings.append(Finding("note", what, "they stay: the authors' lists have them so"))

        tables = [
            rows(self.name, split, keys, label_N, tree.places([f"images/{key}" for key in keys]))
            for split, keys, label_N in (("train", train, train_N), ("probe", probe, probe_N), ("val", val, val_N))
        ]
        if self.food101:
            food101 = Tree.open(self.food101, spool=self.spool)
            listed = TextList.read(food101, "meta/test.txt")
            test, test_N = _classed(listed, listed.keys(), class_names)
            tables.append(rows(TEST_ROOT, "test", test, test_N, food101.places([f"images/{key}.jpg" for key in test])))
            findings += findings_of(food101)
            expected["test"] = TEST
        else:
            findings.append(Finding("warning", "no evaluation set test", "give --food101, the URL of Food-101"))
        listing = Listing(pa.concat_tables(tables), class_names, tuple(findings), expected)
        return settle(looked_around(listing, tree) if look_around else listing)


def _classed(listed: TextList, keys: list[str], class_names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    # Keys, and the labels that their folders name.
    label_of = {name: label for label, name in enumerate(class_names)}
    label_N = np.array([label_of.get(key.partition("/")[0], -1) for key in keys], np.int32)
    strangers = np.flatnonzero(label_N < 0)
    if len(strangers):
        raise listed.refuse(int(strangers[0]), "class/image with a class of meta/classes.txt")
    return keys, label_N


def _verified(tree: Tree, name: str, class_names: tuple[str, ...]) -> tuple[list[str], np.ndarray, int]:
    # Keys and labels of the images that are of the class they are listed under, and how many were looked at.
    listed = TextList.read(tree, name).without_header("class_name")
    keys, right_N = listed.labelled(2, "\t")
    keys, label_N = _classed(listed, keys, class_names)
    return [key for key, right in zip(keys, right_N, strict=True) if right], label_N[right_N == 1], len(keys)
