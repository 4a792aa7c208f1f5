"""The command lines of check and shards: a data set's name and URL, its layout's flags and the command's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from typing import Annotated, Any, Generic, TypeVar

import tyro

from pipeline.clothing1m import Clothing1M
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.food101n import Food101N
from pipeline.layout import Layout
from pipeline.webvision import WebVision

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (WebVision, Clothing1M, Food101N, Custom)}
# Flags of what is in another place, for examples.
ELSEWHERE = {"webvision": " --imagenet gs://raw/imagenet", "food101n": " --food101 gs://raw/food-101"}

Chosen = TypeVar("Chosen")
Options = TypeVar("Options")


@dataclass(frozen=True)
class Command(Generic[Chosen, Options]):
    """Hold what a command line says."""

    url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]
    """Where the raw data set is: a local path or any fsspec URL, such as gs://bucket/folder."""
    layout: Annotated[Chosen, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="")]


def parse(
    module: str,
    doc: str | None,
    layouts: Mapping[str, type],
    options: type[Options],
    arguments: Sequence[str] | None,
    example: str = "",
) -> Command[Any, Options]:
    """Parse the command `python -m MODULE DATASET URL [flags]`; a wrong one ends the program with the reason and
    status 2.

    `example` holds flags that an example of the command needs.
    """
    about = "\n".join(
        f"  {name:<12}{cleandoc(layout.__doc__ or '').splitlines()[0]}" for name, layout in layouts.items()
    )
    first = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=(doc or "").partition("\n\nShapes")[0],
        epilog=f"data sets:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    first.add_argument("dataset", choices=layouts, metavar="DATASET", help="which data set it is, see below")
    first.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its URL and flags")
    chosen = first.parse_args(arguments)
    layout, name = layouts[chosen.dataset], chosen.dataset
    prog = f"{first.prog} {name}"
    description = f"{cleandoc(layout.__doc__ or '')}\n\n    {prog} gs://raw/{name}{ELSEWHERE.get(name, '')}{example}"
    try:
        return tyro.cli(Command[layout, options], args=chosen.rest, prog=prog, description=description)  # type: ignore[valid-type]
    except (InputError, ValueError) as error:  # tyro tells only what the outermost dataclass raises
        first.error(str(error))


def guarded(work: Callable[[], int | None]) -> None:
    """End the program with the status that `work` returns; what the user can fix ends it with one line."""
    try:
        sys.exit(work())
    except (InputError, ConnectionError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
