"""What importing loads, and names that shadow nobody. Who may import whom is in pyproject.toml, for lint-imports."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "training", "tuning")


def loaded_after_importing(modules: list[str]) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that imported `modules`."""
    code = "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout))


@pytest.mark.slow
def test_objectives_and_networks_know_no_ray():
    files = (ROOT / "training" / "objectives").rglob("[!_]*.py")
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    assert {"training.objectives.ieg", "training.objectives.baselines.glc"} <= set(modules)
    loaded = loaded_after_importing(
        [*modules, "training.engine.networks", "training.engine.state", "training.engine.step"]
    )
    assert "torch" in loaded
    assert "ray" not in loaded
    assert "timm" not in loaded  # seconds to import: only where a timm network is asked for


def test_no_module_shadows_a_standard_or_installed_one():
    # Ours are installed too, as rooms.
    taken = (set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())) - {*ROOMS, "benchmarks"}
    assert {"queue", "ray", "torch"} <= taken
    # A script's folder leads sys.path: the files beside it are what can shadow.
    ours = {path.stem for room in ROOMS for path in (ROOT / room).iterdir() if path.suffix == ".py" or path.is_dir()}
    shared = (ours - {"__init__", "__pycache__"}) & taken
    # azure-identity says that it brings `images`, and does not.
    assert [name for name in shared if importlib.util.find_spec(name)] == []


def test_init_files_are_empty():
    assert [str(f) for room in ROOMS for f in (ROOT / room).rglob("__init__.py") if f.read_text().strip()] == []
