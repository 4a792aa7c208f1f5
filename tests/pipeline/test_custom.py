import csv
import io
import re
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.layout import Finding, Listing
from tests.pipeline.layouts import assert_same, bytes_of, content, photos, tar, text, write, zipped

ODD = ["a b.jpg", "c,d.jpg", "e\"f'.JPG", "ü 猫 #1.png", "100%.webp"]
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


def labelled(listing: Listing) -> dict[str, tuple[str, str]]:
    """Key -> (split, class name)."""
    rows = listing.table.to_pylist()
    return {row["key"]: (row["split"], listing.class_names[row["label"]]) for row in rows}


def table(columns: dict[str, Sequence[object]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerows([columns, *zip(*columns.values(), strict=True)])
    return buffer.getvalue().encode()


def parquet(columns: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def refused(url: object, message: str, layout: Custom | None = None) -> None:
    with pytest.raises(InputError, match=message) as error:
        (layout or Custom()).listing(str(url))
    assert "\n" not in str(error.value)


# ---- a folder a class ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", ["", "train/"])
@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "tar beside nothing", "tars of one class"])
def test_a_folder_a_class_archived_or_not(tmp_path, lead, kind):
    images = {f"{lead}{name}/{file}": (k, file.encode() * 9) for k, name in enumerate("ab") for file in ODD}
    url = str(tmp_path)
    if kind == "folder":
        write(url, bytes_of(images))
    elif kind == "tars of one class":
        images = {key: one for key, one in images.items() if lead == ""}
        for name in "ab" if images else "":
            part = {key[2:]: data for key, (_, data) in images.items() if key.startswith(name)}
            write(url, {f"{name}.tar": tar(part)})
    else:
        pack, suffix, top = (zipped, "zip", "my data/") if kind == "zip" else (tar, "tar", "./")
        write(url, {f"mine.{suffix}": pack(bytes_of(images, top))})
        images = {f"{top.removeprefix('./')}{key}": one for key, one in images.items()}
        url += "" if kind == "tar beside nothing" else f"/mine.{suffix}"
    if not images:
        return
    listing = Custom().listing(url)
    assert_same(listing.table, {"train": images})
    assert listing.class_names == ("a", "b")
    assert listing.unlisted == 0
    assert listing.findings == (
        Finding(
            "error",
            "no trusted image of 2 of 2 classes (a, b)",
            "give at least one of each: in a folder probe/, a column trusted, or a list by --trusted",
        ),
    )


@pytest.mark.parametrize("probe", ["probe", "trusted"])
def test_folders_beside_train_are_the_probe_and_evaluation_sets(tmp_path, probe):
    folders = {"train": "train", "valid": "val", "test": "test", probe: "probe"}
    files = {f"{folder}/{name}/deep/1.jpg": folder.encode() for folder in folders for name in ("cat", "dog")}
    write(
        str(tmp_path),
        {
            **files,
            "logo.png": b"",
            "train/odd.jpg": b"",
            "docs/figures/2.jpg": b"",
            "train/cat/notes.txt": b"",
            "x.txt": b"",
        },
    )
    listing = Custom().listing(str(tmp_path))
    expected = {key: (folders[key.split("/")[0]], key.split("/")[1]) for key in files}
    assert labelled(listing) == expected
    assert {content(row) for row in listing.table.to_pylist()} == set(files.values())
    assert listing.splits == ("train", "probe", "test", "val")
    what = "3 images are in no folder of a class (docs/figures/2.jpg)"
    (notes, finding) = listing.findings
    assert finding == Finding("warning", what, "left out; move them if they are wanted", 3)
    assert (notes.level, notes.what) == ("note", "2 other files are not read: 2 .txt (such as train/cat/notes.txt)")
    assert listing.unlisted == 0


def test_a_class_without_trusted_images_is_an_error(tmp_path):
    write(str(tmp_path), dict.fromkeys(("train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "probe/b/2.jpg"), b""))
    (finding,) = Custom().listing(str(tmp_path)).findings
    assert (finding.level, finding.what) == ("error", "no trusted image of 2 of 3 classes (a, c)")


def test_folders_of_numbers_are_names(tmp_path):
    write(str(tmp_path), dict.fromkeys(("2/1.jpg", "10/1.jpg", "05/1.jpg"), b""))
    listing = Custom().listing(str(tmp_path))
    assert listing.class_names == ("05", "10", "2")
    assert labelled(listing) == {key: ("train", key.split("/")[0]) for key in ("2/1.jpg", "10/1.jpg", "05/1.jpg")}


def test_folders_that_cannot_work(tmp_path):
    refused(tmp_path / "absent", "no such folder or archive: .*absent: check the path")
    refused(tmp_path, "no images in .*: give a folder with a folder of images a class, a .csv or .parquet")
    write(str(tmp_path), {"cat/1.jpg": b"x", "cat/2.jpg": b"x"})
    refused(tmp_path, r"has one class \(cat\): classification needs 2 or more")
    write(str(tmp_path / "flat"), {"1.jpg": b"x", "2.jpg": b"x"})
    refused(tmp_path / "flat", "no training images in .*flat: check the path, and the names of splits and folders")
    refused(tmp_path / "cat" / "1.jpg", "1.jpg is no folder and no .tar")


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["uri", "path", "image_path"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_paths_and_labels(tmp_path, column, suffix):
    files = [f"images/{name}" for name in ODD]
    write(str(tmp_path), {name: name.encode() for name in files})
    uris = [*files[:3], str(tmp_path / files[3]), f"file://{tmp_path}/{files[4]}"]
    columns = {column: uris, "label": ["cat", "dog", "cat", "dog", 'a, "b"']}
    columns |= {"split": ["train", "validation", "", "test", "train"], "trusted": ["", "true", "False", "1", "TRUE"]}
    columns |= {"width": ["1"] * 5}
    write(str(tmp_path), {f"list.{suffix}": table(columns) if suffix == "csv" else parquet(columns)})
    listing = Custom().listing(str(tmp_path / f"list.{suffix}"), look_around=True)
    splits = ["train", "val", "train", "test", "probe"]
    assert labelled(listing) == dict(zip(files, zip(splits, columns["label"], strict=True), strict=True))
    assert [content(row) for row in listing.table.to_pylist()] == [name.encode() for name in files]
    assert listing.findings[0] == Finding("note", f"columns of {tmp_path}/list.{suffix} that are not read: width")
    assert listing.unlisted == 0


def test_looking_around_a_table_tells_missing_and_unlisted_images(tmp_path):
    write(str(tmp_path), {"x/a.jpg": b"", "x/c.jpg": b"", "list.csv": b"uri,label\nx/a.jpg,0\nx/b.jpg,1\n"})
    url = str(tmp_path / "list.csv")
    plain, looked = Custom().listing(url), Custom().listing(url, look_around=True)
    assert (plain.unlisted, plain.table["file"].null_count) == (-1, 0)
    assert (looked.unlisted, looked.table["file"].to_pylist()) == (1, [f"{tmp_path}/x/a.jpg", None])


@given(images=st.dictionaries(NAMES, NAMES.filter(lambda name: name.strip() == name), min_size=2))
def test_any_name_and_class_come_back(images):
    images = {name: label for name, label in images.items() if name.strip() == name and name not in (".", "..")}
    columns = {"uri": [f"x/{name}" for name in images], "label": list(images.values())}
    expected = {f"x/{name}": ("train", label) for name, label in images.items()}
    if len(set(images.values())) < 2 or all(re.fullmatch("-?[0-9]+", label) for label in images.values()):
        return
    write("memory://names", {"a.csv": table(columns), "a.parquet": parquet(columns)})
    for name in ("a.csv", "a.parquet"):
        assert labelled(Custom().listing(f"memory://names/{name}")) == expected


@pytest.mark.parametrize("labels", [[2, 0, 1, 0], ["2", "0", "1", "0"], [2.0, 0.0, 1.0, 0.0]])
def test_whole_numbers_are_the_labels_themselves(tmp_path, labels):
    write(str(tmp_path), {"a.parquet": parquet({"uri": list("abcd"), "label": labels})})
    listing = Custom().listing(str(tmp_path / "a.parquet"))
    assert listing.table["label"].to_pylist() == [2, 0, 1, 0]
    assert listing.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"",
            r"a.csv has columns \(none\): it needs uri or path or image_path or file_name or url and label, and may",
        ),
        (b"link,label\na,1\n", "has columns link, label: it needs uri or path"),
        (
            b"uri,class\na,1\n",
            "has columns uri, class: it needs uri or path or image_path or file_name or url and label",
        ),
        (b"uri,label\n", "no training images in"),
        (
            b"uri,label\na,cat\nb,\n",
            "a.csv, line 3: label '' is no name or whole number: fill it in, or remove the row",
        ),
        (b"uri,label\na,cat\n,dog\n", "a.csv, line 3: no uri: fill it in"),
        (b"uri,label\na,b.jpg,cat\n", "a.csv, line 2: 3 values for 2 columns: quote values that hold commas"),
        (b'uri,label\n"a,cat\n', "a.csv, line 2 is not CSV"),
        (b"uri,label\na,0\nb,2\n", "has labels up to 2 but none is 1: number the classes without gaps"),
        (b"uri,label\na,1\nb,2\n", "has labels up to 2 but none is 0"),
        (b"uri,label\na,0\nb,-1\n", "has label -1: number the classes from 0, and leave unlabelled images out"),
        (b"uri,label\na,0\nb,0\n", r"has one class \(0\): classification needs 2 or more"),
        (b"uri,label\na,cat\nb,cat\n", r"has one class \(cat\)"),
        (b"uri,label,trusted\na,0,maybe\nb,1,\n", "a.csv, line 2: trusted is 'maybe': write true or false"),
        (b"uri,label,split\na,0,test\nb,1,val\n", "no training images in"),
        (b"uri,label\n\xff,0\n", r"a.csv is no UTF-8 text \(byte 10\)"),
    ],
)
def test_bad_tables_are_one_line_with_their_place(tmp_path, data, message):
    (tmp_path / "a.csv").write_bytes(data)
    refused(tmp_path / "a.csv", message)


def test_tables_that_are_not_there(tmp_path):
    refused(tmp_path / "a.csv", "no such file: .*a.csv")
    refused(tmp_path / "a.parquet", "no such file: .*a.parquet")


# ---- Parquet of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "struct"])
@pytest.mark.parametrize("place", ["file", "folder", "data"])
def test_parquet_that_holds_the_images(tmp_path, kind, place):
    (images,) = photos(1, 6)
    column = [{"bytes": image, "path": None} for image in images] if kind == "struct" else images
    columns = {"image": column, "label": [0, 1] * 3, "split": ["train"] * 4 + ["test"] * 2}
    columns |= {"trusted": [True, True, False, None, True, False], "mask": [1] * 6}
    write(str(tmp_path), {f"{'data/' if place == 'data' else ''}all.parquet": parquet(columns)})
    listing = Custom().listing(str(tmp_path / "all.parquet" if place == "file" else tmp_path), look_around=True)
    splits = ["probe", "probe", "train", "train", "test", "test"]
    assert labelled(listing) == {f"all.parquet:{row}": (split, str(row % 2)) for row, split in enumerate(splits)}
    file = f"{tmp_path}/{'data/' if place == 'data' else ''}all.parquet"
    for row in listing.table.to_pylist():
        number = int(row["key"].rpartition(":")[2])
        assert (row["file"], row["start"], row["size"], row["how"]) == (file, number, -1, "row")
    assert listing.findings == ()
    assert listing.unlisted == 0


def test_parquet_files_are_named_after_their_split_and_ids_are_kept(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-0", "trusted"):
        columns = {"id": [f"{name} {row}" for row in range(2)], "img": [b"x"] * 2, "label": ["cat", "dog"]}
        write(str(tmp_path), {f"{name}.parquet": parquet(columns)})
    found = labelled(Custom().listing(str(tmp_path)))
    assert {key: split for key, (split, _) in found.items()} == {
        f"{name} {row}": split
        for row in range(2)
        for name, split in (
            *(("train-00000-of-00002", "train"), ("train-00001-of-00002", "train")),
            *(("validation-0", "val"), ("trusted", "probe")),
        )
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x", b"y"]}, "has columns image: it needs image and label, and may have split and trusted"),
        ({"image": [b"x"], "mask": [b"x"], "label": [0]}, r"has 2 columns of encoded images \(image, mask\): keep one"),
        ({"image": [b"x", b"y"], "label": [0, None]}, "a.parquet, row 1: label None is no name or whole number"),
        ({"image": [b"x", b"y"], "label": [0.0, float("nan")]}, "row 1: label nan is no name or whole number"),
        ({"image": [b"x", b"y"], "label": [0.0, 0.5]}, "row 1: label 0.5 is no name or whole number"),
        ({"image": [b"x", b"y"], "label": [True, False]}, "row 0: label True is no name"),
        ({"image": [b"x", b"y"], "label": [0, 2]}, "has labels up to 2 but none is 1"),
        (
            {"image": [b"x", b"y"], "label": [0, 1], "id": ["a", None]},
            "row 1: no id: fill it in, or leave the column out",
        ),
        (
            {"picture": ["x"], "label": [0]},
            "has columns picture, label: it needs uri or path or image_path or file_name",
        ),
    ],
)
def test_bad_parquet_is_one_line_with_its_place(tmp_path, columns, message):
    (tmp_path / "a.parquet").write_bytes(parquet(columns))
    refused(tmp_path / "a.parquet", message)


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet({"image": [b"x"], "label": [0]})[:-9])
    refused(tmp_path, r"a.parquet is no readable Parquet file \(ArrowInvalid\): copy it again")


# ---- the list of trusted images --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write(str(tmp_path), {f"{name}/{file}": name.encode() for name in ("cat", "dog") for file in ODD})
    return tmp_path


@pytest.mark.parametrize("header", ["", "uri"])
def test_a_list_of_names_keeps_their_labels(folder, header):
    names = [f"cat/{ODD[1]}", f"cat/{ODD[2]}", f"dog/{ODD[3]}"]
    (folder / "trusted.txt").write_bytes(text([header, *names] if header else names, "\r\n"))
    listing = Custom(str(folder / "trusted.txt")).listing(str(folder))
    found = labelled(listing)
    assert {key for key, (split, _) in found.items() if split == "probe"} == set(names)
    assert all(name == key.split("/")[0] for key, (_, name) in found.items())
    assert listing.findings == ()
    assert len(found) == 10


def test_a_table_of_trusted_images_gives_them_labels(folder):
    uris = [f"cat/{ODD[1]}", f"{folder}/cat/{ODD[2]}", f"../dog/{ODD[3]}".removeprefix("../")]
    (folder / "trusted.csv").write_bytes(table({"uri": uris, "label": ["dog", "cat", "cat"]}))
    found = labelled(Custom(str(folder / "trusted.csv")).listing(str(folder)))
    keys = [uri.removeprefix(f"{folder}/") for uri in uris]
    assert {key: one for key, one in found.items() if one[0] == "probe"} == {
        key: ("probe", label) for key, label in zip(keys, ("dog", "cat", "cat"), strict=True)
    }


def test_lines_of_a_table_without_a_label_are_passed_over(folder):
    columns = {"uri": [f"cat/{ODD[1]}", f"cat/{ODD[2]}"], "label": ["dog", " "], "given": ["cat", "cat"]}
    (folder / "suggest.csv").write_bytes(table(columns))
    listing = Custom(str(folder / "suggest.csv")).listing(str(folder))
    assert {key: one for key, one in labelled(listing).items() if one[0] == "probe"} == {
        f"cat/{ODD[1]}": ("probe", "dog")
    }
    (finding, _) = listing.findings  # and that no dog is trusted
    assert (finding.level, finding.what) == ("note", f"1 images of {folder}/suggest.csv have no label yet")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cat/a b.jpg\ncat/none.jpg\n", "list, line 2: cat/none.jpg names no image of the data set: fix the list"),
        (b"uri,label\ncat/a b.jpg,bird\n", "list, line 2: no class is called bird: fix the list"),
        (
            b"uri,label\ncat/a b.jpg,cat\ncat/a b.jpg,dog\n",
            "line 3: cat/a b.jpg has another label further up: choose one",
        ),
        (b"uri,label\ncat/a b.jpg\n", "list, line 2: 1 values for 2 columns"),
        (b"name,label\ncat/a b.jpg,cat\n", "list has columns name, label: it needs uri or path"),
    ],
)
def test_bad_lists_of_trusted_images_are_one_line(folder, data, message):
    (folder / "list").write_bytes(data)
    refused(folder, message, Custom(str(folder / "list")))


