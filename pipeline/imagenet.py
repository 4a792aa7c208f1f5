"""ImageNet (ILSVRC 2012), from which WebVision's trusted images and one of its evaluation sets are taken.

It is read as torchvision lays it out (train/ and val/ with a folder a class), as Kaggle does (ILSVRC/Data/CLS-LOC/),
and from the original ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. Keys are the same in all of them.
Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.archive import Place
from pipeline.dataset import InputError
from pipeline.layout import TextList, stable_ids
from pipeline.tree import Tree

ROOT = "imagenet"  # of its images' stable ids
VAL_PER_CLASS = 50  # published

_HOMES = ("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/")  # Kaggle's
_TRAIN = re.compile(r"(?:.*/)?((n\d{8})_\d+\.JPEG)")
_VAL = re.compile(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.JPEG)")

# Labels of a flat val folder or tar: any of these lists does.
_BY_INDEX = "val.txt"  # "ILSVRC2012_val_00000001.JPEG 65": the class's place among the sorted wnids
_KAGGLE = "LOC_val_solution.csv"  # "ILSVRC2012_val_00000001,n01751748 111 108 …"
_IN_ORDER = "imagenet_2012_validation_synset_labels.txt"  # "n01751748": a line an image, in the images' order


@dataclass(frozen=True)
class Images:
    """Hold some images of ImageNet."""

    keys: list[str]  # N, such as train/n01440764/n01440764_10026.JPEG and val/ILSVRC2012_val_00000001.JPEG
    label_N: np.ndarray  # int32
    places: list[Place]


def probe(tree: Tree, wnids: Sequence[str], per_class: int) -> Images:
    """Return the `per_class` training images with the smallest ids of each of the K classes `wnids`: a draw without a
    seed.

    Raises InputError where a class has fewer.
    """
    name_of: dict[str, str] = {}  # key -> name in the tree
    for home in (*(f"{home}train/" for home in _HOMES), ""):
        for name in tree.images(*(f"{home}{wnid}" for wnid in wnids)):
            if match := _TRAIN.fullmatch(name):
                name_of.setdefault(f"train/{match[2]}/{match[1]}", name)
        if name_of:
            break
    of_class: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    for key in name_of:
        of_class.get(key.split("/")[1], []).append(key)
    keys: list[str] = []
    for wnid, members in of_class.items():
        if len(members) < per_class:
            raise InputError(
                f"ImageNet at {tree.url} has {len(members)} training images of {wnid}, the probe takes {per_class}: "
                f"it needs train/{wnid}/*.JPEG or ILSVRC2012_img_train.tar there"
            )
        keys += np.array(members)[np.argsort(stable_ids(ROOT, members))[:per_class]].tolist()
    label_N = np.repeat(np.arange(len(wnids), dtype=np.int32), per_class)
    return Images(keys, label_N, tree.places([name_of[key] for key in keys]))


def validation(tree: Tree, wnids: Sequence[str], every_wnid: Sequence[str]) -> Images | None:
    """Return the validation images of the classes `wnids`, of the K classes `every_wnid`; None where there are none.

    Raises InputError where there are images without labels.
    """
    for folder in (*(f"{home}val" for home in _HOMES), "ILSVRC2012_img_val"):
        names = {match[1]: name for name in tree.images(folder) if (match := _VAL.fullmatch(name))}
        if names:
            break
    else:
        return None
    order = sorted(names)
    parents = {file: names[file].split("/")[-2] for file in order}
    known = set(every_wnid)
    if all(parent in known for parent in parents.values()):
        wnid_of = parents
    else:
        wnid_of = _listed(tree, order, sorted(every_wnid))
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    files = [file for file in order if wnid_of[file] in label_of]
    label_N = np.array([label_of[wnid_of[file]] for file in files], np.int32)
    return Images([f"val/{file}" for file in files], label_N, tree.places([names[file] for file in files]))


def _listed(tree: Tree, files: list[str], in_order: list[str]) -> dict[str, str]:
    # File name -> wnid by the first list of labels there is, for at least all of `files`.
    if tree.exists(_BY_INDEX):
        keys, label_N = TextList.read(tree, _BY_INDEX).labelled(len(in_order))
        wnid_of = {key.rpartition("/")[2]: in_order[label] for key, label in zip(keys, label_N.tolist(), strict=True)}
    elif tree.exists(_KAGGLE):
        listed = TextList.read(tree, _KAGGLE).without_header("ImageId")
        wnid_of = {f"{line[0]}.JPEG": line[1].split(" ")[0] for line in csv.reader(listed.lines) if len(line) == 2}
    elif tree.exists(_IN_ORDER):
        lines = TextList.read(tree, _IN_ORDER).lines
        wnid_of = {f"ILSVRC2012_val_{number:08}.JPEG": wnid.strip() for number, wnid in enumerate(lines, 1)}
    else:
        raise InputError(
            f"the validation images at {tree.url} have no labels: put {_BY_INDEX}, {_KAGGLE} or {_IN_ORDER} there"
        )
    known = set(in_order)
    missing = [file for file in files if wnid_of.get(file) not in known]
    if missing:
        raise InputError(f"the list of labels at {tree.url} has no class for {missing[0]}: copy the list again")
    return wnid_of
