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
    twice: list[str] = []
    for archive in kept:
        lead = home_of(archive)
        # Where a name comes twice the last one counts, as it does when an archive is unpacked.
        for row, name in enumerate(archive.images):
            if not hidden(name):
                twice += [lead + name] * (lead + name in found)
                found[lead + name] = archive.place(row)
        others += [lead + name for name in archive.images if hidden(name)]
        others += [lead + name for name in archive.others if name not in archive.labels]
    if twice:
        what = f"{len(twice):,} images have the name of another one in the same folder, or its archive ({twice[0]})"
        findings.append(Finding("warning", what, "the last is read; rename them if both are wanted", len(twice)))
    labelled = any(archive.labels for archive in kept)
    labels = "those that tars hold beside images" if labelled else "the names of folders"
    return dict(sorted(found.items())), [*findings_of(tree), *findings, *unread(others, found, labels)]


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
    unseen: list[str] = []
    others: list[str] = []
    for name in sorted(names):
        (unseen if hidden(name) else others).append(name)
    findings = []
    if unseen:
        what = f"{len(unseen):,} hidden files, or of tools (such as {unseen[0]})"
        findings.append(Finding("note", what, "left out", len(unseen)))
    stems = {name.rpartition(".")[0] for name in images}
    beside = [name for name in others if name.rpartition(".")[0] in stems]
    apart = [name for name in others if name.rpartition(".")[0] not in stems]
    lists = [name for name in apart if LIST.fullmatch(name)]
    rest = [name for name in apart if not LIST.fullmatch(name)]
    for some, what, fix in (
        (beside, "files beside images, of their names, are not read", f"labels are {labels}"),
        (lists, "tables are not read", f"labels are {labels}; give the table itself to read them from there"),
        (rest, "other files are not read", "convert those that are images, to JPEG or PNG"),
    ):
        if some:
            what = f"{len(some):,} {what}: {endings(some)} (such as {some[0]})"
            findings.append(
                Finding("note" if some is rest and not _maybe_images(some) else "warning", what, fix, len(some))
            )
    return findings


def endings(names: Iterable[str]) -> str:
    """Return how many of the names have which ending, in words."""
    counts = Counter(_ending(name) for name in names)
    return ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in counts.most_common(NAMED))


def classes_of(url: str, images: dict[str, Place], folders: Sequence[str], others: Sequence[str]) -> Found:
    """Return split and class of each of `images` by their folders, of which `folders` may be empty.

    `others` are the names of files that are not read. Raises InputError where folders could be meant in two ways.
    """
    found = Found()
    parts = {name: name.split("/")[:-1] for name in images}
    top = _wrappers(parts.values())
    heads = {part[top] for part in parts.values() if len(part) > top}
    deep = {part[top] for part in parts.values() if len(part) > top + 1}  # they hold folders of images
    in_splits = {head: split for head in deep if (split := splits.named(head))}
    if in_splits:
        skip = _inner_wrappers(
            [part[top:] for part in parts.values() if part[top : top + 1] and part[top] in in_splits]
        )
        level = top + 1 + skip
        _require_known(url, parts.values(), top, level, in_splits)
    else:
        level = top
        _require_classes(url, parts.values(), top, heads, found)
    stray = []
    for name, part in parts.items():
        if len(part) <= level or (in_splits and part[top] not in in_splits):
            stray.append(name)
            continue
        found.names.append(name)
        found.places.append(images[name])
        found.labels.append(part[level])
        found.splits.append(in_splits[part[top]] if in_splits else "train")
    if stray:
        what = f"{len(stray):,} images are in no folder of a class ({min(stray)})"
        found.findings.append(Finding("warning", what, "left out; move them if they are wanted", len(stray)))
    _note_empty(found, folders, others, top, level, in_splits)
    return found


def _without_copies(tree: Tree, plain: Sequence[str]) -> tuple[list[Archive], list[Finding]]:
    # The archives that do not lie unpacked beside themselves, nor a second time in another archive.
    there, kept = set(plain), []
    findings = []
    for archive in tree.archives:
        images = sorted({name for name in archive.images if not hidden(name)})
        where = archive.url.rpartition("/")[2]
        copy = ""
        if images:
            bases = [n[: -len(images[0])] for n in plain if n == images[0] or n.endswith(f"/{images[0]}")]
            for base in bases:
                shared = [name for name in images if base + name in there]
                if not _same(tree, archive, shared, base):
                    continue
                if len(shared) < len(images):
                    raise InputError(
                        f"{where} lies unpacked in {base or tree.url} in part ({len(shared):,} of {len(images):,} "
                        "images): unpack it whole, or remove one"
                    )
                copy = base.rstrip("/") or tree.url
        if copy:
            what = f"{where} lies unpacked beside it, in {copy} ({len(images):,} images)"
            findings.append(Finding("note", what, "the unpacked files are read", 1))
        else:
            kept.append(archive)
    return kept, findings


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
    # The same below each split: seg_train/seg_train/CLASS.
    skip = 0
    while True:
        below: dict[str, set[str]] = defaultdict(set)
        for part in parts:
            if len(part) > skip + 1:
                below[part[0]].add(part[skip + 1])
        deeper = {part[0] for part in parts if len(part) > skip + 2}
        if not below or any(len(names) > 1 for names in below.values()) or deeper != set(below):
            return skip
        if len({name for names in below.values() for name in names}) > 1 and not all(
            splits.named(name) for names in below.values() for name in names
        ):
            return skip  # one class a split, which may be as it is
        skip += 1


