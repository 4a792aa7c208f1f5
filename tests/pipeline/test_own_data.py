"""Every way in which people lay out their images, of the table in docs/own-data.md: one row there, one case here."""

import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import check, shards
from pipeline.archive import ARCHIVE
from pipeline.check import Report
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.layout import Listing
from pipeline.tree import hidden
from tests.pipeline.layouts import jpeg, tar, write, zipped

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
PHOTOS = [jpeg(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(60)]

Files = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """What is given, and what comes of it: counts of splits, and classes, or an error; findings by a pattern each."""

    files: Files
    url: str = ""  # below the folder that holds the files
    counts: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ("cat", "dog")
    error: str = ""
    findings: tuple[str, ...] = ()
    layout: Custom = Custom()  # noqa: RUF009


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__.replace("_", " ").strip()] = make
    return make


def folders(**splits: int) -> Files:
    """As many images of two classes in each folder."""
    numbers = iter(range(100))
    return {
        f"{split}/{name}/{k}.jpg": PHOTOS[next(numbers)]
        for split, count in splits.items()
        for name in ("cat", "dog")
        for k in range(count)
    }


def parquet(columns: dict[str, object], metadata: dict[str, str] | None = None) -> bytes:
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, buffer)
    return buffer.getvalue()


def images(count: int, first: int = 0, **columns: object) -> bytes:
    """Parquet that holds `count` images of two classes."""
    return parquet({"image": PHOTOS[first : first + count], "label": ["cat", "dog"] * (count // 2), **columns})


def listed(
    path: Callable[[int], str] = "img/{}.jpg".format,
    label: Callable[[int], str] = ["dog", "cat"].__getitem__,
    head: str = "path,label,split,trusted",
    separator: str = ",",
) -> str:
    """Twelve lines: two trusted, eight more to train, two to test."""
    lines = [head.replace(",", separator)]
    for k in range(12):
        values = path(k), label(k % 2), "test" if k > 9 else "train", "true" if k < 2 else ""
        lines.append(separator.join(values))
    return "\n".join(lines) + "\n"


TWELVE = {f"img/{k}.jpg": PHOTOS[k] for k in range(12)}
IN_ALL = {"train": 8, "probe": 2, "test": 2}


def table(text: str | bytes, **case: object) -> Case:
    """A CSV beside the twelve images."""
    data = text if isinstance(text, bytes) else text.encode()
    case = {"url": "data.csv", "counts": IN_ALL, **case} if "error" not in case else {"url": "data.csv", **case}
    return Case({**TWELVE, "data.csv": data}, **case)  # type: ignore[arg-type]


# ---- splits ----------------------------------------------------------------------------------------------------------


@case
def split_folders_in_any_case() -> Case:
    return Case(folders(Training=3, TEST=2, Probe=1), counts={"train": 6, "probe": 2, "test": 4})


@case
def split_words_before_or_after_other_words() -> Case:
    files = folders(seg_train=3, test_images=2, probe=1)
    return Case(files, counts={"train": 6, "probe": 2, "test": 4})


@case
def a_folder_of_the_same_name_within_a_split() -> Case:
    files = {f"{name.split('/')[0]}/{name}": data for name, data in folders(seg_train=3, seg_test=2).items()}
    return Case(files, counts={"train": 6, "test": 4}, findings=("no trusted image",))


@case
def a_folder_beside_the_splits_that_names_none() -> Case:
    return Case(folders(train=3, probe=1, extra=2), error=r"has extra/ beside probe/, train/: which split is it\?")


@case
def splits_within_classes() -> Case:
    files = {f"{name}/{split}/1.jpg": b"" for name in ("cat", "dog") for split in ("train", "test")}
    return Case(files, error="cat/train/ is a split in a class: put classes into splits, as train/cat/")


@case
def splits_without_folders_of_classes() -> Case:
    files = {f"{split}/{k}.jpg": PHOTOS[k] for split in ("train", "test", "probe") for k in range(3)}
    return Case(files, error="probe/ is named like a split and holds images, but no folders of classes")


@case
def a_class_called_train() -> Case:
    files = {f"{name}/{k}.jpg": PHOTOS[k] for name in ("bus", "car", "train") for k in range(2)}
    found = ("train/ holds images and no folders of classes: it is read as a class",)
    return Case(files, counts={"train": 6}, classes=("bus", "car", "train"), findings=(*found, "no trusted image"))


@case
def folders_that_could_be_splits_or_classes() -> Case:
    found = ("one, two are read as classes, and hold folders of equal names .cat.", "no trusted image")
    return Case(folders(one=2, two=2), counts={"train": 8}, classes=("one", "two"), findings=found)


@case
def an_archive_of_each_split() -> Case:
    def archive(count: int, first: int) -> bytes:
        return zipped({f"{name}/{k}.jpg": PHOTOS[first + k] for name in ("cat", "dog") for k in range(count)})

    files = {"train.zip": archive(3, 0), "test.zip": archive(2, 9), "probe.zip": archive(1, 20)}
    return Case(files, counts={"train": 6, "probe": 2, "test": 4})


@case
def parquet_named_after_splits() -> Case:
    names = {"pets_train": 8, "pets-test-0": 2, "Probe": 2, "dev-00000-of-00001": 2, "holdout": 2}
    files = {f"{name}.parquet": images(count, 2 * k) for k, (name, count) in enumerate(names.items())}
    return Case(files, counts={"train": 8, "probe": 2, "dev": 2, "holdout": 2, "test": 2})


@case
def parquet_of_which_one_name_says_no_split() -> Case:
    files = {"train-0.parquet": images(8), "unsupervised-0.parquet": images(2)}
    return Case(files, error="no split can be told from the name unsupervised-0, beside train-0: rename it")


@case
def parquet_named_after_two_splits() -> Case:
    files = {"train_test.parquet": images(8)}
    return Case(files, error="train_test is named like two splits: rename it after one")


@case
def one_table_named_after_an_evaluation_set() -> Case:
    text = listed(head="path,label,part,trusted")
    files = {**TWELVE, "pets_test.csv": text.encode()}
    return Case(files, "pets_test.csv", error="pets_test is named like test, and there is no other: rename it, or")


@case
def parquet_in_folders_of_splits() -> Case:
    files = {f"{split}/part-0{k}.snappy.parquet": images(4, 4 * k) for k in range(2) for split in ("train", "test")}
    files |= {"_SUCCESS": b"", "train/_metadata": b"x"}
    found = ("2 other files are not read: 2 without ending", "no trusted image")
    return Case(files, counts={"train": 8, "test": 8}, findings=found)


@case
def hive_partitions() -> Case:
    files = {}
    for split, count in (("train", 4), ("test", 2), ("probe", 1)):
        for name in ("cat", "dog"):
            files[f"split={split}/label={name}/a.parquet"] = parquet({"image": PHOTOS[:count]})
    return Case(files, counts={"train": 8, "probe": 2, "test": 4})


@case
def delta_lance_iceberg_or_hudi() -> Case:
    files = {"part-0.parquet": images(4), "_delta_log/000.json": b"{}"}
    return Case(files, error="is a Delta table, whose files hold deleted rows too: write it out as plain Parquet")


@case
def a_column_of_splits() -> Case:
    text = listed().replace(",test,", ",Validation,")
    return table(text, counts={"train": 8, "probe": 2, "val": 2})


@case
def a_value_that_is_no_split() -> Case:
    error = "data.csv, line 12: 'n/a' cannot be the name of a split: write train, probe, val, test"
    return table(listed().replace(",test,", ",n/a,"), error=error)


@case
def a_value_that_leads_elsewhere() -> Case:
    return table(listed().replace(",test,", ",../up,"), error="'../up' cannot be the name of a split")


@case
def a_value_that_is_nearly_train() -> Case:
    return table(listed().replace("10.jpg,dog,test", "10.jpg,dog,train_old"), error="line 12: 'train_old' cannot be")


@case
def rows_without_a_split() -> Case:
    text = listed().replace("img/3.jpg,cat,train", "img/3.jpg,cat,")
    return table(text, findings=("1 rows of .*data.csv have no split: .*",))


# ---- labels ----------------------------------------------------------------------------------------------------------


@case
def numbers_with_leading_zeros() -> Case:
    return table(listed(label=["001", "010"].__getitem__), classes=("001", "010"))


@case
def numbers_with_signs() -> Case:
    return table(listed(label=["-0", "0"].__getitem__), classes=("-0", "0"))


@case
def product_numbers() -> Case:
    return table(listed(label=["100234", "99"].__getitem__), classes=("100234", "99"))


@case
def numbers_as_pandas_writes_them() -> Case:
    text = listed(label=["0.0", "1.0"].__getitem__).replace(",true", ",1.0")
    return table(text, classes=("0", "1"))


@case
def numbers_from_1() -> Case:
    return table(listed(label=["1", "2"].__getitem__), error="has labels up to 2 but none is 0: number the classes")


@case
def one_number_spelt_in_two_ways() -> Case:
    return table(listed(label=["1", "01"].__getitem__), classes=("01", "1"))


@case
def names_that_mean_nothing_elsewhere() -> Case:
    return table(listed(label=["NA", "null"].__getitem__), classes=("NA", "null"))


@case
def classes_of_nearly_one_name() -> Case:
    text = listed().replace("5.jpg,cat", "5.jpg,Cat")
    found = ("classes of nearly one name: Cat, cat", "no trusted image of 1 of 3 classes .Cat.")
    return table(text, classes=("Cat", "cat", "dog"), findings=found)


@case
def names_of_a_hugging_face_schema() -> Case:
    features = {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    image = [{"bytes": image, "path": None} for image in PHOTOS[:4]]
    columns = {"image": image, "label": [0, 1, 0, 1], "trusted": [True] * 2 + [False] * 2}
    data = parquet(columns, {"huggingface": json.dumps({"info": {"features": features}})})
    return Case({"data.parquet": data}, "data.parquet", {"train": 2, "probe": 2}, classes=("dog", "cat"))


@case
def numbers_here_and_names_there() -> Case:
    files = {"train.parquet": images(4), "test.parquet": parquet({"image": PHOTOS[:2], "label": [0, 1]})}
    return Case(files, error="test.parquet has numbers as labels and .*train.parquet names: use one of the two")


@case
def labels_of_another_type() -> Case:
    data = parquet({"image": PHOTOS[:2], "label": [[1, 0], [0, 1]]})
    return Case(
        {"a.parquet": data}, "a.parquet", error="column label is of type list<.*>: make it text or whole numbers"
    )


@case
def labels_as_dictionaries_decimals_or_views() -> Case:
    label = pa.array(["cat", "dog"] * 2).dictionary_encode()
    files = {"train.parquet": parquet({"image": PHOTOS[:4], "label": label})}
    files["test.parquet"] = parquet({"image": PHOTOS[4:6], "label": pa.array(["cat", "dog"], pa.string_view())})
    return Case(files, counts={"train": 4, "test": 2}, findings=("no trusted image",))


# ---- tables ----------------------------------------------------------------------------------------------------------


@case
def semicolons_and_tabs() -> Case:
    return table(listed(separator=";"))


@case
def a_stated_separator() -> Case:
    return table("sep=|\n" + listed(separator="|"))


@case
def what_a_spreadsheet_leaves_behind() -> Case:
    lines = [f"{line},,," for line in listed().splitlines()]
    return table("\ufeff" + "\r\n".join([*lines, ",,,,,,", ""]))


@case
def spaces_around_values() -> Case:
    return table(listed().replace(",", " , "))


@case
def headings_in_any_case() -> Case:
    return table(listed(head="Path,LABEL,Split,Trusted"))


@case
def two_columns_of_one_name() -> Case:
    return table(listed(head="path,label,label,trusted"), error="has two columns called label: rename one of them")


@case
def columns_of_other_names() -> Case:
    layout = Custom(image_column="photo", label_column="What", split_column="part", trusted_column="sure")
    return table(listed(head="photo,what,part,sure"), layout=layout)


@case
def a_column_that_is_not_there() -> Case:
    return table(listed(), layout=Custom(label_column="kind"), error="data.csv has no column kind, only path, label,")


@case
def two_columns_that_may_name_images() -> Case:
    error = r"has 2 columns that may name images \(path, url\): keep one, or choose it by --image-column"
    return table(listed(head="path,label,split,url"), error=error)


@case
def paths_spelt_in_other_ways() -> Case:
    spelt = ["./img/{}.jpg", "img//{}.jpg", "x/../img/{}.jpg"]
    return table(listed(path=lambda k: spelt[k % 3].format(k)))


@case
def one_image_spelt_in_two_ways() -> Case:
    text = listed() + "./img/5.jpg,cat,test,\n"
    found = ("1 images of train are in test too: they stay in test only",)
    return table(text, counts={"train": 7, "probe": 2, "test": 3}, findings=found)


@case
def a_table_in_another_folder() -> Case:
    files = {**TWELVE, "lists/a.csv": listed(path="../img/{}.jpg".format).encode()}
    return Case(files, "lists/a.csv", IN_ALL)


@case
def paths_of_windows() -> Case:
    return table(listed(path="img\\{}.jpg".format), findings=("data.csv separates folders by backslashes",))


@case
def paths_of_another_machine() -> Case:
    return table(listed(path="C:\\img\\{}.jpg".format), error="a path of another machine: write paths relative")


@case
def names_without_an_ending_or_with_odd_signs() -> Case:
    names = [
        "a",
        "a#b.jpg",
        "a?b.jpg",
        "a[1].jpg",
        "a::b.jpg",
        "a{b}.jpg",
        "a*b.jpg",
        "a%b.jpg",
        "~c.jpg",
        "$d",
        "e",
        "f.JFIF",
    ]
    files = {f"img/{name}": PHOTOS[k] for k, name in enumerate(names)}
    files["data.csv"] = listed(path=lambda k: f"img/{names[k]}").encode()
    return Case(files, "data.csv", IN_ALL)


@case
def images_in_an_archive_beside_the_table() -> Case:
    return Case({"data.csv": listed().encode(), "images.zip": zipped(TWELVE)}, "data.csv", IN_ALL)


@case
def images_that_are_not_there() -> Case:
    text = listed() + "img/none.jpg,cat,train,\n"
    found = ("train: 1 of 9 images are not there .such as img/none.jpg.",)
    return table(text, counts={"train": 9, "probe": 2, "test": 2}, findings=found)


@case
def files_that_no_row_names() -> Case:
    found = ("2 image files are in no list", "1 other files are not read: 1 .txt")
    files = {**table(listed()).files, "img/x.jpg": b"x", "y.png": b"y", "notes.txt": b""}
    return Case(files, "data.csv", IN_ALL, findings=found)


@case
def rows_with_ids_that_begin_anew_in_each_file() -> Case:
    files = {f"{split}.parquet": images(4, 4 * k, id=list(range(4))) for k, split in enumerate(("train", "test"))}
    return Case(files, counts={"train": 4, "test": 4}, findings=("no trusted image",))


@case
def an_id_twice_in_one_file() -> Case:
    return Case({"a.parquet": images(2, id=[7, 7])}, "a.parquet", error="has ids twice .7.: give each image its own")


@case
def parquet_of_paths_in_a_struct() -> Case:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": f"img/{k}.jpg"} for k in range(4)], kind)
    data = parquet({"image": column, "label": ["cat", "dog"] * 2, "trusted": [True] * 2 + [False] * 2})
    found = ("8 image files are in no list",)
    return Case({**TWELVE, "a.parquet": data}, "a.parquet", {"train": 2, "probe": 2}, findings=found)


@case
def two_columns_of_images() -> Case:
    error = r"has 2 columns of encoded images \(image, mask\): keep one, or choose it by --image-column"
    return Case({"a.parquet": images(2, mask=PHOTOS[:2])}, "a.parquet", error=error)


@case
def one_of_two_columns_of_images_chosen() -> Case:
    layout = Custom(image_column="mask")
    data = images(4, mask=PHOTOS[4:8], trusted=[True] * 2 + [False] * 2)
    return Case({"a.parquet": data}, "a.parquet", {"train": 2, "probe": 2}, layout=layout)


# ---- files that are not read -----------------------------------------------------------------------------------------


@case
def hidden_files_and_tools_folders() -> Case:
    odd = [".DS_Store", "train/.ipynb_checkpoints/0.jpg", "train/cat/@eaDir/0.jpg/THUMB.jpg", "train/cat/._0.jpg"]
    files = {**folders(train=3, probe=1, test=1), **dict.fromkeys(odd, b"x")}
    counts = {"train": 6, "probe": 2, "test": 2}
    return Case(files, counts=counts, findings=("4 hidden files, or of tools .such as .DS_Store.: left out",))


@case
def folders_of_classes_without_an_image() -> Case:
    files = {**folders(train=3, probe=1), "train/goat/1": b"x", "train/emu/1.heic": b"x", "train/emu/2.heic": b"x"}
    found = (
        "3 other files are not read: 2 .heic, 1 without ending",
        "no image is read in 2 folders .train/emu: 2 .heic; ",
    )
    return Case(files, counts={"train": 6, "probe": 2}, findings=found)


@case
def other_formats_that_pillow_reads() -> Case:
    files = folders(train=2, probe=1)
    for name in ("ppm", "jfif", "avif", "jp2"):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(
            buffer, {"ppm": "PPM", "jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000"}[name]
        )
        files[f"train/cat/x.{name}"] = buffer.getvalue()
    return Case(files, counts={"train": 8, "probe": 2})


@case
def formats_that_are_not_read() -> Case:
    files = {**folders(train=2, probe=1), "train/cat/x.jpg": b"\0\0\0\x18ftypheic" + bytes(40)}
    found = ("sampled images cannot be used: 1 HEIC, a format that is not read: convert it to JPEG",)
    return Case(files, counts={"train": 5, "probe": 2}, findings=found)


@case
def tables_and_labels_beside_images_in_folders() -> Case:
    files = {**folders(train=2, probe=1), "labels.csv": b"path,label\n", "train/cat/0.txt": b"3 .5 .5 1 1"}
    found = (
        "1 files beside images, of their names, are not read: 1 .txt",
        "1 tables are not read: 1 .csv .such as labels",
    )
    return Case(files, counts={"train": 4, "probe": 2}, findings=found)


@case
def one_folder_of_images_and_a_table() -> Case:
    files = {**TWELVE, "labels.csv": listed().encode()}
    return Case(files, error="has no folders of classes, but labels.csv: give that table itself if it has the labels")


@case
def images_in_no_folder_of_a_class() -> Case:
    files = {**folders(train=2, probe=1), "logo.png": b"x", "train/odd.jpg": b"x", "docs/figures/1.png": b"x"}
    return Case(files, counts={"train": 4, "probe": 2}, findings=("3 images are in no folder of a class .docs/",))


@case
def an_archive_beside_its_unpacked_folder() -> Case:
    files = {f"{name}/{k}.jpg": PHOTOS[k] for name in ("cat", "dog") for k in range(3)}
    found = ("pets.zip lies unpacked beside it, in pets .6 images.: the unpacked files are read", "no trusted image")
    unpacked = {f"pets/{name}": data for name, data in files.items()}
    return Case({**unpacked, "pets.zip": zipped(files)}, counts={"train": 6}, findings=found)


@case
def an_archive_unpacked_in_part() -> Case:
    files = {f"{name}/{k}.jpg": PHOTOS[k] for name in ("cat", "dog") for k in range(3)}
    unpacked = {f"pets/{name}": data for name, data in files.items() if name != "dog/2.jpg"}
    error = r"pets.zip lies unpacked in pets/ in part \(5 of 6 images\): unpack it whole, or remove one"
    return Case({**unpacked, "pets.zip": zipped(files)}, error=error)


# ---- WebDataset ------------------------------------------------------------------------------------------------------


def shard(count: int, first: int, **others: Callable[[int], str]) -> bytes:
    files = {}
    for k in range(count):
        files[f"{first + k:05d}.jpg"] = PHOTOS[(first + k) % 60]
        files |= {f"{first + k:05d}.{ending}": text(k).encode() for ending, text in others.items()}
    return tar(files)


@case
def webdataset_with_cls() -> Case:
    files = {
        f"{split}/{k:06}.tar": shard(4, 10 * k, cls=lambda k: str(k % 2))
        for k in range(2)
        for split in ("train", "probe")
    }
    return Case(files, counts={"train": 8, "probe": 8}, classes=("0", "1"))


@case
def webdataset_with_json() -> Case:
    text = lambda k: json.dumps({"kind": ["cat", "dog"][k % 2], "width": 16})  # noqa: E731
    files = {f"pets-train-{k}.tar": shard(4, 10 * k, json=text) for k in range(2)}
    files["pets-probe.tar"] = shard(2, 50, json=text)
    return Case(files, counts={"train": 8, "probe": 2}, layout=Custom(label_column="kind"))


@case
def webdataset_with_json_and_no_field_named() -> Case:
    files = {"train-0.tar": shard(4, 0, json=lambda k: "{}")}
    return Case(files, error="train-0.tar has a .json beside each image .00000.json.: name its field")


@case
def webdataset_shards_in_braces() -> Case:
    files = {f"train-{k:03}.tar": shard(4, 10 * k, cls=lambda k: "ab"[k % 2]) for k in range(12)}
    found = ("no trusted image",)
    return Case(files, "train-{002..010}.tar", counts={"train": 36}, classes=("a", "b"), findings=found)


@case
def webdataset_of_which_one_image_has_no_label() -> Case:
    files = {"train-0.tar": shard(4, 0, cls=lambda k: str(k % 2)), "train-1.tar": shard(1, 20)}
    return Case(files, error="train-1.tar: 00020.jpg has no .cls that can be read")


@case
def labels_in_files_outside_of_tars() -> Case:
    pairs = {f"{k}.{ending}": data for k in range(4) for ending, data in (("jpg", PHOTOS[k]), ("cls", b"0"))}
    return Case({"train/000.zip": zipped(pairs)}, error="has labels in .cls files .0.cls.: pack them with their images")


@case
def webdataset_with_more_beside_the_images() -> Case:
    files = {"train.tar": shard(4, 0, cls=lambda k: str(k % 2), txt=lambda k: "words")}
    found = ("4 files beside images, of their names, are not read: 4 .txt", "no trusted image")
    return Case(files, counts={"train": 4}, classes=("0", "1"), findings=found)


# ---- all of them -----------------------------------------------------------------------------------------------------


def checked(one: Case, root: Path) -> Report:
    write(str(root), one.files)
    return check.check(one.layout, f"{root}/{one.url}".rstrip("/"))


def ingested(listing: Listing, out: Path) -> set[tuple[int, int, str]]:
    """Id, label and split of what ingest writes of a listing or rejects, by the functions that its tasks call."""
    tasks = shards.plan_shards(listing.table)
    rejected = set()
    for name, task in tasks.items():
        named = task.append_column("name", pa.array([name] * len(task)))
        record = shards.make_shard(named, str(out), 0, "", len(listing.class_names))["record"][0].as_py()
        rejected |= {each["id"] for each in json.loads(record)["rejected"]}
    stored = [row for file in out.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    left = [row for row in listing.table.to_pylist() if row["id"] in rejected]
    return {(row["id"], row["label"], row["split"]) for row in stored + left}


def announced(report: Report) -> set[tuple[int, int, str]]:
    assert report.listing is not None
    return {(row["id"], row["label"], row["split"]) for row in report.listing.table.to_pylist()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_given_is_read_or_named(name, tmp_path):
    one = CASES[name]()
    if one.error:
        with pytest.raises(InputError, match=one.error) as error:
            checked(one, tmp_path)
        assert "\n" not in str(error.value)
        return
    report = checked(one, tmp_path / "raw")
    listing = report.listing
    assert listing is not None
    assert {split: listing.count(split) for split in listing.splits} == one.counts
    assert listing.class_names == one.classes
    found = [f"{each.what}: {each.fix}" for each in report.findings if each.level != "ok"]
    found = [each for each in found if "no evaluation set" not in each and "images a class" not in each]
    for pattern in one.findings:
        assert any(re.search(pattern, each) for each in found), (pattern, found)
    assert len(found) == len(one.findings), found
    again = one.layout.listing(f"{tmp_path}/raw/{one.url}".rstrip("/"))
    assert ingested(again, tmp_path / "out") == announced(report)


WORDS = ["train", "Test", "probe", "val_images", "cat", "dog", "a b", "ü", "docs", ".git", "@eaDir", "deep", "x"]
ENDINGS = [".jpg", ".JPEG", ".png", ".txt", ".heic", "", ".csv", ".h5", ".tar", ".zip"]
NAMES = st.builds(
    lambda folders, file, ending: "/".join([*folders, file + ending]),
    st.lists(st.sampled_from(WORDS), max_size=3),
    st.sampled_from(["1", "x y", "#", ".h"]),
    st.sampled_from(ENDINGS),
)
SURE = [
    [f"{split}/{name}/0.jpg" for split in ("train", "probe") for name in ("cat", "dog")],
    ["cat/0.jpg", "dog/0.jpg"],
]


def files_of(names: set[str]) -> list[str]:
    """Those that can lie in one tree: a file is no folder."""
    return sorted(name for name in names if not any(other.startswith(f"{name}/") for other in names))


def is_archive(name: str) -> bool:
    return bool(ARCHIVE.fullmatch(name.rpartition("/")[2]))


@settings(max_examples=150)
@given(sure=st.sampled_from(SURE), more=st.sets(NAMES, max_size=9), inner=st.sets(NAMES, min_size=1, max_size=5))
def test_every_file_of_any_tree_is_used_or_counted(sure, more, inner):
    """An error of one line, or a check that accounts for each file, and shards of just the rows that it announced."""
    names = files_of({*sure, *more})
    members = {name: PHOTOS[k] for k, name in enumerate(files_of(inner)) if not is_archive(name)}
    with tempfile.TemporaryDirectory() as folder:
        for k, name in enumerate(names):
            data = {".tar": tar(members), ".zip": zipped(members)}.get(name[-4:], PHOTOS[20 + k])
            write(f"{folder}/raw", {name: data})
        try:
            report = check.check(Custom(), f"{folder}/raw", 0)
        except InputError as error:
            refused = str(error)
        else:
            refused = ""
        event(refused.partition("/raw")[2][:30] or "read")
        assert "\n" not in refused
        if not refused:
            assert report.listing is not None
            read = sum(finding.files for finding in report.findings) + len(report.listing.table)
            archives = sum(is_archive(name) and not hidden(name) for name in names)
            copies = sum("lies unpacked beside it" in finding.what for finding in report.findings)
            assert read == len(names) - archives + copies + (archives - copies) * len(members)
            assert ingested(Custom().listing(f"{folder}/raw"), Path(folder, "out")) == announced(report)


SPELLINGS = ["{}", "./{}", "x/../{}", " {} "]


@settings(max_examples=60)
@given(
    data=st.data(),
    names=st.sets(NAMES.filter(lambda name: name[-4:] not in (".tar", ".zip", ".csv")), min_size=3, max_size=9),
)
def test_every_file_beside_a_table_is_named_or_counted(data, names):
    """Rows spell names in any way; what no row names is counted, and shards hold just the rows that check announced."""
    files = files_of(names)
    named = data.draw(st.lists(st.sampled_from(files), min_size=1, unique=True))
    rows = [f"{data.draw(st.sampled_from(SPELLINGS)).format(name)},{'ab'[k % 2]}" for k, name in enumerate(named)]
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/raw", {name: PHOTOS[k] for k, name in enumerate(files)})
        write(f"{folder}/raw", {"list.csv": "\n".join(["path,label", *rows]).encode()})
        if len(named) < 2:
            with pytest.raises(InputError, match="has one class"):
                check.check(Custom(), f"{folder}/raw/list.csv", 0)
            return
        report = check.check(Custom(), f"{folder}/raw/list.csv", 0)
        assert report.listing is not None
        assert report.listing.table["file"].null_count == 0
        assert sum(finding.files for finding in report.findings) + len(report.listing.table) == len(files)
        assert ingested(Custom().listing(f"{folder}/raw/list.csv"), Path(folder, "out")) == announced(report)


def test_the_table_of_the_docs_has_these_cases():
    rows = re.findall(r"^\| (?:\*\*)?([^|]+?) \|", (ROOT / "docs/own-data.md").read_text(), re.MULTILINE)
    known = [row for row in rows if row not in ("you give", "---", "what")]
    assert Counter(known) == Counter(list(CASES))
