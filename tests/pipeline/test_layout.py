import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.archive import Place
from pipeline.dataset import InputError
from pipeline.layout import (
    SCHEMA,
    Finding,
    Listing,
    TextList,
    counted,
    findings_of,
    looked_around,
    rows,
    settle,
    stable_ids,
)
from pipeline.tree import MISSING, Tree
from tests.pipeline.layouts import tar, text, write, zipped

KEYS = st.text(
    st.characters(exclude_characters="\n\r/\0\\\ufeff", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda key: key != ".." and not key.endswith(":"))


def listing(*images: tuple[str, str, int]) -> Listing:
    """Of (split, key, label), all files at x/key."""
    tables = [
        rows("data", split, [key], np.array([label]), [(f"x/{key}", 0, -1, "file")]) for split, key, label in images
    ]
    return Listing(pa.concat_tables(tables), ("a", "b"))


def images_of(listing: Listing) -> list[tuple[str, str, int]]:
    return [(row["split"], row["key"], row["label"]) for row in listing.table.to_pylist()]


def test_ids_stay_what_they_are_for_ever():
    ids = stable_ids("clothing1m", ["images/0/00/1278541879,867148000.jpg", "é"])
    assert ids.tolist() == [3708086816200389930, 8098612631050333141]
    assert ids.dtype == np.int64


@given(keys=st.lists(KEYS, unique=True))
def test_ids_depend_on_the_data_set_and_the_key_alone(keys):
    ids = stable_ids("a", keys)
    assert len(set(ids.tolist()) | set(stable_ids("b", keys).tolist())) == 2 * len(keys)
    np.testing.assert_array_equal(ids, [stable_ids("a", [key])[0] for key in keys])


def test_rows_keep_order_and_places():
    places: list[Place] = [("x/a.tar", 512, 7, "stored"), MISSING]
    table = rows("data", "val", ["b", "a"], np.array([1, 0]), places)
    assert table.schema == SCHEMA
    assert table.to_pylist() == [
        {"key": "b", "label": 1, "split": "val", "file": "x/a.tar", "start": 512, "size": 7, "how": "stored"}
        | {"id": stable_ids("data", ["b"])[0]},
        {"key": "a", "label": 0, "split": "val", "file": None, "start": 0, "size": -1, "how": "file"}
        | {"id": stable_ids("data", ["a"])[0]},
    ]
    assert rows("data", "val", [], np.zeros(0), []).num_rows == 0


# ---- settle ----------------------------------------------------------------------------------------------------------


def test_settling_what_is_settled_changes_nothing():
    before = listing(("test", "c", 0), ("train", "a", 0), ("probe", "b", 1))
    assert settle(before) == before
    assert before.splits == ("train", "probe", "test")
    assert [before.count(split) for split in ("train", "probe", "test", "val")] == [1, 1, 1, 0]


def test_evaluation_wins_over_probe_and_probe_over_train():
    images = [
        ("train", "a", 0),
        ("probe", "a", 1),
        ("val", "a", 0),
        ("probe", "b", 1),
        ("train", "b", 0),
        ("train", "c", 0),
    ]
    settled = settle(listing(*images))
    assert images_of(settled) == [("val", "a", 0), ("probe", "b", 1), ("train", "c", 0)]
    assert settled.findings == (
        Finding("note", "1 images of train are in probe too", "they stay in probe only"),
        Finding("note", "1 images of train are in val too", "they stay in val only"),
        Finding("note", "1 images of probe are in val too", "they stay in val only"),
    )


def test_what_is_listed_twice_is_kept_once_and_what_has_two_labels_not_at_all():
    images = [
        ("train", key, label) for key, label in (("a", 0), ("b", 0), ("a", 0), ("a", 0), ("b", 1), ("b", 0), ("c", 1))
    ]
    settled = settle(listing(*images, ("val", "v", 0), ("val", "v", 1), ("train", "v", 1)))
    assert images_of(settled) == [("train", "a", 0), ("train", "c", 1)]
    assert settled.findings == (
        Finding("warning", "train lists 1 images twice", "kept once; fix the list"),
        Finding("warning", "train gives 1 images two labels (b)", "left out; choose one"),
        Finding("note", "1 images of train are in val too", "they stay in val only"),
        Finding("warning", "val gives 1 images two labels (v)", "left out; choose one"),
    )


@given(
    images=st.lists(
        st.tuples(st.sampled_from(["train", "probe", "val", "test"]), st.sampled_from("abcd"), st.integers(0, 1))
    )
)
def test_settled_images_are_there_once_in_the_split_that_wins(images):
    if not images:
        return
    before = listing(*images)
    settled = images_of(settle(before))
    expected = set()
    for key in {key for _, key, _ in images}:
        best = max((before.splits.index(split), split) for split, other, _ in images if other == key)[1]
        labels = {label for split, other, label in images if (split, other) == (best, key)}
        expected |= {(best, key, label) for label in labels if len(labels) == 1}
    assert len(settled) == len(expected)
    assert set(settled) == expected


@pytest.mark.parametrize("repeats", [1, 2000])
def test_two_images_of_one_id_are_an_error(repeats):
    # however many honest repeats come before
    table = listing(
        *[("train", f"{row}", 0) for row in range(repeats)], ("train", "left", 0), ("train", "right", 0)
    ).table
    ids = table["id"].to_pylist()
    ids[-1] = ids[-2]
    clashing = table.set_column(0, "id", pa.array(ids))
    both = pa.concat_tables([table.slice(0, repeats), clashing])
    with pytest.raises(InputError, match=r"(left and right|right and left) share id \d+: rename one of them"):
        settle(Listing(both, ("a", "b")))


# ---- looking around --------------------------------------------------------------------------------------------------


def test_looking_around_tells_missing_and_unlisted_images(tmp_path):
    write(
        str(tmp_path), {"a.jpg": b"", "c.jpg": b"", "some.tar": tar({"x/1.jpg": b"", "x/2.jpg": b"", "x/3.jpg": b""})}
    )
    tree = Tree.open(str(tmp_path))
    keys = ["a.jpg", "b.jpg", "x/1.jpg", "x/1.jpg"]
    places = [*tree.places(keys), ("elsewhere/d.jpg", 0, -1, "file"), MISSING]
    table = rows("data", "train", [*keys, "d", "e"], np.zeros(6), places)
    looked = looked_around(Listing(table, ("a", "b")), tree, tree.places(["x/2.jpg", "x/2.jpg"]))
    assert looked.table["file"].to_pylist() == [
        *(f"{tmp_path}/a.jpg", None, f"{tmp_path}/some.tar", f"{tmp_path}/some.tar", "elsewhere/d.jpg", None)
    ]
    assert looked.table.schema == SCHEMA
    assert looked.unlisted == 2  # c.jpg and x/3.jpg


def test_what_a_tree_leaves_out_is_found(tmp_path):
    assert findings_of(Tree.open(str(tmp_path))) == ()
    write(str(tmp_path), {"a.zip": zipped({"../a.jpg": b"", "../b.jpg": b""}), "b.tgz": tar({"a.jpg": b""}, "w:gz")})
    unread, unsafe = findings_of(Tree.open(str(tmp_path)))
    assert unread.what.endswith("b.tgz is compressed as a whole, so that no image in it can be read alone")
    assert unread.fix.startswith("decompress it once (gzip -d")
    assert unsafe.what == "2 files are never read (such as a.zip: '../a.jpg': its name leaves the folder)"


def test_counts_are_held_against_the_published_ones():
    assert counted("list", 1000, 1000) == Finding("ok", "list lists 1,000 images, as published")
    assert counted("list", 999, 1000).level == "warning"


# ---- lists -----------------------------------------------------------------------------------------------------------


def read(data: bytes) -> TextList:
    write("memory://lists", {"list.txt": data})
    return TextList.read(Tree.open("memory://lists"), "absent.txt", "list.txt")


@given(
    images=st.lists(st.tuples(KEYS, st.integers(0, 9)), min_size=1),
    end=st.sampled_from(["\n", "\r\n"]),
    separator=st.sampled_from([" ", "\t"]),
    mark=st.booleans(),
    blank=st.integers(0, 3),
)
def test_any_names_and_labels_come_back(images, end, separator, mark, blank):
    data = end.join(f"{key}{separator}{label}" for key, label in images) + blank * end
    keys, label_N = read(data.encode("utf-8-sig" if mark else "utf-8")).labelled(10, separator)
    assert list(zip(keys, label_N.tolist(), strict=True)) == images
    assert label_N.dtype == np.int32
    data = end.join(key for key, _ in images) + blank * end
    assert read(data.encode("utf-8-sig" if mark else "utf-8")).keys() == [key for key, _ in images]


@pytest.mark.parametrize(
    "line",
    ["a.jpg", "a.jpg ", " 1", "a.jpg 10", "a.jpg -1", "a.jpg 1_0", "a.jpg ١", "a.jpg 1.0", "", "../a.jpg 1", "/a 1"],
)
def test_a_malformed_line_is_named(line):
    with pytest.raises(
        InputError, match=r"lists/list.txt, line 3: .* is not the name of an image and a label of 0…9: copy"
    ):
        read(text(["a.jpg 1", "b.jpg 2", line, "c.jpg 3"])).labelled(10)


@pytest.mark.parametrize("line", ["", "a/../b.jpg", "/a.jpg", "C:/a.jpg"])
def test_a_name_that_leads_elsewhere_is_named(line):
    listed = read(text(["header", "a.jpg", line, "c.jpg"])).without_header("head")
    with pytest.raises(InputError, match=r"list.txt, line 3: .* is not the name of an image: copy the list again"):
        listed.keys()


def test_lists_that_are_not_there_or_no_text_are_named(tmp_path):
    with pytest.raises(InputError, match=r"list.txt is no UTF-8 text \(byte 2\)"):
        read(b"ab\xff")
    with pytest.raises(InputError, match=f"no a.txt or b.txt in {tmp_path}: give the folder or archive that has it"):
        TextList.read(Tree.open(str(tmp_path)), "a.txt", "b.txt")
