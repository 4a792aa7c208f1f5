"""Folders of images, one a class, in splits or not, unpacked or in archives: where each belongs, and what is not read.

Every file is used, or counted in a finding with its reason. What could be read in two ways is an error.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline import splits, storage
from pipeline.archive import IMAGE, Archive, Place
from pipeline.dataset import InputError
from pipeline.layout import Finding, findings_of
from pipeline.raw import read_place
from pipeline.tree import Tree, hidden

LIST = re.compile(r".*\.(csv|tsv|xlsx?|jsonl?|parquet)", re.IGNORECASE | re.DOTALL)  # what may hold labels
# Endings of images that are not read, and none at all.
MAYBE_IMAGE = re.compile(r"|\.(heic|heif|jxl|svgz?|eps|tga|jpe?g.+|jp.|nef|cr[23w]|arw|dng|raw)")
COMPARED = 3  # images of an archive whose bytes tell whether it is unpacked beside it
NAMED = 5  # examples in a finding


@dataclass
class Found:
    """Hold N images as folders give them, and what was found on the way."""

    names: list[str] = field(default_factory=list)  # N
    places: list[Place] = field(default_factory=list)  # N
    labels: list[str] = field(default_factory=list)  # N names of classes
    splits: list[str] = field(default_factory=list)  # N
    findings: list[Finding] = field(default_factory=list)


def images_of(tree: Tree, used: Collection[str] = ()) -> tuple[dict[str, Place], list[Finding]]:
    """Return name -> place of all images of a whole tree, and findings on what is left out but for the URLs `used`.

    Images of archives are named as if each archive were unpacked where it lies: into a folder of its name where its own
    names have no folder, or where its name is that of a split.
    Raises InputError where an archive is unpacked beside itself in part.
    """
    plain = [name for name in tree.names if IMAGE.fullmatch(name) and not hidden(name)]
    kept, findings = _without_copies(tree, plain)
    found: dict[str, Place] = {name: (f"{tree.url}/{name}", 0, -1, "file") for name in plain}
    known = {*used, *(archive.url for archive in tree.archives)}  # read, or in a finding of their own
    others = [name for name in tree.names if name not in found and f"{tree.url}/{name}" not in known]
    twice = [name for archive in kept for name in _unpacked(archive, found, others)]
    if twice:
        what = f"{len(twice):,} images have the name of another one in the same folder, or its archive ({twice[0]})"
        findings.append(Finding("warning", what, "the last is read; rename them if both are wanted", len(twice)))
    labelled = any(archive.labels for archive in kept)
    labels = "those that tars hold beside images" if labelled else "the names of folders"
    return dict(sorted(found.items())), [*findings_of(tree), *findings, *unread(others, found, labels)]


def _unpacked(archive: Archive, found: dict[str, Place], others: list[str]) -> list[str]:
    # Add an archive's images to `found` and its other files to `others`; the names that were there already. Where a
    # name comes twice the last one counts, as it does when an archive is unpacked.
    lead, twice = home_of(archive), []
    for row, name in enumerate(archive.images):
        if hidden(name):
            others.append(lead + name)
            continue
        if lead + name in found:
            twice.append(lead + name)
        found[lead + name] = archive.place(row)
    others += [lead + name for name in archive.others if name not in archive.labels]
    return twice


def home_of(archive: Archive) -> str:
    """Return what the names of an archive's images lead with in its tree: "", or folders with a final slash."""
    tops = {name.partition("/")[0] for name in archive.images if "/" in name}
    flat = any("/" not in name for name in archive.images)
    own = flat or (splits.named(archive.stem) is not None and not any(map(splits.named, tops)))
    return "".join(f"{part}/" for part in (archive.folder, archive.stem if own else "") if part)


def unread(names: Iterable[str], images: Iterable[str] = (), labels: str = "the names of folders") -> list[Finding]:
    """Return findings that count the files that nothing here reads: those nobody sees, and the others by ending.

    `images` are the names of those that are read, `labels` what their labels are taken from.
    """
    stems = {name.rpartition(".")[0] for name in images}
    groups: dict[str, list[str]] = {"unseen": [], "beside": [], "lists": [], "rest": []}
    for name in sorted(names):
        groups[_kind(name, stems)].append(name)
    findings = []
    if unseen := groups["unseen"]:
        what = f"{len(unseen):,} hidden files, or of tools (such as {unseen[0]})"
        findings.append(Finding("note", what, "left out", len(unseen)))
    for kind, what, fix in (
        ("beside", "files beside images, of their names, are not read", f"labels are {labels}"),
        ("lists", "tables are not read", f"labels are {labels}; give the table itself to read them from there"),
        ("rest", "other files are not read", "convert those that are images, to JPEG or PNG"),
    ):
        if some := groups[kind]:
            harmless = kind == "rest" and not any(MAYBE_IMAGE.fullmatch(_ending(name)) for name in some)
            what = f"{len(some):,} {what}: {endings(some)} (such as {some[0]})"
            findings.append(Finding("note" if harmless else "warning", what, fix, len(some)))
    return findings


