import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.check import CifarFiles, Report, check, main
from pipeline.clothing1m import Clothing1M
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.food101n import Food101N
from pipeline.webvision import WebVision
from tests.pipeline.layouts import photos, text, write, write_clothing1m, write_food101n, write_webvision

NOISY, TRUSTED = "noisy_train_key_list.txt", "clean_train_key_list.txt"


def said(report: Report, *levels: str) -> list[str]:
    return [finding.what for finding in report.findings if finding.level in levels]


def unwarned(report: Report) -> bool:
    """No error, and no warning but of the published numbers, which small copies cannot have."""
    return all("are published" in what for what in said(report, "warning", "error"))


@pytest.mark.parametrize("archives", [False, True])
def test_whole_data_sets_are_ready(tmp_path, archives):
    write_webvision(str(tmp_path), archives=archives)
    write_food101n(str(tmp_path), archives=archives)
    write_clothing1m(f"{tmp_path}/clothing", archives=archives)
    spool = str(tmp_path / "spool") if archives else ""
    for layout, place in (
        (WebVision("google", str(tmp_path / "imagenet"), probe_per_class=2), "webvision"),
        (Food101N(str(tmp_path / "food101"), spool), "food101n"),
        (Clothing1M(), "clothing"),
    ):
        report = check(layout, str(tmp_path / place))
        assert unwarned(report), said(report, "warning", "error")
        assert report.count("ok") >= 5
        assert any("sampled images are whole" in what for what in said(report, "ok"))
        assert any("train: originals, short side 32 to 32 (median 32) px" in what for what in said(report, "ok"))
        assert report.listing is not None


def test_cloud_storage_is_read_as_well(bucket):
    write_clothing1m(f"{bucket}/clothing")
    report = check(Clothing1M(), f"{bucket}/clothing", sample=20)
    assert unwarned(report), said(report, "warning", "error")
    assert "20 sampled images are whole" in said(report, "ok")


@pytest.fixture(scope="module")
def whole() -> list[list[bytes]]:
    return photos(14, 9)


@pytest.fixture
def clothing(tmp_path, whole) -> Path:
    write_clothing1m(str(tmp_path), whole)
    return tmp_path


def lines(clothing: Path, name: str) -> list[str]:
    return (clothing / name).read_text().splitlines()


def remove(clothing):
    (clothing / lines(clothing, NOISY)[0]).unlink()


def remove_a_tenth(clothing):
    for key in lines(clothing, NOISY)[::10]:
        (clothing / key).unlink()


def add(clothing):
    write(str(clothing), {"images/9/99/stranger.jpg": b"x"})


def repeat(clothing):
    write(str(clothing), {NOISY: text([*lines(clothing, NOISY), lines(clothing, NOISY)[3]])})


def share(clothing, other, moved):
    name, labels = f"clean_{other}_key_list.txt", lines(clothing, "noisy_label_kv.txt")
    shared = lines(clothing, name)[:moved]
    write(str(clothing), {NOISY: text([*lines(clothing, NOISY), *shared])})
    write(str(clothing), {"noisy_label_kv.txt": text([*labels, *(f"{key} 0" for key in shared)])})


def take_trust(clothing):
    write(str(clothing), {TRUSTED: text(lines(clothing, TRUSTED)[2:])})


def empty_a_class(clothing):
    labels = dict(line.split() for line in lines(clothing, "noisy_label_kv.txt"))
    write(str(clothing), {NOISY: text([key for key in lines(clothing, NOISY) if labels[key] != "4"])})


def truncate(clothing):
    path = clothing / lines(clothing, NOISY)[0]
    path.write_bytes(path.read_bytes()[:-50])


def overwrite_all(clothing):
    for key in lines(clothing, "clean_test_key_list.txt"):
        (clothing / key).write_bytes(b"<html>404")


ALL = 14 * 9
FAULTS = [
    (remove, "error|warning", r"^train: 1 of 84 images are not there \(such as images/"),
    (remove_a_tenth, "error", r"^train: 9 of 84 images are not there"),
    (add, "note", "^1 image files are in no list$"),
    (repeat, "warning", "^train lists 1 images twice$"),
    (lambda folder: share(folder, "test", 2), "note", "^2 images of train are in test too$"),
    (lambda folder: share(folder, "train", 3), "note", "^3 images of train are in probe too$"),
    (lambda folder: None, "warning", "^train: 84 images, 1,000,000 are published$"),
    (take_trust, "error", r"^no trusted image of 2 of 14 classes \(T-Shirt, Shirt\)$"),
    (empty_a_class, "warning", r"^no training image of 1 of 14 classes \(Sweater\)$"),
    (truncate, "warning", rf"^1 of {ALL} sampled images cannot be used: 1 truncated \(images/"),
    (overwrite_all, "error", rf"^14 of {ALL} sampled images cannot be used: 14 a web page, not an image \(images/"),
]


@pytest.mark.parametrize(("plant", "level", "message"), FAULTS)
def test_every_planted_fault_is_found(clothing, plant, level, message):
    before = check(Clothing1M(), str(clothing), 4 * ALL)
    plant(clothing)
    after = check(Clothing1M(), str(clothing), 4 * ALL)
    found = [finding for finding in after.findings if re.search(message, finding.what)]
    assert len(found) == 1, after.findings
    assert re.fullmatch(level, found[0].level)
    assert found[0].fix
    new = set(said(after, "warning", "error")) - set(said(before, "warning", "error"))
    assert new <= {found[0].what} | {what for what in new if "are published" in what}


