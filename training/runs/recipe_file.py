"""recipe.json: the recipe and data that a run's folder belongs to, comparable whichever version wrote it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import storage
from pipeline.dataset import InputError
from training.recipe import Recipe, as_json

NAME, DATA, WEIGHTS = "recipe.json", "checksum of the data", "checksum of the weights it started from"
SCHEMA = 1  # of the file; 0 are those without a number
# What may differ when a run is resumed; everything else decides the result.
FREE_TO_CHANGE = (
    "workers", "actors", "device", "tracker", "data", "storage", "checkpoint_steps", "checkpoint_minutes", "timeout",
    "compile", "cuda_graph", "recompute",
)  # fmt: skip
# Fields that recipes had once, with the value under which a run did what it does without them.
RETIRED = {"objective.meta_every": 1, "objective.meta_probe": 1.0}
LEFT_OPEN = {"dataset.size": 224, "dataset.source.size": 224}  # fields that say None now where they said this
RENAMED = {"CleanNetWeights": "CleanNet"}  # kinds of objectives, by the name they had


def record(recipe: Recipe, data: str) -> dict[str, Any]:
    """Return what recipe.json says of a run of `recipe` on the data with the checksum `data`."""
    decides = {name: value for name, value in as_json(recipe).items() if name not in FREE_TO_CHANGE}
    return {"schema": SCHEMA, **decides, DATA: data}


def write(folder: str, recipe: Recipe, data: str, weights: str = "") -> None:
    """Write recipe.json into a run's folder; `weights` is the sha256 of those the run starts from."""
    fs, path = storage.connect(folder)
    held = record(recipe, data) | ({WEIGHTS: weights} if weights else {})
    storage.write(fs, storage.join(path, NAME), json.dumps(held, indent=2).encode())


def read(folder: str) -> dict[str, Any]:
    """Return what recipe.json says; raises InputError where it is missing, damaged or of a newer version."""
    fs, path = storage.connect(folder)
    try:
        held = json.loads(storage.read(fs, storage.join(path, NAME)))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {NAME}: give the folder of a run") from None
    except json.JSONDecodeError:
        raise InputError(f"{folder}/{NAME} is damaged: copy the run again") from None
    if held.get("schema", 0) > SCHEMA:
        raise InputError(f"{folder} was made by a newer version (schema {held['schema']}): update winnow")
    return held


def require_same(folder: str, recipe: Recipe, data: str) -> None:
    """Raise InputError, naming the first field that differs, where the folder belongs to another recipe or data."""
    if different := differences(recipe, record(recipe, data), read(folder)):
        raise InputError(f"{folder} was made with another {different[0]}: remove it or choose another --name")


def differences(recipe: Recipe, wanted: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """List the dotted paths that make `held`, a recipe as plain data, another one than `wanted`, which is `recipe`.

    A field that `held` lacks, because it is newer, has its default there; one that recipes have no more counts where
    its value changed what the run did.
    """
    now, then = (dict(_leaves(each)) for each in (wanted, _with_defaults(held, recipe)))
    for path, value in RETIRED.items():
        if path not in now and then.get(path) == value:
            del then[path]
    for path, value in LEFT_OPEN.items():
        if now.get(path, value) is None and then.get(path) == value:
            then[path] = None
    if (kind := str(then.get("objective.kind"))) in RENAMED:
        then["objective.kind"] = RENAMED[kind]
    if "dataset.source.kind" in now:  # left out by schema 0
        then.setdefault("dataset.source.kind", now["dataset.source.kind"])
    ignored = {"schema", WEIGHTS, *FREE_TO_CHANGE}
    absent = object()
    paths = [path for path in {**now, **then} if path.partition(".")[0] not in ignored]
    return [path for path in paths if now.get(path, absent) != then.get(path, absent)]


def _leaves(plain: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        place = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _leaves(value, place)
        else:
            yield place, value


def _with_defaults(held: Mapping[str, Any], now: Any) -> dict[str, Any]:
    # `held` with the fields of the dataclass `now` that it lacks, as far as they have defaults.
    filled = dict(held)
    for each in dataclasses.fields(now):
        value = getattr(now, each.name)
        if each.name in held:
            if dataclasses.is_dataclass(value) and isinstance(held[each.name], Mapping):
                filled[each.name] = _with_defaults(held[each.name], value)
            continue
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        if default is not dataclasses.MISSING:
            plain = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default  # type: ignore[arg-type]
            filled[each.name] = json.loads(json.dumps(plain))
    return filled
