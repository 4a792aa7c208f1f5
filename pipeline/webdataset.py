"""WebDataset: tars in which files of one name belong together, KEY.jpg with its label in KEY.cls or KEY.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from pipeline import splits
from pipeline.archive import Archive, ReadLabel
from pipeline.dataset import InputError
from pipeline.folders import Found, home_of
from pipeline.layout import Finding
from pipeline.tree import hidden


def label_reader(field: str) -> ReadLabel:
    """Return what reads the label of a file beside an image: all of a .cls, or a `field` of a .json where one is given.

    A label that cannot be read is "".
    """

    def read(name: str, data: Callable[[], bytes]) -> str | None:
        if not name.lower().endswith(".json" if field else ".cls"):
            return None
        try:
            value = json.loads(data()).get(field) if field else data().decode().strip()
        except (ValueError, AttributeError):
            return ""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        known = isinstance(value, (str, int)) and not isinstance(value, bool)
        return str(value).strip() if known else ""

    return read


def is_webdataset(archives: Iterable[Archive], field: str) -> bool:
    """Return whether archives hold labels beside their images.

    Raises InputError where they hold .json files beside images that are in no folder, and no `field` is given.
    """
    archives = list(archives)
    if any(archive.labels for archive in archives):
        return True
    for archive in archives:
        stems = {_key(name) for name in archive.images if "/" not in name}
        beside = [name for name in archive.others if name.lower().endswith(".json") and _key(name) in stems]
        if beside and not field:
            raise InputError(
                f"{archive.url} has a .json beside each image ({beside[0]}): name its field that holds the label, "
                "--label-column FIELD"
            )
    return False


def samples(archives: Iterable[Archive], field: str) -> Found:
    """Return the images of WebDataset's tars with their labels; the names of tars or their folders are those of splits.

    Raises InputError where an image has no label or a sample has two images.
    """
    archives = [archive for archive in archives if archive.images]
    split_of = splits.of_files([f"{archive.folder}/{archive.stem}".lstrip("/") for archive in archives])
    found, unused = Found(), 0
    for archive, split in zip(archives, split_of, strict=True):
        label_of = {_key(name): label for name, label in archive.labels.items()}
        home = home_of(archive)
        used: dict[str, str] = {}
        for row, name in enumerate(archive.images):
            if hidden(name):
                continue
            key = _key(name)
            if not label_of.get(key):
                kind = f"field {field} in its .json" if field else ".cls that can be read"
                raise InputError(f"{archive.url}: {name} has no {kind}: add it, or take the image out")
            if key in used:
                raise InputError(f"{archive.url} has two images of one sample, {used[key]} and {name}: keep one")
            used[key] = name
            found.names.append(home + name)
            found.places.append(archive.place(row))
            found.labels.append(label_of[key])
            found.splits.append(split)
        unused += len(label_of.keys() - used.keys())
    if unused:
        what = f"{unused:,} labels in tars have no image"
        found.findings.append(Finding("warning", what, "add the images, in a format that is read", unused))
    return found


def _key(name: str) -> str:
    # All of a name before the first dot of its last part, as WebDataset has it.
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"
