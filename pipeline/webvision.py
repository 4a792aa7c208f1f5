"""WebVision 1.0: 2.4 million photos found by web search for ImageNet's 1,000 classes (Li et al. 2017).

Shapes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipeline import imagenet
from pipeline.dataset import InputError
from pipeline.layout import Finding, Layout, Listing, TextList, findings_of, looked_around, rows, settle
from pipeline.tree import Tree

MINI_CLASSES = 50
_GOOGLE, _FLICKR, _VAL = "train_filelist_google.txt", "train_filelist_flickr.txt", "val_filelist.txt"
_VAL_FOLDERS = ("val_images_256", "val_images")  # with short side 256 px; original
# Training images: mini as all that use it count them, full by the authors' paper (arXiv 1708.02862). Google's are not
# stated there.
_TRAIN_IMAGES = {"mini": 65_944, "full": 2_439_574}
_VAL_PER_CLASS = 50


@dataclass(frozen=True)
class WebVision(Layout):
    """WebVision 1.0 as its authors distribute it, original or with short side 256 px; the probe is ImageNet's.

    Lists are in info/; images in google/, flickr/ and val_images_256/ or val_images/, or in the tars of these.
    """

    name: ClassVar[str] = "webvision"

    subset: Literal["mini", "google", "full"] = "mini"
    """Google images of the first 50 classes, Google images of all 1,000, or Google and Flickr images of all."""
    imagenet: str = ""
    """URL of ImageNet (train/ and val/, or its tars), for the probe set and a second evaluation set."""
    probe_per_class: int = 10
    """Trusted images of each class, from ImageNet's training set."""

    def __post_init__(self) -> None:
        if self.probe_per_class < 1:
            raise InputError(f"probe-per-class is {self.probe_per_class}: give 1 or more")

    def listing(self, url: str, *, look_around: bool = False) -> Listing:
        """Return the lists of the data set at `url`, settled; with `look_around`, unlisted files are counted too.

        Raises InputError where a list or ImageNet is missing or cannot be read.
        """
        if not self.imagenet:
            raise InputError("WebVision has no trusted images of its own: give --imagenet, the URL of ImageNet")
        tree, other = Tree.open(url), Tree.open(self.imagenet)
        wnids, names = _synsets(tree)
        kept = wnids[:MINI_CLASSES] if self.subset == "mini" else wnids
        findings = [*findings_of(tree), *findings_of(other)]

        train_lists = (_GOOGLE, _FLICKR) if self.subset == "full" else (_GOOGLE,)
        listed = {name: _info(tree, name).labelled(len(wnids)) for name in (*train_lists, _VAL)}
        tables = []
        for name in train_lists:
            keys, label_N = _first_classes(*listed[name], len(kept))
            tables.append(rows(self.name, "train", keys, label_N, tree.places(keys)))
        probe = imagenet.probe(other, kept, self.probe_per_class)
        tables.append(rows(imagenet.ROOT, "probe", probe.keys, probe.label_N, probe.places))
        keys, label_N = _first_classes(*listed[_VAL], len(kept))
        places = tree.places(keys, _VAL_FOLDERS)
        if any(file for file, *_ in places):
            tables.append(rows(self.name, "val", keys, label_N, places))
        else:
            fix = f"copy {' or '.join(_VAL_FOLDERS)} (or its tar) there for the evaluation set val"
            findings.append(Finding("warning", f"no validation images in {tree.url}", fix))
        evaluation = imagenet.validation(other, kept, wnids)
        if evaluation is None:
            fix = "copy val/ (or ILSVRC2012_img_val.tar) there for the evaluation set imagenet"
            findings.append(Finding("warning", f"no validation images in {other.url}", fix))
        else:
            tables.append(rows(imagenet.ROOT, "imagenet", evaluation.keys, evaluation.label_N, evaluation.places))

        expected = {
            "probe": self.probe_per_class * len(kept),
            "val": _VAL_PER_CLASS * len(kept),
            "imagenet": imagenet.VAL_PER_CLASS * len(kept),
        }
        if self.subset in _TRAIN_IMAGES:
            expected["train"] = _TRAIN_IMAGES[self.subset]
        listing = Listing(pa.concat_tables(tables), tuple(names[: len(kept)]), tuple(findings), expected)
        if look_around:
            # What the lists name beyond the subset is not unlisted.
            keys = [key for name in train_lists for key in listed[name][0]]
            if _FLICKR not in listed and tree.exists(f"info/{_FLICKR}"):
                keys += _info(tree, _FLICKR).labelled(len(wnids))[0]
            listing = looked_around(listing, tree, tree.places(keys) + tree.places(listed[_VAL][0], _VAL_FOLDERS))
        return settle(listing)


def _info(tree: Tree, name: str) -> TextList:
    return TextList.read(tree, f"info/{name}", name)


def _synsets(tree: Tree) -> tuple[list[str], list[str]]:
    # WordNet ids and names of all classes, in the order of their labels.
    listed = _info(tree, "synsets.txt")
    parts = [line.partition(" ") for line in listed.lines]
    for row, (wnid, _, name) in enumerate(parts):
        if not (wnid[:1] == "n" and wnid[1:].isdigit() and name):
            raise listed.refuse(row, "a WordNet id and its words")
    return [wnid for wnid, _, _ in parts], [name for _, _, name in parts]


def _first_classes(keys: Sequence[str], label_N: np.ndarray, classes: int) -> tuple[list[str], np.ndarray]:
    kept_N = label_N < classes
    return [key for key, kept in zip(keys, kept_N.tolist(), strict=True) if kept], label_N[kept_N]
