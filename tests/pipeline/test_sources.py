"""Every data set comes back from its own JSON, and whoever reads one knows them all."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline import sources
from pipeline.cifar import Cifar
from pipeline.dataset import HeldOut, InputError, Source
from pipeline.digits import Digits
from pipeline.index import Sharded
from pipeline.noise import Noise

ROOT = Path(__file__).parents[2]
# Tests have sources of their own.
KINDS = {name: kind for name, kind in Source.kinds.items() if kind.__module__.startswith("pipeline.")}
RATES, TEXT = st.floats(0, 1), st.text(min_size=1, max_size=5)
NOISES = st.one_of(
    st.just(Noise()),
    st.builds(Noise, st.sampled_from(["uniform", "asymmetric"]), RATES),
    st.builds(Noise, st.just("labels"), source=TEXT),
    st.builds(Noise, st.just("open_set"), RATES, TEXT),
)
OF_TYPE = {
    int: st.integers(8, 32),
    int | None: st.none() | st.integers(8, 32),
    float | None: st.none() | st.floats(0.1, 1),
    Noise: NOISES,
    Source: st.deferred(lambda: st.one_of(*map(built, KINDS.values()))),
}


@st.composite
def built(draw: st.DrawFn, kind: Any) -> Source:
    """A source of a class, every field drawn by its type."""
    hints = get_type_hints(kind)
    values = {
        field.name: draw(OF_TYPE.get(hints[field.name], st.from_type(hints[field.name])))
        for field in dataclasses.fields(kind)
    }
    try:
        return kind(**values)
    except InputError:  # a noise that this data set does not have
        assume(False)
        raise


@pytest.mark.slow
def test_a_reader_knows_every_data_set_of_the_pipeline():
    """In a fresh interpreter: what importing all modules of the pipeline adds is nothing."""
    code = "import importlib, sys\nfrom pipeline import sources\nbefore = set(sources.Source.kinds)\n"
    code += "for name in sys.argv[1:]: importlib.import_module(name)\nprint(*before, '|', *sources.Source.kinds)"
    modules = [f"pipeline.{file.stem}" for file in (ROOT / "pipeline").glob("[!_]*.py")]
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    before, _, after = done.stdout.partition("|")
    assert set(before.split()) == set(after.split()) >= {"Cifar", "Digits", "HeldOut", "Sharded"}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_source_and_one_held_out_of_it_come_back_from_json(kind):
    @given(built(kind), st.integers(0, 5))
    def check(source: Source, per_class: int) -> None:
        for each in (source, HeldOut(source, per_class)):
            data = sources.to_json(each)
            assert data["kind"] == type(each).__name__
            assert sources.from_json(json.loads(json.dumps(data))) == each

    check()


def test_what_is_missing_has_its_default():
    assert sources.from_json({"kind": "Cifar"}) == Cifar()
    assert sources.from_json({"kind": "Digits", "noise": {"kind": "uniform"}}) == Digits(Noise("uniform", 0.0))
    held = {"kind": "HeldOut", "source": {"kind": "Sharded", "dataset": "custom", "evaluate": ["val"]}, "per_class": 2}
    assert sources.from_json(held) == HeldOut(Sharded("custom", evaluate=("val",)), 2)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"kind": "Elsewhere"}, "'Elsewhere'"),
        ({}, "'kind'"),
        ({"kind": "Digits", "rows": 3}, "'rows'"),
        ({"kind": "Sharded"}, "'dataset'"),
        ({"kind": "HeldOut", "source": {"probe_per_class": 3}, "per_class": 0}, "'kind'"),
        ({"kind": "HeldOut", "source": "Digits", "per_class": 0}, "dictionary update"),
        ({"kind": "Digits", "noise": 0.8}, "'float'"),
        ({"kind": ["Digits"]}, "unhashable"),
        (None, "'NoneType'"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(data, named):
    with pytest.raises(InputError, match=rf"^the recipe names a data set that is unknown here \(.*{named}.*the code"):
        sources.from_json(data)


def test_a_field_that_cannot_be_is_refused_as_elsewhere():
    with pytest.raises(InputError, match=r"^size is 2 px: give 8 to 32"):
        sources.from_json({"kind": "Cifar", "size": 2})
