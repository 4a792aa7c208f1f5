from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset import InputError
from pipeline.layout import stable_ids
from pipeline.webvision import WebVision
from tests.pipeline.layouts import assert_same, bytes_of, labels_of, photos, tar, text, write, write_webvision

REAL = Path(__file__).parents[3] / "shared" / "data" / "webvision"


def listed(root, subset="google", look_around=True, **fields):
    layout = WebVision(subset, f"{root}/imagenet", **{"probe_per_class": 2, **fields})
    return layout.listing(f"{root}/webvision", look_around=look_around)


@pytest.mark.parametrize("archives", [False, True])
@pytest.mark.parametrize("subset", ["mini", "google", "full"])
def test_folders_and_the_original_archives_give_the_same_images(tmp_path, archives, subset):
    written = write_webvision(str(tmp_path), archives=archives)
    flickr = written.pop("flickr")
    if subset == "full":
        written["train"] |= flickr
    listing = listed(tmp_path, subset)
    assert_same(listing.table, written)
    assert listing.splits == ("train", "probe", "val", "imagenet")
    assert listing.class_names == ("thing 0, Res 0", "thing 1, Res 1", "thing 2, Res 2")
    assert listing.unlisted == 0  # Flickr's are in a list, too
    assert listing.findings == ()


def test_mini_is_google_s_images_of_the_first_50_classes(tmp_path):
    written = write_webvision(str(tmp_path), photos(53, 6, 8))
    listing = listed(tmp_path, "mini")
    del written["flickr"]
    first = {split: {key: one for key, one in part.items() if one[0] < 50} for split, part in written.items()}
    assert_same(listing.table, first)
    assert len(listing.class_names) == 50
    assert listing.unlisted == 0
    assert listing.expected == {"train": 65_944, "probe": 100, "val": 2_500, "imagenet": 2_500}


def test_ids_do_not_depend_on_the_storage(tmp_path, bucket):
    tables = []
    for root, archives in ((str(tmp_path), False), (f"{bucket}/data", True)):
        written = write_webvision(root, archives=archives)
        written["train"] |= written.pop("flickr")
        tables.append(listed(root, "full").table)
        assert_same(tables[-1], written)
    assert tables[0].select(["id", "key", "label", "split"]) == tables[1].select(["id", "key", "label", "split"])


def test_the_probe_is_the_images_with_the_smallest_ids(tmp_path):
    write_webvision(str(tmp_path))
    wnid = "n01440764"
    names = [f"{wnid}_{number}.JPEG" for number in range(100, 200)]
    write(f"{tmp_path}/imagenet/train/{wnid}", dict.fromkeys(names, b"x"))
    rows = listed(tmp_path).table.to_pylist()
    probe = {row["key"] for row in rows if row["split"] == "probe" and row["label"] == 0}
    keys = np.array([f"train/{wnid}/{name}" for name in [*names, f"{wnid}_0.JPEG", f"{wnid}_1.JPEG"]])
    assert probe == set(keys[np.argsort(stable_ids("imagenet", keys))[:2]])


def test_original_images_and_other_leading_folders(tmp_path):
    written = write_webvision(str(tmp_path))
    (tmp_path / "webvision" / "val_images_256").rename(tmp_path / "webvision" / "val_images")
    (tmp_path / "webvision" / "google").rename(tmp_path / "google")
    write(f"{tmp_path}/webvision", {"webvision_train_google.tar": tar(bytes_of(written["train"], "webvision/train/"))})
    del written["flickr"]
    assert_same(listed(tmp_path).table, written)


@pytest.mark.parametrize("name", ["val.txt", "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt"])
@pytest.mark.parametrize("archives", [False, True])
def test_a_flat_imagenet_validation_set_takes_its_labels_from_any_list(tmp_path, name, archives):
    written = write_webvision(str(tmp_path))
    root, wnids = tmp_path / "imagenet", sorted(path.name for path in (tmp_path / "imagenet" / "train").iterdir())
    home = "ILSVRC/Data/CLS-LOC/"  # as Kaggle has it
    flat = {key.removeprefix("val/"): one for key, one in written["imagenet"].items()}
    for folder in (root / "val").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (root / "val").rmdir()
    (root / home).mkdir(parents=True)
    (root / "train").rename(root / home / "train")
    if archives:
        write(str(root), {"ILSVRC2012_img_val.tar": tar(bytes_of(flat))})
    else:
        write(str(root / home / "val"), bytes_of(flat))
    lines = {
        "val.txt": labels_of(flat),
        "LOC_val_solution.csv": ["ImageId,PredictionString"]
        + [f"{key[:-5]},{wnids[label]} 1 2 3 4 {wnids[0]} 5 6 7 8" for key, (label, _) in reversed(flat.items())],
        "imagenet_2012_validation_synset_labels.txt": [wnids[label] for label, _ in flat.values()],
    }
    with pytest.raises(InputError, match=r"have no labels: put val.txt, LOC_val_solution.csv or imagenet_2012"):
        listed(tmp_path)
    write(str(root), {name: text(lines[name])})
    del written["flickr"]
    assert_same(listed(tmp_path).table, written)
    write(str(root), {name: text(lines[name][:2])})
    with pytest.raises(InputError, match="has no class for ILSVRC2012_val_0000000"):
        listed(tmp_path)


