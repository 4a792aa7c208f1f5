"""Copies found by check among the splits of a raw data set, on real Ray Data."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pipeline import duplicates as duplicates_module
from pipeline.check import CifarFiles, check, main
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.duplicates import look
from tests.pipeline.layouts import jpeg, scenes, write

PICTURES = scenes(18)
STORED = [jpeg(picture) for picture in PICTURES]


def again(number: int, quality: int = 60, scale: float = 1.0) -> bytes:
    """A picture scaled and compressed anew."""
    small = cv2.resize(PICTURES[number], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


CLEAN = {
    **{f"train/{'ab'[row % 2]}/{row}.jpg": STORED[row] for row in range(8)},
    **{f"probe/{'ab'[row % 2]}/{row}.jpg": STORED[row] for row in range(8, 12)},
    **{f"test/{'ab'[row % 2]}/{row}.jpg": STORED[row] for row in range(12, 16)},
}
FLAT = [jpeg(np.full((40, 40, 3), grey, np.uint8)) for grey in (90, 200)]
PLANTED = {
    "test/a/other name.jpg": STORED[0],  # byte for byte, of train
    "test/a/small.jpg": again(3, 90, 0.25),  # of train, under the other label
    "test/b/of probe.jpg": again(9, 30),
    "train/a/trusted.jpg": again(10, 60, 0.5),
    "train/b/within.jpg": again(6, 90),
    "train/a/flat.jpg": FLAT[0],
    "train/b/flat.jpg": FLAT[1],
    "test/a/broken.jpg": b"<html>404",
    "train/a/broken.jpg": b"<html>404",
}


@pytest.fixture
def several_tasks(local_ray, monkeypatch):
    monkeypatch.setattr(duplicates_module, "LEAST_ROWS", 5)
    monkeypatch.setattr(duplicates_module, "TASKS", 4)


def test_planted_copies_are_found_and_leaks_are_errors(several_tasks, tmp_path, capsys):
    write(f"{tmp_path}/data", {**CLEAN, **PLANTED})
    pairs = tmp_path / "made" / "pairs.csv"
    status = main(["custom", f"{tmp_path}/data", "--duplicates", "--pairs", str(pairs), "--sample", "0"])
    told = " ".join(capsys.readouterr().out.split())
    assert status == 1
    assert "✗ 2 to fix first, 1 warnings" in told

    with pairs.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["key"], row["other_key"]): row for row in rows}
    assert set(found) == {
        ("train/a/0.jpg", "test/a/other name.jpg"),
        ("train/b/3.jpg", "test/a/small.jpg"),
        ("probe/b/9.jpg", "test/b/of probe.jpg"),
        ("train/a/trusted.jpg", "probe/a/10.jpg"),
        ("train/a/6.jpg", "train/b/within.jpg"),
    }
    equal = found["train/a/0.jpg", "test/a/other name.jpg"]
    assert (equal["distance"], equal["equal"]) == ("0", "true")
    assert (equal["split"], equal["other_split"]) == ("train", "test")
    small = found["train/b/3.jpg", "test/a/small.jpg"]
    assert (small["label"], small["other_label"], small["equal"]) == ("b", "a", "false")
    assert 0 <= int(small["distance"]) <= 40


def test_findings_name_the_thing_and_the_fix(several_tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(f"{tmp_path}/data", {**CLEAN, **PLANTED})
    report = check(Custom(), f"{tmp_path}/data", sample=0, pairs="pairs.csv")
    found = {(finding.level, finding.what): finding.fix for finding in report.findings}
    leak = "2 images of test are copies of images of train, 1 under another label"
    leak += " (train/a/0.jpg and test/a/other name.jpg)"
    assert found["error", leak] == "a leak, which makes results too good: take them out of train, see pairs.csv"
    assert ("error", "1 images of test are copies of images of probe (probe/b/9.jpg and test/b/of probe.jpg)") in found
    both = "1 images of probe are copies of images of train (train/a/trusted.jpg and probe/a/10.jpg)"
    assert "noisy training examples too" in found["warning", both]
    within = "1 images of train are copies within it, 1 under another label (train/a/6.jpg and train/b/within.jpg)"
    assert found["note", within] == "see pairs.csv"
    assert ("note", "2 of 23 images are flat or nearly so") in found
    assert (tmp_path / "pairs.csv").exists()


def test_data_without_copies_are_ready(several_tasks, tmp_path):
    write(f"{tmp_path}/data", CLEAN)
    report = check(Custom(), f"{tmp_path}/data", sample=0, pairs=f"{tmp_path}/pairs.csv")
    assert "no copies among 16 images" in [finding.what for finding in report.findings if finding.level == "ok"]
    assert not report.count("error")
    assert len((tmp_path / "pairs.csv").read_text().splitlines()) == 1  # the names of its columns


def test_nothing_is_looked_for_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(f"{tmp_path}/data", {**CLEAN, **PLANTED})
    assert main(["custom", f"{tmp_path}/data", "--sample", "0"]) == 0
    assert [path.name for path in Path().iterdir()] == ["data"]
    with pytest.raises(InputError, match="leave out --duplicates"):
        check(CifarFiles(), str(tmp_path), pairs="pairs.csv")


def test_images_that_cannot_be_read_are_passed_over(tmp_path):
    write(str(tmp_path), {"whole.jpg": STORED[0], "broken.jpg": STORED[1][:-50], "flat.jpg": FLAT[0]})
    files = [f"{tmp_path}/{name}.jpg" for name in ("broken", "whole", "missing", "flat")]
    task = pa.table({"row": [3, 4, 5, 6], "file": files, "start": [0] * 4, "size": [-1] * 4, "how": ["file"] * 4})
    told = look(task).to_pydict()
    assert told["row"] == [3, 4, 5, 6]
    assert told["readable"] == [False, True, False, True]
    assert told["detailed"] == [False, True, False, False]
