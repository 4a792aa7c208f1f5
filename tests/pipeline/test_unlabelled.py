"""Images to predict on: the same pixels, ids and order wherever they lie, and what the network sees of each."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cifar import Cifar
from pipeline.columns import Columns
from pipeline.dataset import InputError
from pipeline.digits import Digits
from pipeline.images import Rejected, check_image, decode, read_image
from pipeline.index import Sharded
from pipeline.layout import stable_ids
from pipeline.unlabelled import open_images, views_of
from pipeline.views import fitted
from tests.pipeline import layouts

FILES = {
    f"{k}/{number}.jpg": image
    for k, of_class in enumerate(layouts.photos(3, 4, 20))
    for number, image in enumerate(of_class)
}


@pytest.fixture
def folder(tmp_path) -> str:
    layouts.write(f"{tmp_path}/images", FILES)
    return f"{tmp_path}/images"


def seen(url: str) -> dict[str, np.ndarray]:
    images = open_images(url, "", 256)
    rows = images.rows.append_column("place", pa.array(range(len(images.rows))))
    return views_of(rows, images.read, Sharded("custom", size=16))


def as_csv(folder: str, tmp_path: Path) -> str:
    names = sorted(FILES)
    Path(folder, "list.csv").write_text("path,note\n" + "".join(f"{name},x\n" for name in [*names, names[0]]))
    return f"{folder}/list.csv"


def as_parquet(folder: str, tmp_path: Path) -> str:
    names = sorted(FILES)
    pq.write_table(pa.table({"id": names, "photo": [FILES[name] for name in names]}), tmp_path / "images.parquet")
    return f"{tmp_path}/images.parquet"


def as_parquet_of_names(folder: str, tmp_path: Path) -> str:
    pq.write_table(pa.table({"uri": sorted(FILES)}), f"{folder}/list.parquet")
    return f"{folder}/list.parquet"


def as_tar(folder: str, tmp_path: Path) -> str:
    (tmp_path / "images.tar").write_bytes(layouts.tar(FILES))
    return f"{tmp_path}/images.tar"


def as_zip(folder: str, tmp_path: Path) -> str:
    (tmp_path / "images.zip").write_bytes(layouts.zipped(FILES))
    return f"{tmp_path}/images.zip"


@pytest.mark.parametrize("where", [as_csv, as_parquet, as_parquet_of_names, as_tar, as_zip])
def test_images_are_the_same_wherever_they_lie(folder, tmp_path, where):
    expected = seen(folder)
    names = sorted(FILES)
    assert expected["key"].tolist() == names
    assert expected["id"].tolist() == stable_ids("custom", names).tolist()
    for name, view_HWC in zip(names, expected["image"], strict=True):
        np.testing.assert_array_equal(view_HWC, Sharded("custom", size=16).views.test(decode(FILES[name])))
    found = seen(where(folder, tmp_path))
    assert found.keys() == expected.keys()
    for column, values in expected.items():
        np.testing.assert_array_equal(found[column], values)


def test_another_list_has_another_digest(folder):
    digest = open_images(folder, "", 256).digest
    assert open_images(folder, "", 256).digest == digest
    assert open_images(folder, "", 128).digest != digest
    Path(folder, "0/0.jpg").rename(Path(folder, "0/00.jpg"))
    assert open_images(folder, "", 256).digest != digest


def test_raw_images_are_read_as_ingest_stores_them():
    rng = np.random.default_rng(0)
    photo = cv2.resize(rng.integers(0, 256, (6, 9, 3), np.uint8), (90, 60))
    jpeg, png = layouts.jpeg(photo), cv2.imencode(".png", photo)[1].tobytes()
    np.testing.assert_array_equal(read_image(jpeg, 256), decode(check_image(jpeg, 256)))
    np.testing.assert_array_equal(read_image(png, 256), photo[:, :, ::-1])  # lossless, where ingest stores a JPEG
    for raw in (jpeg, png):
        smaller = read_image(raw, 20)
        assert smaller.shape == (20, 30, 3)
        stored = decode(check_image(raw, 20))
        grey, stored_grey = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(int) for one in (smaller, stored))
        assert np.abs(grey - stored_grey).mean() < 2  # of colours JPEG keeps a quarter
    with pytest.raises(Rejected, match="not an image"):
        read_image(b"nothing", 20)


def test_what_a_network_of_small_images_sees():
    rng = np.random.default_rng(0)
    digit = rng.integers(0, 256, (8, 8, 1), np.uint8)
    assert fitted(digit, (8, 8, 1)) is digit
    np.testing.assert_array_equal(fitted(np.repeat(digit, 3, 2), Digits().shape), digit)  # as PNG files are read
    photo = rng.integers(0, 256, (40, 70, 3), np.uint8)
    for shape in (Cifar(size=20).shape, Digits().shape):
        view = fitted(photo, shape)
        assert (view.shape, view.dtype) == (shape, np.uint8)
    blocks = photo[:, 15:55].reshape(20, 2, 20, 2, 3).mean((1, 3))  # 40 px to 20: areas of 2×2
    np.testing.assert_allclose(fitted(photo, (20, 20, 3)), blocks, atol=0.51)
    square = rng.integers(0, 256, (32, 32, 3), np.uint8)
    assert fitted(square, Cifar().shape) is square


def test_an_unusable_image_has_a_reason_and_no_view(folder):
    Path(folder, "0/0.jpg").write_bytes(b"<html>")
    Path(folder, "list.csv").write_text("uri\n0/0.jpg\nnowhere.jpg\n1/1.jpg\n")
    found = seen(f"{folder}/list.csv")
    assert found["rejected"].tolist() == ["a web page, not an image", "missing", ""]
    assert [bool(view.any()) for view in found["image"]] == [False, False, True]


@pytest.mark.parametrize("ids", [[0, 1], [7, 7]])
def test_every_row_of_parquet_is_an_image_whatever_its_id(tmp_path, ids):
    for name in ("a", "b"):
        pq.write_table(pa.table({"id": ids, "photo": list(FILES.values())[:2]}), tmp_path / f"{name}.parquet")
    keys = open_images(str(tmp_path), "", 0).rows["key"].to_pylist()
    own = [0, 1]  # ids where they differ within a file, else numbers of rows
    assert sorted(keys) == sorted(f"{name}.parquet:{row}" for name in ("a", "b") for row in own)


def test_columns_may_have_other_names(folder):
    names = sorted(FILES)
    pq.write_table(pa.table({"photo": names, "code": [f"n{k}" for k in range(len(names))]}), f"{folder}/list.parquet")
    images = open_images(f"{folder}/list.parquet", "", 0, Columns(image="Photo", id="code"))
    assert images.rows["key"].to_pylist() == [f"n{k}" for k in range(len(names))]
    assert [file.rpartition("/")[2] for file in images.rows["file"].to_pylist()] == [
        n.rpartition("/")[2] for n in names
    ]


def test_rows_without_a_name_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text("uri,label\na.jpg,1\n,2\n")
    with pytest.raises(InputError, match=r"list.csv, line 3: no uri: fill it in"):
        open_images(f"{tmp_path}/list.csv", "", 256)
