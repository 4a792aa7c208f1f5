"""Every data set that a recipe can name, and a data set of a recipe as plain data, as JSON has it.

A class of `dataset.Source` is known by its name as soon as its module is imported: this one imports them all, so that
whoever reads a recipe, such as a finished model's, knows them. A new data set is imported here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from pipeline import cifar, digits, features, index  # noqa: F401
from pipeline.dataset import InputError, Source


def to_json(source: Source) -> dict[str, Any]:
    """Return `source` as plain data: `kind`, the name of its class, and its fields; a source inside it likewise."""
    return {"kind": type(source).__name__, **_fields(source)}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Source):
        return to_json(value)
    if dataclasses.is_dataclass(value):
        return _fields(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def from_json(data: Mapping[str, Any]) -> Source:
    """Return the source that `to_json` made `data` of; a field that is missing has its default.

    Raises InputError for a kind or field that is none, and as the source itself does.
    """
    try:
        return _source(data)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:  # what is no mapping raises the last two
        what = f"the recipe names a data set that is unknown here ({error})"
        raise InputError(f"{what}: use the code it was made with") from None


def _source(data: Any) -> Source:
    fields = dict(data)
    return _made(Source.kinds[fields.pop("kind")], fields)


def _made(kind: Any, fields: Any) -> Any:
    # The type of a field says what its data are: those of a source, of another dataclass, of a tuple, or the value.
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, data in dict(fields).items():
        hint = hints.get(name)
        if isinstance(hint, type) and issubclass(hint, Source):
            values[name] = _source(data)
        elif dataclasses.is_dataclass(hint):
            values[name] = _made(hint, data)
        else:
            values[name] = tuple(data) if isinstance(data, list) else data
    return kind(**values)