def test_a_trusted_image_is_no_evaluation_image(tmp_path):
    write(str(tmp_path), dict.fromkeys(("train/a/1.jpg", "train/b/1.jpg", "test/b/2.jpg"), b""))
    (tmp_path / "list").write_text("test/b/2.jpg\n")
    refused(tmp_path, "test/b/2.jpg is in the evaluation set test: take it out", Custom(str(tmp_path / "list")))
    refused(tmp_path, "no such file: .*absent", Custom(str(tmp_path / "absent")))


@pytest.mark.slow
def test_columns_that_are_not_wanted_take_no_memory(tmp_path):
    """A hundred thousand rows with embeddings, which alone are 300 MB, are listed in a third of that."""
    count = 100_000
    uris, label = [f"img/{k:09}.jpg" for k in range(count)], ["cat", "dog"] * (count // 2)
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.random.default_rng(0).random(768 * count, np.float32)), 768)
    pq.write_table(pa.table({"path": uris, "label": label, "embedding": zeros}), tmp_path / "a.parquet")
    script = (
        "import sys; from pipeline.custom import Custom; from pathlib import Path\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) / 1000\n"
        "before = peak(); rows = len(Custom().listing(sys.argv[1]).table); print(rows, peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.parquet")]
    rows, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(rows) == count
    assert float(megabytes) < 100