def test_a_label_out_of_range_ends_the_check(clothing, capsys):
    path = clothing / "noisy_label_kv.txt"
    path.write_text(path.read_text().replace(" 13\n", " 14\n", 1))
    with pytest.raises(InputError, match=r"noisy_label_kv.txt, line \d+: .* a label of 0…13"):
        check(Clothing1M(), str(clothing))
    assert main(["clothing1m", str(clothing)]) == 1
    assert "✗ 1 to fix first" in capsys.readouterr().out


def test_imbalance_is_noted(tmp_path):
    for k, count in enumerate((2, 40)):
        images = photos(2, 40)[k][:count]
        write(str(tmp_path), {f"train/{k}/{row}.jpg": data for row, data in enumerate(images)})
        write(str(tmp_path), {f"probe/{k}/a{row}.jpg": data for row, data in enumerate(photos(2, 1, 24)[k])})
    report = check(Custom(), str(tmp_path), sample=0)
    assert "train: 2 to 40 (median 21) images a class" in said(report, "note")
    assert said(report, "error") == ["no evaluation set"]
    assert not any("sampled" in what for what in said(report, "ok"))


def test_what_a_layout_says_too_is_said_once(tmp_path):
    for k, of_class in enumerate(photos(3, 4)):
        write(str(tmp_path), {f"train/class{k}/{row}.jpg": data for row, data in enumerate(of_class)})
    report = check(Custom(), str(tmp_path))
    told = [finding for finding in report.findings if "no trusted image" in finding.what]
    assert [finding.what for finding in told] == ["no trusted image of 3 of 3 classes (class0, class1, class2)"]
    assert "--trusted" in told[0].fix


def test_parquet_is_sampled_in_runs(tmp_path):
    images = photos(2, 200)
    for split, count in (("train", 200), ("test", 40), ("probe", 3)):
        rows = [(k, images[k][row]) for row in range(count) for k in (0, 1)]
        table = pa.table({"label": [k for k, _ in rows], "image": [{"bytes": data, "path": ""} for _, data in rows]})
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=50)
    report = check(Custom(), str(tmp_path), sample=96)
    # 2 runs of 16 rows of each split, and all 6 of the probe
    assert "70 sampled images are whole" in said(report, "ok")
    assert unwarned(report), said(report, "warning", "error")


def test_the_256_px_version_is_told_from_originals(tmp_path):
    for size, version in ((256, "the 256-px version"), (300, "originals")):
        root = str(tmp_path / str(size))
        write_webvision(root, photos(2, 6, size))
        report = check(WebVision("google", f"{root}/imagenet", 2), f"{root}/webvision", sample=8)
        assert f"train: {version}, short side {size} to {size} (median {size}) px" in said(report, "ok")


def test_odd_sizes_and_kinds_are_sampled_as_ingest_takes_them(tmp_path, clothing):
    key = lines(clothing, NOISY)[0]
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20, 500, 4), np.uint8)).save(buffer, "PNG")
    (clothing / key).write_bytes(buffer.getvalue())
    report = check(Clothing1M(), str(clothing), 4 * ALL)
    assert f"{ALL} sampled images are whole" in said(report, "ok")
    assert "train: originals, short side 20 to 32 (median 32) px" in said(report, "ok")


def test_cifar_has_its_counts_told(tmp_path, capsys):
    for split, count in (("train", 120), ("test", 20)):
        encoded = []
        for image in np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            encoded.append(buffer.getvalue())
        pq.write_table(pa.table({"label": np.arange(count) % 10, "image": encoded}), tmp_path / f"{split}.parquet")
    report = check(CifarFiles(), str(tmp_path))
    assert said(report, "warning") == [
        "train: 120 images, 50,000 are published",
        "test: 20 images, 10,000 are published",
    ]
    assert said(report, "ok") == ["10 classes, all images decoded"]
    assert main(["cifar", str(tmp_path)]) == 0
    assert "✓ ready, 2 warnings" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"class 0 has 12|class 10 has 0"):
        check(CifarFiles(100), str(tmp_path))
    assert main(["cifar", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().out


def test_exit_statuses_and_the_verdict(clothing, capsys):
    assert main(["clothing1m", str(clothing)]) == 0
    out = capsys.readouterr().out
    assert "✓ ready, 4 warnings" in out.splitlines()[-1]
    assert "! train: 84 images" in " ".join(out.split())
    take_trust(clothing)
    assert main(["clothing1m", str(clothing), "--sample", "0"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "✗ 1 to fix first, 4 warnings"
    assert main(["clothing1m", "nowhere://x"]) == 1
    assert "its scheme is unknown" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DATASET"),
        (["webvison", "x"], "choose from"),
        (["custom"], "URL"),
        (["custom", "x", "--sampel", "3"], "--sample"),
        (["custom", "x", "--sample", "-3"], "sample is -3"),
        (["webvision", "x", "--probe-per-class", "0"], "probe-per-class is 0"),
        (["webvision", "x", "--subset", "all"], "mini"),
    ],
)
def test_a_wrong_command_has_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--help"], "python -m pipeline.check webvision gs://raw/webvision --imagenet gs://raw/imagenet"),
        (["webvision", "--help"], "python -m pipeline.check webvision gs://raw/webvision --imagenet gs://raw/imagenet"),
        (["food101n", "--help"], "--food101 gs://raw/food-101"),
        (["cifar", "-h"], "--classes"),
    ],
)
def test_help_teaches(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert message in " ".join(capsys.readouterr().out.split())
