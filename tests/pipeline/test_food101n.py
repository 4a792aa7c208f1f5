import pytest

from pipeline.dataset import InputError
from pipeline.food101n import Food101N
from tests.pipeline.layouts import assert_same, write, write_food101n


def listed(root, look_around=True, **fields):
    fields = {"food101": f"{root}/food101", "spool": f"{root}/spool"} | fields
    return Food101N(**fields).listing(f"{root}/food101n", look_around=look_around)


@pytest.mark.parametrize("archives", [False, True])
def test_folders_and_the_original_archives_give_the_same_images(tmp_path, archives):
    written = write_food101n(str(tmp_path), archives=archives)
    listing = listed(tmp_path)
    assert_same(listing.table, written)
    assert listing.splits == ("train", "probe", "val", "test")
    assert listing.class_names == ("dish_000", "dish_001", "dish_002")
    assert listing.unlisted == 0
    assert listing.expected == {"train": 310_009 - 9, "test": 25_250}
    assert [(finding.level, finding.what) for finding in listing.findings] == [
        ("warning", "meta/imagelist.tsv lists 24 images, 310,009 are published"),
        ("warning", "meta/verified_train.tsv lists 9 images, 52,868 are published"),
        ("warning", "meta/verified_val.tsv lists 6 images, 4,741 are published"),
        ("note", "6 images of train are in probe too"),
        ("note", "3 images of train are in val too"),
    ]


def test_ids_do_not_depend_on_the_storage(tmp_path, bucket):
    listings = []
    for root, archives in ((str(tmp_path), False), (f"{bucket}/data", True)):
        written = write_food101n(root, archives=archives)
        listings.append(listed(root))
        assert_same(listings[-1].table, written)
    assert listings[0].table["id"] == listings[1].table["id"]


def test_food_101_is_the_folder_its_archive_holds_too(tmp_path):
    written = write_food101n(str(tmp_path), archives=True)
    archive = f"{tmp_path}/food101/food-101.tar.gz"
    assert_same(listed(tmp_path, food101=archive).table, written)
    for url in (archive, f"{tmp_path}/food101"):
        with pytest.raises(InputError, match=r"compressed as a whole, .* decompress it once .*for Food-101 --spool"):
            listed(tmp_path, food101=url, spool="")


def test_without_food_101_there_is_no_test_set(tmp_path):
    written = write_food101n(str(tmp_path))
    listing = listed(tmp_path, food101="")
    del written["test"]
    assert_same(listing.table, written)
    assert listing.expected.keys() == {"train"}
    (finding,) = [finding for finding in listing.findings if "evaluation set" in finding.what]
    assert (finding.level, finding.fix) == ("warning", "give --food101, the URL of Food-101")


def test_one_file_name_under_two_classes_is_two_images(tmp_path):
    written = write_food101n(str(tmp_path))
    key, (_, image) = next(iter(written["probe"].items()))
    other = key.replace("dish_000", "dish_002")
    meta = tmp_path / "food101n" / "meta" / "imagelist.tsv"
    write(f"{tmp_path}/food101n", {f"images/{other}": image, "meta/imagelist.tsv": meta.read_bytes() + other.encode()})
    written["train"][other] = 2, image
    listing = listed(tmp_path)
    assert_same(listing.table, written)
    assert "1 images of train have the file name of a verified image of another class" in [
        finding.what for finding in listing.findings
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "food101n/meta/classes.txt",
            None,
            "no meta/classes.txt in .*food101n: give the folder or archive that has it",
        ),
        ("food101n/meta/imagelist.tsv", None, "no meta/imagelist.tsv"),
        ("food101/meta/test.txt", None, "no meta/test.txt in .*food101:"),
        (
            "food101n/meta/imagelist.tsv",
            b"class_name/key\ndish_009/1.jpg",
            "imagelist.tsv, line 2: 'dish_009/1.jpg' is not",
        ),
        ("food101n/meta/imagelist.tsv", b"dish_001/1.jpg\ndish_009/1.jpg", "imagelist.tsv, line 2"),
        (
            "food101n/meta/verified_val.tsv",
            b"dish_001/1.jpg\t2\n",
            "line 1: .* is not the name of an image and a label of 0…1",
        ),
        ("food101n/meta/verified_train.tsv", b"class_name/key\tx\ndish_001/1.jpg 1\n", "verified_train.tsv, line 2"),
        ("food101/meta/test.txt", b"dish_000/1\nfruit/1\n", "test.txt, line 2: 'fruit/1' is not class/image"),
    ],
)
def test_bad_lists_are_one_line_with_their_place(tmp_path, name, content, message):
    write_food101n(str(tmp_path))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        listed(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", [True, False])
def test_lists_with_and_without_headers_and_crlf(tmp_path, header):
    written = write_food101n(str(tmp_path))
    for path in (tmp_path / "food101n" / "meta").iterdir():
        lines = path.read_bytes().rstrip(b"\n").split(b"\n")[0 if header else 1 :]
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines, b"", b""]))
    assert_same(listed(tmp_path).table, written)
