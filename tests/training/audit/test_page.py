"""The page of an audit: whole in one file, true to its figures, and, where there is a browser, laid out as meant."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pyarrow as pa
import pytest

from training.audit import page
from training.audit.evidence import SCHEMA, Findings
from training.audit.neighbours import SCHEMA as AROUND
from training.audit.neighbours import SIDE, Neighbours
from training.audit.page import Judged, Report, render, thumbnail

HOSTILE = "<script>alert('x')</script> & $a_b$ {{ name }} ñ 猫 a very long class name that goes on and on"


def around(label_N: np.ndarray, rng: np.random.Generator) -> Neighbours:
    """Surroundings of images that lie anywhere."""
    images = len(label_N)
    other_N = (np.arange(images) + 1) % images
    columns = {"id": np.arange(images), "label": label_N, "nearest": other_N, "nearest_label": label_N[other_N]}
    columns |= {"similarity": rng.random(images), "isolation": rng.random(images)}
    table = pa.table([pa.array(columns[field.name]).cast(field.type) for field in AROUND], schema=AROUND)
    return Neighbours(table, np.arange(images), label_N, SIDE * rng.random((images, 2)))


def report(
    classes: int, images: int, *, wrong: float = 0.3, name: str = "a run", side: int = 32, of_features: bool = True
) -> Report:
    """An audit of random images, whose first class has a hostile name."""
    rng = np.random.default_rng(classes)
    label, quality = rng.integers(classes, size=images), rng.random(images).astype(np.float32)
    proposed = np.where(rng.random(images) < wrong, (label + 1) % classes, label)
    columns = {column: rng.random(images) for column in SCHEMA.names} | {"id": np.arange(images), "label": label}
    columns |= {"proposed": proposed, "quality": quality, "suspect": (quality < 0.5) & (proposed != label)}
    columns |= {"visits": np.full(images, 4)}
    findings = Findings(np.full(classes, 5), page.PER_CLASS, page.OVERALL, suggestions=0)
    findings.add(pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA))
    neighbours = around(label, rng) if of_features else None
    pictures = {id_: picture(rng, side) for id_ in page.shown(findings, neighbours)}
    some = picture(rng, side)
    return Report(
        name=name,
        about="what was read",
        class_names=(HOSTILE, *(f"class {k}" for k in range(1, classes))),
        accuracy=0.5,
        findings=findings,
        images=pictures,
        disputed=[Judged(7, some, 0, 1, 0.01)] if wrong else [],
        disputed_images=3 if wrong else 0,
        torn=[(some, ("cat", "dog"))] if wrong else [],
        torn_images=1 if wrong else 0,
        neighbours=neighbours,
        map_suspect_P=quality < 0.1 if of_features else None,
    )


def picture(rng: np.random.Generator, side: int) -> np.ndarray:
    return cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), (side, side))


class Tags(HTMLParser):
    """Every tag and attribute of a page; raises where tags do not close in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


@pytest.mark.parametrize("classes", [2, 20, 40])
def test_with_features_the_page_has_a_map_and_look_alikes(classes):
    shown = report(classes, 600)
    text = render(shown)
    paths = [dict(tag[1])["d"] for tag in Tags(text).found if tag[0] == "path"]
    drawn = sum(path.count("M") for path in paths)
    coloured = np.isin(
        shown.neighbours.map_label_P, np.argsort(-shown.findings.count_K, kind="stable")[: page.COLOURED]
    )
    assert drawn == coloured.sum() + 600  # by label, and by suspicion
    assert (f"{classes - page.COLOURED} smaller classes are left out" in text) == (classes > page.COLOURED)
    for row in shown.neighbours.pairs(page.PAIRS).to_pylist():
        assert f"{row['similarity']:.3f} like the next" in text
    assert f"isolation {shown.neighbours.table['isolation'].to_numpy().max():.2f}" in text
    without = render(report(classes, 600, of_features=False))
    assert "Map of the features" not in without
    assert "Outliers" not in without