def _kind(name: str, stems: set[str]) -> str:
    if hidden(name):
        return "unseen"
    if name.rpartition(".")[0] in stems:
        return "beside"
    return "lists" if LIST.fullmatch(name) else "rest"


def endings(names: Iterable[str]) -> str:
    """Return how many of the names have which ending, in words."""
    counts = Counter(_ending(name) for name in names)
    return ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in counts.most_common(NAMED))


@dataclass(frozen=True)
class _Levels:
    # Which parts of a name are what: those before `top` wrap all others, then comes the split where there are any.
    top: int
    label: int
    in_splits: dict[str, str]  # folder -> split; empty where folders of classes are outermost

    def split(self, part: Sequence[str]) -> str:
        # "" for what is in no folder of a class.
        if len(part) <= self.label:
            return ""
        return self.in_splits.get(part[self.top], "") if self.in_splits else "train"


def classes_of(url: str, images: dict[str, Place], folders: Sequence[str], others: Sequence[str]) -> Found:
    """Return split and class of each of `images` by their folders, of which `folders` may be empty.

    `others` are the names of files that are not read. Raises InputError where folders could be meant in two ways.
    """
    found = Found()
    parts = {name: name.split("/")[:-1] for name in images}
    levels = _levels(list(parts.values()))
    if levels.in_splits:
        _require_known(url, parts.values(), levels)
    else:
        _require_classes(url, parts.values(), levels.top, found)
        _note_nested(url, parts.values(), levels.top, found)
    stray = []
    for name, part in parts.items():
        if split := levels.split(part):
            found.names.append(name)
            found.places.append(images[name])
            found.labels.append(part[levels.label])
            found.splits.append(split)
        else:
            stray.append(name)
    if stray:
        what = f"{len(stray):,} images are in no folder of a class ({min(stray)})"
        found.findings.append(Finding("warning", what, "left out; move them if they are wanted", len(stray)))
    _note_empty(found, folders, others, levels)
    return found


def _levels(parts: Sequence[Sequence[str]]) -> _Levels:
    top = _wrappers(parts)
    holders = {part[top] for part in parts if len(part) > top + 1}  # of folders of images
    in_splits = {head: split for head in sorted(holders) if (split := splits.named(head))}
    if not in_splits:
        return _Levels(top, top, {})
    below = [part[top:] for part in parts if len(part) > top and part[top] in in_splits]
    return _Levels(top, top + 1 + _inner_wrappers(below), in_splits)


def _without_copies(tree: Tree, plain: Sequence[str]) -> tuple[list[Archive], list[Finding]]:
    # The archives that do not lie unpacked beside themselves.
    there, kept, findings = set(plain), [], []
    for archive in tree.archives:
        images = sorted({name for name in archive.images if not hidden(name)})
        where = archive.url.rpartition("/")[2]
        copy = _copy_of(tree, archive, images, there)
        if copy is None:
            kept.append(archive)
            continue
        shared = sum(copy + name in there for name in images)
        if shared < len(images):
            raise InputError(
                f"{where} lies unpacked in {copy or tree.url} in part ({shared:,} of {len(images):,} images): "
                "unpack it whole, or remove one"
            )
        what = f"{where} lies unpacked beside it, in {copy.rstrip('/') or tree.url} ({len(images):,} images)"
        findings.append(Finding("note", what, "the unpacked files are read", 1))
    return kept, findings


def _copy_of(tree: Tree, archive: Archive, images: Sequence[str], there: set[str]) -> str | None:
    # What the names of an archive's images lead with where it lies unpacked; None where it does not.
    for first in images[:1]:
        for lead in sorted(name[: -len(first)] for name in there if name == first or name.endswith(f"/{first}")):
            if _same(tree, archive, [name for name in images if lead + name in there], lead):
                return lead
    return None


