"""What a sweep searches: fields of a recipe by dotted path, each with a range or values (domains of Ray Tune)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

from pipeline.dataset import InputError
from training.recipe import Recipe, override

# What every data set's space has in common: the paper tunes p and k by hand for each (§5, App. B), and states the rest.
METHOD: Mapping[str, Domain] = {
    "objective.p": tune.loguniform(0.1, 20),
    "objective.kl": tune.loguniform(0.1, 50),
    "objective.threshold": tune.choice([1.0, 0.05, 0.02]),  # T; ω* of 100 examples sums to 1
    "objective.lambda0": tune.uniform(0.5, 0.99),
    "objective.lookahead_lr": tune.loguniform(0.02, 0.5),
}

SCHEDULE: Mapping[str, Domain] = {
    "schedule.lr": tune.loguniform(0.02, 0.3),
    "schedule.t_mul": tune.uniform(1, 2),
    "schedule.m_mul": tune.uniform(0.7, 1),
}


def parse(words: Iterable[str]) -> dict[str, Domain]:
    """Return PATH=LOW..HIGH, PATH=log:LOW..HIGH and PATH=A,B,C as domains; raises InputError for anything else.

    Ranges between whole numbers written without a point are of whole numbers.
    """
    return dict(_parse(word) for word in words)


def _parse(word: str) -> tuple[str, Domain]:
    path, _, text = word.partition("=")
    path, log = path.replace("-", "_"), text.startswith("log:")
    low, dots, high = text.removeprefix("log:").partition("..")
    if not (path and text):
        raise InputError(f"{word} names nothing to search: write objective.p=log:0.1..20 or schedule.lr=0.05,0.1")
    if not dots:
        return path, tune.choice([_value(each) for each in text.split(",")])
    first, last = _number(word, low), _number(word, high)
    if not first < last or (log and first <= 0):
        raise InputError(f"{word} is an empty range: it wants a LOW below HIGH{', above 0' if log else ''}")
    if isinstance(first, int) and isinstance(last, int):  # Tune leaves out a whole number's upper end
        return path, tune.lograndint(first, last + 1) if log else tune.randint(first, last + 1)
    return path, tune.loguniform(first, last) if log else tune.uniform(first, last)


def _number(word: str, text: str) -> int | float:
    value = _value(text)
    if isinstance(value, str) or not math.isfinite(value):
        raise InputError(f"{word} is no range: {text or 'nothing'} is not a number")
    return value


def _value(text: str) -> int | float | str:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def check(searched: Mapping[str, Domain], recipe: Recipe) -> None:
    """Make the recipes at all ends of ranges; an unknown path or impossible value ends the program as in `override`."""
    for path, domain in searched.items():
        for value in _ends(domain):
            override(recipe, {path: value})


def _ends(domain: Domain) -> list[Any]:
    if isinstance(domain, Categorical):
        return list(domain.categories)
    return [domain.lower, domain.upper - 1 if isinstance(domain, Integer) else domain.upper]


def _nearest(domain: Domain, value: Any) -> Any:
    ends = _ends(domain)
    if isinstance(domain, Categorical):
        return value if value in ends else ends[0]
    return ends[0] if value is None else min(max(value, ends[0]), ends[1])


def points(searched: Mapping[str, Domain], recipes: Iterable[Recipe]) -> list[dict[str, Any]]:
    """Return where the recipes are in the space, each point once.

    A field outside of its range counts as the end that is next to it, or as the first of its values: Tune wants whole
    points.
    """
    found: list[dict[str, Any]] = []
    for recipe in recipes:
        values = {path: reduce(getattr, path.split("."), recipe) for path in searched}
        point = {path: _nearest(searched[path], value) for path, value in values.items()}
        if point not in found:
            found.append(point)
    return found


def grid(searched: Mapping[str, Domain]) -> dict[str, Any]:
    """Return all combinations, as Tune has them."""
    return {path: tune.grid_search(list(domain.categories)) for path, domain in searched.items()}


def size(searched: Mapping[str, Domain]) -> int:
    """Count the points of a grid; raises InputError for a range, which has no values to combine."""
    for path, domain in searched.items():
        if not isinstance(domain, Categorical):
            raise InputError(f"a grid combines values, and {path} has a range: search {path}=A,B,C")
    return math.prod(len(domain.categories) for domain in searched.values())


def logarithmic(domain: Domain) -> bool:
    """Return whether a range is searched on a logarithmic scale."""
    return isinstance(domain, (Float, Integer)) and isinstance(domain.get_sampler(), LogUniform)


def as_text(searched: Mapping[str, Domain]) -> dict[str, str]:
    """Return the space as `parse` reads it."""
    return {
        path: ",".join(map(str, _ends(domain)))
        if isinstance(domain, Categorical)
        else ("log:" if logarithmic(domain) else "") + "..".join(map(str, _ends(domain)))
        for path, domain in searched.items()
    }
