"""Which columns of a table hold what: images or their names, labels, splits, trust, ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.dataset import InputError
from pipeline.layout import Finding

URI = ("uri", "path", "image_path", "file_name", "url")  # columns that name images


@dataclass(frozen=True)
class Columns:
    """Hold the names of columns that are not what they are called by default; "" where they are."""

    image: str = ""
    label: str = ""
    split: str = ""
    trusted: str = ""
    id: str = ""


def chosen(
    url: str,
    names: Sequence[str],
    columns: Columns,
    images: Sequence[str],
    *,
    labelled: bool,
    given: dict[str, str] | None = None,
) -> dict[str, str]:
    """Return role (image, label, split, trusted, id) -> the column of `names` that has it.

    `images` are the columns of encoded images, `given` those that a folder gives.
    Raises InputError where one that is needed is not there, or could be two.
    """
    there = _by_lower(url, (*names, *(given or {})))
    roles = ("label", "split", "trusted", "id") if labelled else ("id",)
    found = {role: _column(url, there, getattr(columns, role), role) for role in roles}
    images = [name for name in images if name not in found.values()]
    found["image"] = _image_column(url, there, columns.image, images)
    if found["image"] not in images and not columns.id:
        found["id"] = ""  # an image is known by its name
    missing = not found["image"] or (labelled and not found["label"])
    if missing:
        raise _lacking(url, there, columns.image or " or ".join(images or URI), labelled=labelled)
    return {role: name for role, name in found.items() if name}


def _lacking(url: str, there: dict[str, str], image: str, *, labelled: bool) -> InputError:
    more = ", or one of encoded images"
    if labelled:
        more = " and label, and may have split and trusted: rename columns, or name them by --label-column and others"
    return InputError(f"{url} has columns {', '.join(there.values()) or '(none)'}: it needs {image}{more}")


def _by_lower(url: str, names: Sequence[str]) -> dict[str, str]:
    # The columns that have a name, by that name in lower case.
    there: dict[str, str] = {}
    for name in names:
        key = name.strip().lower()
        if key in there:
            raise InputError(f"{url} has two columns called {there[key]}: rename one of them")
        if key:
            there[key] = name
    return there


def _image_column(url: str, there: dict[str, str], stated: str, images: Sequence[str]) -> str:
    candidates = [name for name in (images or URI) if name.lower() in there]
    if len(candidates) > 1 and not stated:
        kind = "columns of encoded images" if images else "columns that may name images"
        raise InputError(
            f"{url} has {len(candidates)} {kind} ({', '.join(candidates)}): keep one, or choose it by --image-column"
        )
    return _column(url, there, stated, *candidates)


def _column(url: str, there: dict[str, str], stated: str, *defaults: str) -> str:
    # The column that was stated, which must be there, or the first of the defaults that is; "" where none is.
    if stated and stated.lower() not in there:
        raise InputError(f"{url} has no column {stated}, only {', '.join(there.values()) or '(none)'}")
    names = (stated,) if stated else defaults
    return next((there[name.lower()] for name in names if name.lower() in there), "")


def ignored(url: str, names: Sequence[str], used: Any) -> tuple[Finding, ...]:
    """Return a finding on the columns that are not read, if there are any."""
    left = sorted({name for name in names if name} - set(used))
    return (Finding("note", f"columns of {url} that are not read: {', '.join(left)}"),) if left else ()
