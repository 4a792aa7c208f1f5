import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clothing1m import Clothing1M
from pipeline.dataset import InputError
from tests.pipeline.layouts import assert_same, bytes_of, labels_of, text, write, write_clothing1m

REAL = Path(__file__).parents[3] / "shared" / "data" / "clothing1m"
PUBLISHED = {"train": 1_000_000, "probe": 47_570, "val": 14_313, "test": 10_526}


@pytest.mark.parametrize("archives", [False, True])
def test_folders_and_the_original_archives_give_the_same_images(tmp_path, archives):
    written = write_clothing1m(str(tmp_path), archives=archives)
    listing = Clothing1M().listing(str(tmp_path), look_around=True)
    assert_same(listing.table, written)
    assert listing.splits == ("train", "probe", "val", "test")
    assert listing.class_names[0] == "T-Shirt"
    assert listing.class_names[13] == "Underwear"
    assert listing.expected == PUBLISHED
    assert listing.unlisted == 0
    assert listing.findings == ()


def test_ids_do_not_depend_on_the_storage(tmp_path, bucket):
    listings = []
    for root, archives in ((str(tmp_path), False), (f"{bucket}/data/clothing", True)):
        written = write_clothing1m(root, archives=archives)
        listings.append(Clothing1M().listing(root, look_around=True))
        assert_same(listings[-1].table, written)
    assert listings[0].table["id"] == listings[1].table["id"]
    assert listings[1].unlisted == 0


def test_missing_and_unlisted_images_are_found_by_looking_around(tmp_path):
    written = write_clothing1m(str(tmp_path))
    gone = next(iter(written["train"]))
    (tmp_path / gone).unlink()
    write(str(tmp_path), {"images/0/00/stranger.JPG": b"x", "images/notes.txt": b"x"})
    plain, looked = Clothing1M().listing(str(tmp_path)), Clothing1M().listing(str(tmp_path), look_around=True)
    assert (plain.unlisted, plain.table["file"].null_count) == (-1, 0)
    assert (looked.unlisted, looked.table["file"].null_count) == (1, 1)
    missing = [row["key"] for row in looked.table.to_pylist() if row["file"] is None]
    assert missing == [gone]


KEYS = st.text(st.characters(exclude_characters="\n\r/\0\\", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(names=st.sets(KEYS.filter(lambda name: name != ".."), min_size=1, max_size=6), crlf=st.booleans())
def test_any_name_of_an_image_comes_back(names, crlf):
    end, part = "\r\n" if crlf else "\n", {f"images/{name}": (row % 14, b"") for row, name in enumerate(sorted(names))}
    root = "memory://clothing-names"
    write_clothing1m(root)
    write(root, {"noisy_train_key_list.txt": "\ufeff".encode() + text(list(part), end) + b"\n\n"})
    write(root, {"noisy_label_kv.txt": text(labels_of(part), end).rstrip()})
    table = Clothing1M().listing(root).table.to_pylist()
    train = [(row["key"], row["label"], row["file"]) for row in table if row["split"] == "train"]
    assert train == [(key, label, f"{root}/{key}") for key, (label, _) in part.items()]
    assert bytes_of(part).keys() == part.keys()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("noisy_label_kv.txt", None, "no noisy_label_kv.txt or annotations/noisy_label_kv.txt in .*: give the folder"),
        ("category_names_eng.txt", None, "no category_names_eng.txt or annotations/"),
        (
            "clean_label_kv.txt",
            b"images/1,2.jpg 3\nimages/3,4.jpg\n",
            "clean_label_kv.txt, line 2: 'images/3,4.jpg' is not",
        ),
        ("clean_label_kv.txt", b"images/1,2.jpg 14\n", "line 1: 'images/1,2.jpg 14' is not .* a label of 0…13"),
        ("clean_label_kv.txt", b"images/1,2.jpg -1\n", "line 1"),
        ("clean_label_kv.txt", b"images/1,2.jpg 1.0\n", "line 1"),
        ("clean_label_kv.txt", b"../1,2.jpg 1\n", "line 1"),
        ("clean_label_kv.txt", b"", "line 1: '' is not"),
        ("clean_label_kv.txt", b"images/\xff.jpg 1\n", "clean_label_kv.txt is no UTF-8 text .byte 7."),
        (
            "clean_val_key_list.txt",
            b"images/1.jpg\n",
            "line 1: 'images/1.jpg' is not an image that clean_label_kv.txt gives",
        ),
        ("clean_val_key_list.txt", b"/etc/1.jpg\n", "line 1: '/etc/1.jpg' is not the name of an image"),
    ],
)
def test_bad_lists_are_one_line_with_their_place(tmp_path, name, content, message):
    write_clothing1m(str(tmp_path))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        Clothing1M().listing(str(tmp_path))
    assert "\n" not in str(error.value)


def test_images_in_two_sets_stay_in_the_one_that_needs_them_most(tmp_path):
    written = write_clothing1m(str(tmp_path))
    shared = {split: next(iter(written[split].items())) for split in ("probe", "test")}
    lines = [f"{key} {(label + 1) % 14}" for key, (label, _) in shared.values()]
    for name, added in (
        ("noisy_train_key_list.txt", [key for key, _ in shared.values()]),
        ("noisy_label_kv.txt", lines),
    ):
        with (tmp_path / name).open("ab") as file:
            file.write(text(added))
    listing = Clothing1M().listing(str(tmp_path))
    assert_same(listing.table, written)
    assert [finding.what for finding in listing.findings] == [
        "1 images of train are in probe too",
        "1 images of train are in test too",
    ]


@pytest.mark.skipif(not REAL.exists(), reason=f"no real Clothing1M lists at {REAL}")
def test_the_real_lists_are_as_published(tmp_path):
    shutil.copytree(REAL, tmp_path / "annotations")
    # the noisy million is not published with them
    write(str(tmp_path), {"noisy_train_key_list.txt": b"images/1/1,2.jpg", "noisy_label_kv.txt": b"images/1/1,2.jpg 0"})
    listing = Clothing1M().listing(str(tmp_path))
    counts = Counter(listing.table["split"].to_pylist())
    assert counts == PUBLISHED | {"train": 1}
    assert listing.findings == ()  # no image is in two sets, none twice
    assert len(set(listing.table["id"].to_pylist())) == 72_410
    assert len(listing.class_names) == 14
    assert set(listing.table["label"].to_pylist()) == set(range(14))
