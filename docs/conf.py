"""The documentation site: these pages, and a reference of all modules by static analysis, which imports none of them.

`make docs` builds it into build/docs; a warning is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import GoogleDocstring

ROOT = Path(__file__).parents[1]

project = "Winnow"
release = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
copyright = "the authors of Winnow, Apache-2.0"
extensions = ["myst_parser", "autoapi.extension"]
html_theme = "furo"  # asks no other host for fonts or scripts
html_title = f"Winnow {release}"
html_static_path = ["_static"]
html_css_files = ["winnow.css"]
html_copy_source = False
highlight_language = "none"  # most blocks are commands with explanations beside them
add_module_names = False
smartquotes = False  # θ' is no quotation

myst_heading_anchors = 3
suppress_warnings = [
    "autoapi.python_import_resolution",  # a name that a module has imported from a place that does not define it
    "ref.python",  # two classes of one name, such as the options of two commands, in an annotation
]

autoapi_dirs = ["../pipeline", "../training", "../tuning"]
autoapi_root = "reference"
autoapi_keep_files = False
autoapi_options = ["members", "undoc-members", "show-inheritance", "show-module-summary"]
autoapi_member_order = "bysource"

SECTION = re.compile(r"(Args|Returns|Yields|Raises):$")


def restructured(text: str) -> str:
    """Return a docstring, which is plain text with `code` and indented blocks of code, as reStructuredText."""
    parts: list[tuple[bool, list[str]]] = [(False, [])]  # whether it is a block, and its lines
    section = False
    for line in text.split("\n"):
        indented = line.startswith("    ")
        section = bool(SECTION.match(line)) or (section and (indented or not line))
        block = not section and (indented or (parts[-1][0] and not line))
        if block != parts[-1][0]:
            parts.append((block, []))
        parts[-1][1].append(line)
    made = []
    for block, lines in parts:
        part = "\n".join(lines)
        made.append(f"\n::\n\n{part}\n" if block else "".join(map(escaped, re.split("(`[^`]+`)", part))))
    return "\n".join(made)


def escaped(text: str) -> str:
    """Return text, or `code`, of a docstring so that reStructuredText sees nothing else in it."""
    if len(text) > 2 and text[0] == text[-1] == "`":
        return f"\\ `{text}`\\ "
    return re.sub(r"([\\*|_`])", r"\\\1", text)


def convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring in place."""
    text = restructured("\n".join(lines))
    # What stands beside a field is a sentence, perhaps with a colon, and has no sections.
    lines[:] = text.split("\n") if what in ("attribute", "data") else GoogleDocstring(text, what=what).lines()


def setup(app: Any) -> None:
    """Connect what is ours."""
    app.connect("autodoc-process-docstring", convert)