@pytest.mark.parametrize(("classes", "images"), [(2, 30), (10, 400), (40, 900), (1000, 4000)])
def test_the_page_is_whole_in_one_file(classes, images):
    text = render(report(classes, images))
    tags = Tags(text)
    assert "script" not in {tag for tag, _ in tags.found}
    assert not re.search(r"https?:|[\"'(=]//|url\(|@import", text)
    for tag, attributes in tags.found:
        assert not {"href", "srcset", "action", "data"} & attributes.keys(), tag
        if source := attributes.get("src"):
            assert source.startswith(("data:image/jpeg;base64,", "data:image/png;base64,"))
    assert "&lt;script&gt;alert(" in text
    assert len(text.encode()) < 6e6


def test_figures_are_those_of_the_findings():
    made = report(3, 200)
    findings, text = made.findings, " ".join(re.sub(r"<[^>]+>", " ", render(made)).split())
    suspects, wrong = findings.suspect_K.sum(), findings.wrong_K.sum()
    assert f"{suspects} Suspect labels {suspects / 2:.1f} % of all" in text
    assert f"{wrong / 2:.1f} % Estimated wrong" in text
    assert "3 Trusted labels disputed of 15 trusted images" in text
    assert "50.0 % Accuracy of the judge" in text
    for k in (1, 2):
        count, rate = findings.count_K[k], 100 * findings.wrong_K[k] / findings.count_K[k]
        assert f"class {k} {count} 5 {findings.suspect_K[k]} {rate:.1f} %" in text
    assert text.count("quality 0.") == np.minimum(findings.suspect_K, page.PER_CLASS).sum()


def test_a_page_without_suspects_says_so():
    text = render(report(3, 50, wrong=0.0))
    assert "No label is suspect" in text
    assert "No label is doubted" in text
    assert "agrees with every trusted label" in text
    assert "No two stored images" in text


def test_many_classes_make_tables_and_no_map():
    small, large = render(report(10, 400)), render(report(1000, 4000))
    assert 'class="map"' in small
    assert 'class="map"' not in large
    assert "980 more classes" in large
    assert large.count("<h3>class ") <= page.SHOWN_CLASSES


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8, 1), (8, 8)), ((32, 32, 3), (192, 192)), ((500, 250, 3), (192, 96))]
)
def test_thumbnails_keep_shape_and_colour(shape, size):
    image = np.full(shape, 40, np.uint8)
    image[..., 0] = 200  # red, where there is colour
    source, coarse = thumbnail(image)
    assert coarse == (max(shape) <= 20)
    _, _, data = source.partition("base64,")
    made = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED)
    assert made.shape[:2] == size
    assert abs(int(made.reshape(-1, made.shape[-1] if made.ndim == 3 else 1)[0, -1]) - 200) < 6


# ---- in a browser ----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# What a reader would see at once: pictures that did not load, text beyond its box, a page wider than the window.
LOOK = """<script>addEventListener('load', () => {
  const wide = [...document.querySelectorAll('h1, h2, h3, td, th, b, p, dd, .figures span')];
  document.title = JSON.stringify({
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    images: document.images.length,
    beyond: document.documentElement.scrollWidth - innerWidth,
    cut: wide.filter(e => getComputedStyle(e).textOverflow != 'ellipsis' && e.scrollWidth > e.clientWidth + 1)
             .map(e => e.outerHTML),
    bars: Math.max(...[...document.querySelectorAll('.histogram i')].map(e => e.offsetHeight)),
    squares: [...document.querySelectorAll('.tile')].every(e => Math.abs(e.offsetHeight - e.offsetWidth) < 1.5),
  })})</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page's layout was not looked at")
@pytest.mark.parametrize("width", [1280, 700])
@pytest.mark.parametrize(("classes", "images"), [(3, 60), (20, 800), (1000, 4000)])
def test_a_browser_shows_all_of_it(tmp_path, width, classes, images):
    (tmp_path / "audit.html").write_text(render(report(classes, images)) + LOOK)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options += [f"--window-size={width},900", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *options, f"file://{tmp_path}/audit.html"], capture_output=True, text=True, timeout=120
    )
    seen = json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout, re.S)[1]))
    assert seen["images"] > 20
    assert seen["broken"] == 0
    assert seen["beyond"] <= 0
    assert seen["cut"] == []
    assert seen["bars"] > 60
    assert seen["squares"]
