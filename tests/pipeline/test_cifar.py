import pickle
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cifar import CIFAR10_NAMES, TEST_ID_START, Cifar
from pipeline.dataset import Dataset, Examples, InputError
from pipeline.noise import CIFAR10_CONFUSIONS, Noise
from pipeline.views import CifarViews

REAL = Path(__file__).parents[3] / "shared" / "data"
TRAIN, TEST = 200, 20  # images


class Python2Pickler(pickle._Pickler):  # type: ignore[misc]
    """Writes what the CIFAR files hold: Python 2 strings, and the names of an old numpy."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + len(raw).to_bytes(4, "little") + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def pickled(content: object) -> bytes:
    buffer = BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


def made(classes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.permutation(np.arange(count) % classes), rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def batch(label: np.ndarray, image_NHWC: np.ndarray, key: str) -> bytes:
    rows = np.ascontiguousarray(image_NHWC.transpose(0, 3, 1, 2)).reshape(len(label), -1)
    return pickled({"data": rows, key: label.tolist(), "batch_label": "made"})


def write_torchvision(folder: str, classes: int = 10) -> str:
    train, test = made(classes, 20 * classes, 1), made(classes, TEST, 2)
    if classes == 10:
        inner = f"{folder}/cifar-10-batches-py"
        parts = [
            (f"data_batch_{i + 1}", train[0][rows], train[1][rows])
            for i, rows in enumerate(np.split(np.arange(TRAIN), 5))
        ]
        files = {name: batch(label, image, "labels") for name, label, image in [*parts, ("test_batch", *test)]}
    else:
        inner = f"{folder}/cifar-100-python"
        files = {name: batch(*split, "fine_labels") for name, split in (("train", train), ("test", test))}
        files["meta"] = pickled({"fine_label_names": [f"thing {k}" for k in range(100)]})
    for name, data in files.items():
        with fsspec.open(f"{inner}/{name}", "wb", auto_mkdir=True) as file:
            file.write(data)
    return inner


def write_parquet(folder: Path, classes: int = 10) -> None:
    folder.mkdir(exist_ok=True)
    for name, (label, image_NHWC) in (("train", made(classes, 20 * classes, 1)), ("test", made(classes, TEST, 2))):
        encoded = [cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() for image in image_NHWC]
        if classes == 10:
            table = pa.table({"index": range(len(label)), "label": pa.array(label, pa.int16()), "image_png": encoded})
        else:  # as Hugging Face stores it
            images = [{"bytes": data, "path": None} for data in encoded]
            table = pa.table({"img": images, "fine_label": label, "coarse_label": label // 5})
        pq.write_table(table, folder / f"cifar{classes}_{name}.parquet", row_group_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cifar")
    write_torchvision(str(path))
    return path


def assert_same(first: Examples, second: Examples) -> None:
    for ours, theirs in zip(vars(first).values(), vars(second).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("classes", [10, 100])
def test_both_layouts_give_the_same_data_set(tmp_path, classes):
    inner = write_torchvision(str(tmp_path / "pickles"), classes)
    write_parquet(tmp_path / "parquet", classes)
    # files of other data sets beside it are left alone
    for stranger in ("flowers_train.parquet", f"cifar{110 - classes}_train.parquet"):
        pq.write_table(pa.table({"label": [0], "image": [b"x"]}), tmp_path / "parquet" / stranger)
    cifar = Cifar(classes, Noise("uniform", 0.5), probe_per_class=2, size=16)
    outer, parquet = cifar.load(str(tmp_path / "pickles"), 0), cifar.load(str(tmp_path / "parquet"), 0)
    for data in (cifar.load(inner, 0), parquet):
        assert_same(outer.train, data.train)
        assert_same(outer.probe, data.probe)
        assert_same(outer.tests["test"], data.tests["test"])
    assert outer.class_names == (CIFAR10_NAMES if classes == 10 else tuple(f"thing {k}" for k in range(100)))
    assert parquet.class_names[-1] == ("truck" if classes == 10 else "class 99")


def test_images_labels_and_ids_keep_the_order_of_the_files(folder):
    data = Cifar(probe_per_class=1).load(str(folder), 0)
    label, image = made(10, TRAIN, 1)
    for examples in (data.train, data.probe):
        np.testing.assert_array_equal(examples.image_N, image[examples.id_N])
        np.testing.assert_array_equal(examples.label_N, label[examples.id_N])
        assert examples.id_N.dtype == examples.label_N.dtype == np.int64
    np.testing.assert_array_equal(data.tests["test"].id_N, TEST_ID_START + np.arange(TEST))
    np.testing.assert_array_equal(data.tests["test"].image_N, made(10, TEST, 2)[1])
    assert data.notes == ("noise: none 0.00 asked, 0.0 % of labels really wrong",)
    assert data.noise_rate == 0


def noises(tmp_path: Path) -> list[Noise]:
    np.save(tmp_path / "noisy.npy", (made(10, TRAIN, 1)[0] + np.arange(TRAIN) % 2) % 10)
    write_parquet(tmp_path)
    return [
        Noise("uniform", 0.8),
        Noise("asymmetric", 0.4),
        Noise("labels", source=str(tmp_path / "noisy.npy")),
        Noise("open_set", 0.25, str(tmp_path / "cifar10_test.parquet")),
    ]


def test_noise_leaves_the_probe_and_test_clean_and_unchanged(folder, tmp_path):
    clean = Cifar(probe_per_class=3).load(str(folder), 5)
    assert np.bincount(clean.probe.label_N).tolist() == [3] * 10
    assert len(clean.train) == TRAIN - 30
    for noise in noises(tmp_path):
        noisy = Cifar(noise=noise, probe_per_class=3).load(str(folder), 5)
        assert_same(noisy.probe, clean.probe)
        assert_same(noisy.tests["test"], clean.tests["test"])
        np.testing.assert_array_equal(noisy.train.id_N, clean.train.id_N)
        assert noisy.noise_rate


def test_each_kind_of_noise_does_what_it_says(folder, tmp_path):
    uniform, asymmetric, labels, open_set = (
        Cifar(noise=noise, probe_per_class=3).load(str(folder), 5) for noise in noises(tmp_path)
    )
    assert uniform.noise_rate == pytest.approx(0.72, abs=0.14)
    assert "uniform 0.80 asked" in uniform.notes[0]
    assert asymmetric.train.true_label_N is not None
    wrong = asymmetric.train.label_N != asymmetric.train.true_label_N
    assert set(asymmetric.train.true_label_N[wrong]) <= set(CIFAR10_CONFUSIONS)
    np.testing.assert_array_equal(labels.train.label_N != labels.train.true_label_N, labels.train.id_N % 2 == 1)
    # an image from elsewhere keeps its label, which is truly of no class
    assert open_set.train.true_label_N is not None
    replaced = open_set.train.true_label_N == -1
    assert replaced.sum() == round(0.25 * len(replaced))
    label, image = made(10, TRAIN, 1)
    np.testing.assert_array_equal(open_set.train.label_N, label[open_set.train.id_N])
    np.testing.assert_array_equal((open_set.train.image_N != image[open_set.train.id_N]).any((1, 2, 3)), replaced)


def test_seed_keys_every_draw(folder):
    cifar = Cifar(noise=Noise("uniform", 0.5), probe_per_class=3, limit=50)
    first, again, other = (cifar.load(str(folder), seed) for seed in (0, 0, 1))
    assert_same(first.train, again.train)
    assert_same(first.probe, again.probe)
    assert set(first.probe.id_N) != set(other.probe.id_N)
    assert set(first.train.id_N) != set(other.train.id_N)


@pytest.mark.parametrize("limit", [20, 47])
def test_limit_is_balanced_by_true_class_beside_the_probe(folder, limit):
    whole = Cifar(probe_per_class=3).load(str(folder), 0)
    data = Cifar(noise=Noise("uniform", 0.5), probe_per_class=3, limit=limit).load(str(folder), 0)
    assert_same(data.probe, whole.probe)
    assert len(data.train) == limit
    assert set(np.bincount(data.train.true_label_N, minlength=10)) <= {limit // 10, -(-limit // 10)}


def test_size_resizes_by_area(folder):
    small = Cifar(probe_per_class=3, size=16).load(str(folder), 0)
    image = made(10, TRAIN, 1)[1][small.train.id_N].astype(float)
    means = image.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(small.train.image_N - means).max() <= 0.5


def test_any_fsspec_url_works():
    write_torchvision("memory://bucket/cifar")
    data = Cifar(probe_per_class=3).load("memory://bucket/cifar", 0)
    assert len(data.train) == TRAIN - 30


def test_views_follow_the_policy():
    assert Cifar(policy="random").views == CifarViews("random")


class Attack:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": Attack()}), "is refused: it wants to run builtins.print"),
        (b"cos\nsystem\n(S'false'\ntR.", "is refused: it wants to run os.system"),
        (batch(*made(10, 40, 1), "labels")[:5000], "is damaged"),
        (b"", "is damaged"),
        (pickled([1]), "is not a CIFAR file"),
        (pickled({"labels": [1]}), "does not hold labels"),
        (pickled({"data": np.zeros((2, 9), np.uint8), "labels": [1, 2]}), "does not hold labels"),
        (pickled({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 99]}), "has labels 0…99: set classes"),
        (None, "no such file: .*data_batch_3"),
    ],
)
def test_bad_pickles_are_refused_in_one_line(tmp_path, capfd, content, message):
    path = Path(write_torchvision(str(tmp_path))) / "data_batch_3"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        Cifar(probe_per_class=1).load(str(tmp_path), 0)
    assert "\n" not in str(error.value)
    assert "never" not in capfd.readouterr().out


def parquet_table(**columns: object) -> pa.Table:
    whole: dict[str, object] = {"label": np.arange(40) % 10, "image": [b"no image"] * 40}
    return pa.table({name: column for name, column in (whole | columns).items() if column is not None})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (parquet_table(), "image [0-9]+ of .*train.parquet cannot be decoded"),
        (parquet_table(image=[None] * 40), "0 columns of encoded images"),
        (parquet_table(image=pa.array([None] * 40, pa.binary())), "cannot be decoded"),
        (parquet_table(mask=[b"x"] * 40), "2 columns of encoded images"),
        (parquet_table(label=None), "no column label or fine_label"),
        (parquet_table(label=[None] + [1] * 39), "whole numbers without gaps"),
        (parquet_table(label=["cat"] * 40), "whole numbers without gaps"),
        (None, "no readable Parquet file"),
    ],
)
def test_bad_parquet_is_refused_in_one_line(tmp_path, table, message):
    write_parquet(tmp_path)
    path = tmp_path / "cifar10_train.parquet"
    if table is None:
        path.write_bytes(b"not Parquet")
    else:
        pq.write_table(table, path)
    with pytest.raises(InputError, match=message) as error:
        Cifar(probe_per_class=1).load(str(tmp_path), 0)
    assert "\n" not in str(error.value)


def test_missing_places_are_named(tmp_path, folder):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for url, message in (
        (tmp_path / "absent", "no such folder: .*absent: check the path"),
        (tmp_path / "file", "is a file: give the folder"),
        (tmp_path / "empty", r"no CIFAR-10 in .*: it needs cifar-10-batches-py/, unpacked, or \*train\*\.parquet"),
        ("nowhere://x", "cannot open nowhere://x"),
    ):
        with pytest.raises(InputError, match=message):
            Cifar().load(str(url), 0)
    with pytest.raises(InputError, match="no CIFAR-100 in"):
        Cifar(100).load(str(folder), 0)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros(TRAIN - 1, int), "has 199 labels for 200 training images"),
        (np.full(TRAIN, 10), "has label 10 in row 0, outside 0…9"),
    ],
)
def test_label_arrays_must_fit_the_training_set(folder, tmp_path, label, message):
    np.save(tmp_path / "noisy.npy", label)
    with pytest.raises(InputError, match=message):
        Cifar(noise=Noise("labels", source=str(tmp_path / "noisy.npy")), probe_per_class=3).load(str(folder), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4}, "size is 4 px: give 8 to 32"),
        ({"size": 64}, "size is 64 px"),
        ({"limit": -1}, "limit is -1"),
        ({"classes": 100, "noise": Noise("asymmetric", 0.4)}, "defined for CIFAR-10 only"),
    ],
)
def test_contradicting_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        replace(Cifar(), **fields)


def test_a_limit_beyond_the_data_is_refused(folder):
    with pytest.raises(
        InputError, match=re.escape("limit 190 needs 19 images of class 0, which has 17 beside the probe")
    ):
        Cifar(probe_per_class=3, limit=190).load(str(folder), 0)


@pytest.mark.skipif(not (REAL / "cifar10_train.parquet").exists(), reason=f"no real CIFAR-10 at {REAL}")
def test_real_human_labels_are_as_wrong_as_published():
    noise = Noise("labels", source=f"{REAL}/cifar10_labels.npz:cifar10n_worse_label")
    data: Dataset = Cifar(noise=noise, size=8).load(str(REAL), 0)
    assert len(data.train) == 49_900
    assert len(data.tests["test"]) == 10_000
    # 40.21 % of all 50,000: the 100 probe images are not among these
    assert data.noise_rate == pytest.approx(0.4021, abs=0.002)