def _require_known(url: str, parts: Iterable[Sequence[str]], top: int, level: int, in_splits: dict[str, str]) -> None:
    # Raise where a folder beside the splits holds classes of theirs, but has no split's name; or where none is train.
    parts = [part for part in parts if len(part) > top + 1]
    classes = {part[level] for part in parts if part[top] in in_splits and len(part) > level}
    unknown = sorted({part[top] for part in parts if part[top] not in in_splits and classes & set(part[top + 1 :])})
    if unknown:
        raise InputError(
            f"{url} has {unknown[0]}/ beside {', '.join(f'{name}/' for name in sorted(in_splits))}: which split is it? "
            "Rename it (train, probe, val, test, dev …) or move it away"
        )


def _require_classes(url: str, parts: Iterable[Sequence[str]], top: int, heads: set[str], found: Found) -> None:
    # Raise where top folders that are read as classes look like splits, or like folders of splits.
    named = {head: split for head in sorted(heads) if (split := splits.named(head))}
    exact = {head for head in named if head.lower() in splits.WORDS}
    if len(set(named.values())) > 1 or named.keys() - exact or (named and heads == set(named)):
        some = next(iter(sorted(named.keys() - exact) or sorted(named)))
        raise InputError(
            f"{url}: {some}/ is named like a split and holds images, but no folders of classes: put each class into a "
            "folder of its name there, or give a table of paths and labels (.csv or .parquet)"
        )
    for head in exact:
        what = f"{head}/ holds images and no folders of classes: it is read as a class, not as a split"
        found.findings.append(Finding("warning", what, "put classes into folders below it if it is a split"))
    below: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        if len(part) > top + 1:
            below[part[top + 1]].add(part[top])
    inner = {splits.named(name) for name in below}
    if "train" in inner and len(inner - {None}) > 1:
        name = next(name for name in sorted(below) if splits.named(name) == "train")
        head = min(below[name])
        raise InputError(f"{url}: {head}/{name}/ is a split in a class: put classes into splits, as {name}/{head}/")
    shared = {name: tops for name, tops in sorted(below.items()) if len(tops) > 1}
    if shared:
        name, tops = next(iter(shared.items()))
        what = f"{', '.join(sorted(tops)[:NAMED])} are read as classes, and hold folders of equal names ({name})"
        found.findings.append(
            Finding("warning", what, f"if {name} is a class, its folder must be outermost, or in train/")
        )


def _note_empty(
    found: Found, folders: Sequence[str], others: Sequence[str], top: int, level: int, in_splits: dict[str, str]
) -> None:
    # Name the folders of classes in which no image was read, with what lies there.
    full = {"/".join(name.split("/")[: level + 1]) for name in found.names}
    held = defaultdict(list)
    for name in others:
        held["/".join(name.split("/")[: level + 1])].append(name)
    around = {"/".join(name.split("/")[:top]) for name in found.names}
    empty = []
    for folder in sorted({*folders, *held}):
        part = folder.split("/")
        is_class = len(part) == level + 1 and "/".join(part[:top]) in around and not hidden(folder)
        inside = folder in folders or any(name != folder for name in held[folder])
        if is_class and inside and folder not in full and (not in_splits or part[top] in in_splits):
            empty.append(f"{folder}: {endings(held[folder]) if held[folder] else 'empty'}")
    if empty:
        what = f"no image is read in {len(empty):,} folders ({'; '.join(empty[:NAMED])})"
        found.findings.append(Finding("warning", what, "convert what lies there, or take them away"))


def _ending(name: str) -> str:
    file = name.rpartition("/")[2]
    return f".{file.rpartition('.')[2].lower()}" if "." in file.strip(".") else ""


def _maybe_images(names: Iterable[str]) -> bool:
    # Whether some could be images: of no ending, or of one that stands for images that are not read.
    return any(
        re.fullmatch(r"|\.(heic|heif|jxl|svgz?|eps|tga|jpe?g.+|jp.|nef|cr[23w]|arw|dng|raw)", _ending(n)) for n in names
    )