def _same(tree: Tree, archive: Archive, shared: Sequence[str], base: str) -> bool:
    # Whether files have the bytes of an archive's images: told by some.
    row_of = {name: row for row, name in enumerate(archive.images)}
    some = [shared[len(shared) * k // COMPARED] for k in range(COMPARED)] if shared else []
    return bool(some) and all(
        read_place(archive.place(row_of[name])) == storage.read(tree.fs, storage.join(tree.path, base + name))
        for name in dict.fromkeys(some)
    )


def _wrappers(parts: Iterable[Sequence[str]]) -> int:
    # How many folders stand around all others, which archives bring along: with nothing beside them but stray images.
    left, top = [part for part in parts if part], 0
    while True:
        heads = {part[top] for part in left}
        if len(heads) != 1 or splits.named(next(iter(heads))) or not any(len(part) > top + 1 for part in left):
            return top
        left = [part for part in left if len(part) > top + 1]
        top += 1


def _inner_wrappers(parts: Sequence[Sequence[str]]) -> int:
    # The same below each split: seg_train/seg_train/CLASS. One class a split is none, unless it is called like a split.
    skip = 0
    while True:
        below = {(part[0], part[skip + 1]) for part in parts if len(part) > skip + 1}
        deeper = {part[0] for part in parts if len(part) > skip + 2}
        heads, names = {head for head, _ in below}, {name for _, name in below}
        alone = len(below) == len(heads) and deeper == heads
        if not below or not alone or (len(names) > 1 and not all(map(splits.named, names))):
            return skip
        skip += 1


def _require_known(url: str, parts: Iterable[Sequence[str]], levels: _Levels) -> None:
    # Raise where a folder beside the splits holds classes of theirs, but has no split's name.
    top, in_splits = levels.top, levels.in_splits
    parts = [part for part in parts if len(part) > top + 1]
    classes = {part[levels.label] for part in parts if levels.split(part)}
    unknown = sorted({part[top] for part in parts if part[top] not in in_splits and classes & set(part[top + 1 :])})
    if unknown:
        raise InputError(
            f"{url} has {unknown[0]}/ beside {', '.join(f'{name}/' for name in in_splits)}: which split is it? "
            "Rename it (train, probe, val, test, dev …) or move it away"
        )


def _require_classes(url: str, parts: Iterable[Sequence[str]], top: int, found: Found) -> None:
    # Raise where outermost folders, which are read as classes, are named like splits.
    heads = {part[top] for part in parts if len(part) > top}
    named = {head: split for head in sorted(heads) if (split := splits.named(head))}
    words = {head for head in named if head.lower() in splits.WORDS}
    if len(set(named.values())) > 1 or named.keys() > words or (named and heads == set(named)):
        some = min(named.keys() - words or named)
        raise InputError(
            f"{url}: {some}/ is named like a split and holds images, but no folders of classes: put each class into a "
            "folder of its name there, or give a table of paths and labels (.csv or .parquet)"
        )
    for head in words:
        what = f"{head}/ holds images and no folders of classes: it is read as a class, not as a split"
        found.findings.append(Finding("warning", what, "put classes into folders below it if it is a split"))


def _note_nested(url: str, parts: Iterable[Sequence[str]], top: int, found: Found) -> None:
    # Raise where classes hold splits; note where they hold folders of equal names, which may be the classes.
    below: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        if len(part) > top + 1:
            below[part[top + 1]].add(part[top])
    said = {name: split for name in sorted(below) if (split := splits.named(name))}
    if "train" in said.values() and len(set(said.values())) > 1:
        name = next(name for name, split in said.items() if split == "train")
        head = min(below[name])
        raise InputError(f"{url}: {head}/{name}/ is a split in a class: put classes into splits, as {name}/{head}/")
    shared = [name for name in sorted(below) if len(below[name]) > 1]
    for name in shared[:1]:
        what = f"{', '.join(sorted(below[name])[:NAMED])} are read as classes, and hold folders of equal names ({name})"
        fix = f"if {name} is a class, its folder must be outermost, or in train/"
        found.findings.append(Finding("warning", what, fix))


def _note_empty(found: Found, folders: Sequence[str], others: Sequence[str], levels: _Levels) -> None:
    # Name the folders of classes in which no image was read, with what lies there.
    depth = levels.label + 1
    held: dict[str, list[str]] = {folder: [] for folder in folders if folder.count("/") == depth - 1}
    for name in others:
        if name.count("/") >= depth:
            held.setdefault("/".join(name.split("/")[:depth]), []).append(name)
    full = {"/".join(name.split("/")[:depth]) for name in found.names}
    homes = {name.rpartition("/")[0] for name in full}  # what holds classes: the splits, or what wraps all
    empty = [
        f"{folder}: {endings(held[folder]) if held[folder] else 'empty'}"
        for folder in sorted(held.keys() - full)
        if folder.rpartition("/")[0] in homes and not hidden(folder)
    ]
    if empty:
        what = f"no image is read in {len(empty):,} folders ({'; '.join(empty[:NAMED])})"
        found.findings.append(Finding("warning", what, "convert what lies there, or take them away"))


def _ending(name: str) -> str:
    file = name.rpartition("/")[2]
    return f".{file.rpartition('.')[2].lower()}" if "." in file.strip(".") else ""