def test_the_product_s_own_list_survives_a_spreadsheet(folder):
    """As a spreadsheet of a country with decimal commas saves suggest.csv once labels are filled in."""
    header = '"uri";"label";"given";"proposed";"quality";"id"'
    lines = [
        f"cat/{ODD[0]};DOG;cat;dog;0,031;4,61E+18".replace("DOG", "dog"),
        "cat/c,d.jpg; cat ;cat;dog;0,5;1",
        ";;;;;",
    ]
    (folder / "suggest.csv").write_bytes(("\ufeffsep=;\r\n" + "\r\n".join([header, *lines, ""])).encode())
    found = labelled(Custom(str(folder / "suggest.csv")).listing(str(folder)))
    trusted = {key: label for key, (split, label) in found.items() if split == "probe"}
    assert trusted == {f"cat/{ODD[0]}": "dog", "cat/c,d.jpg": "cat"}


def test_storage_in_the_cloud(bucket):
    images = {f"{name}/{file}": (k, name.encode()) for k, name in enumerate(("cat", "dog")) for file in ODD[:3]}
    probe = {key: images.pop(key) for key in (f"cat/{ODD[0]}", f"dog/{ODD[1]}")}
    write(f"{bucket}/raw", {**bytes_of(images), **bytes_of(probe)})
    everything = {**images, **probe}
    write(
        bucket,
        {
            "lists/trusted": text(list(probe)),
            "raw/all.csv": table({"uri": list(everything), "label": ["cat", "dog"] * 3}),
        },
    )
    listing = Custom(f"{bucket}/lists/trusted").listing(f"{bucket}/raw")
    assert_same(listing.table, {"train": images, "probe": probe})
    assert len(Custom().listing(f"{bucket}/raw/all.csv", look_around=True).table) == 6
    write(bucket, {"parquet/train.parquet": parquet({"image": [b"x", b"y"], "label": [0, 1]})})
    assert Custom().listing(f"{bucket}/parquet").count("train") == 2