def test_missing_evaluation_sets_are_findings(tmp_path):
    write_webvision(str(tmp_path))
    for path in ("webvision/val_images_256", "imagenet/val"):
        (tmp_path / path).rename(tmp_path / path.replace("/", "-"))
    listing = listed(tmp_path)
    assert listing.splits == ("train", "probe")
    assert [(finding.level, finding.what) for finding in listing.findings] == [
        ("warning", f"no validation images in {tmp_path}/webvision"),
        ("warning", f"no validation images in {tmp_path}/imagenet"),
    ]


def test_images_of_no_list_are_counted(tmp_path):
    write_webvision(str(tmp_path), archives=True)
    write(
        f"{tmp_path}/webvision", {"google/q0001/stranger.jpg": b"x", "more.tar": tar({"a/1.jpg": b"", "a/2.jpg": b""})}
    )
    assert listed(tmp_path, "mini").unlisted == 3
    assert listed(tmp_path, "mini", look_around=False).unlisted == -1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("info/synsets.txt", None, "no info/synsets.txt or synsets.txt in .*webvision: give the folder or archive"),
        ("info/synsets.txt", b"n01440764 tench\ntench\n", "info/synsets.txt, line 2: 'tench' is not a WordNet id"),
        ("info/train_filelist_google.txt", None, "no info/train_filelist_google.txt"),
        ("info/train_filelist_google.txt", b"google/q1/x.jpg 3\n", "line 1: .* is not .* a label of 0…2"),
        ("info/train_filelist_flickr.txt", None, "no info/train_filelist_flickr.txt"),
        ("info/val_filelist.txt", b"val000001.jpg\n", "info/val_filelist.txt, line 1"),
    ],
)
def test_bad_lists_are_one_line_with_their_place(tmp_path, name, content, message):
    write_webvision(str(tmp_path))
    path = tmp_path / "webvision" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        listed(tmp_path, "full")
    assert "\n" not in str(error.value)


def test_the_probe_needs_imagenet(tmp_path):
    write_webvision(str(tmp_path))
    with pytest.raises(InputError, match="give --imagenet, the URL of ImageNet"):
        WebVision().listing(str(tmp_path / "webvision"))
    with pytest.raises(
        InputError, match="has 2 training images of n01440764, the probe takes 3: it needs train/n01440764/"
    ):
        listed(tmp_path, probe_per_class=3)
    with pytest.raises(InputError, match="probe-per-class is 0"):
        WebVision(probe_per_class=0)


@pytest.mark.skipif(not REAL.exists(), reason=f"no real WebVision lists at {REAL}")
def test_the_real_classes(tmp_path):
    write_webvision(str(tmp_path), photos(60, 6, 8))
    lines = (REAL / "synsets.txt").read_text().splitlines()
    old = [line.split(" ")[0] for line in (tmp_path / "webvision/info/synsets.txt").read_text().splitlines()]
    for wnid, line in zip(old, lines, strict=False):  # the same photos under the real names
        for folder in ("train", "val"):
            (tmp_path / "imagenet" / folder / wnid).rename(tmp_path / "imagenet" / folder / f"new-{line.split(' ')[0]}")
    for path in list((tmp_path / "imagenet").glob("*/new-*")):
        new = path.rename(path.with_name(path.name.removeprefix("new-")))
        for number, file in enumerate(sorted(new.glob("n*.JPEG"))):
            file.rename(new / f"{new.name}_{number}.JPEG")
    write(f"{tmp_path}/webvision", {"info/synsets.txt": (REAL / "synsets.txt").read_bytes()})
    listing = listed(tmp_path, "mini")
    assert listing.class_names[0] == "tench, Tinca tinca"
    assert len(listing.class_names) == 50
    assert Counter(listing.table["split"].to_pylist()) == {"train": 50, "probe": 100, "val": 50, "imagenet": 50}
