"""Writers of tiny but exact copies of the raw data sets, on any fsspec URL, as folders or as the archives they come in.

Each returns what it wrote: split -> key -> (label, JPEG bytes).
"""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import fsspec
import numpy as np
import pyarrow as pa

Written = dict[str, dict[str, tuple[int, bytes]]]
Images = Sequence[Sequence[bytes]]  # JPEGs of each class


def photos(classes: int, per_class: int, size: int = 32) -> list[list[bytes]]:
    """Smooth random JPEGs, all different."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (classes, per_class, 4, 4, 3), dtype=np.uint8)
    return [[jpeg(cv2.resize(image, (size, size))) for image in of_class] for of_class in coarse]


def scenes(count: int, size: int = 160, seed: int = 0) -> list[np.ndarray]:
    """Pictures with coarse and fine detail, as photographs have it: H×W×C uint8, all different."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        octaves = [cv2.resize(rng.normal(0, 90 / cells, (cells, cells, 3)), (size, size)) for cells in (3, 6, 12, 24)]
        made.append(np.clip(128 + 4 * np.sum(octaves, axis=0), 0, 255).astype(np.uint8))
    return made


def jpeg(image_HWC: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image_HWC)[1].tobytes()


def write(root: str, files: Mapping[str, bytes]) -> None:
    """Files by name below `root`."""
    fs, path = fsspec.core.url_to_fs(str(root))
    for name, data in files.items():
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}/{name}", data)


def content(row: Mapping[str, Any]) -> bytes:
    """The bytes of the image of one row of a listing's table."""
    fs, path = fsspec.core.url_to_fs(row["file"])
    if row["how"] == "file":
        return fs.cat_file(path)
    data = fs.cat_file(path, start=row["start"], end=row["start"] + row["size"])
    return zlib.decompress(data, -zlib.MAX_WBITS) if row["how"] == "deflated" else data


def assert_same(table: pa.Table, written: Written) -> None:
    """Every row is an image that was written, with its label, and none is left out."""
    rows = table.to_pylist()
    found = {(row["split"], row["key"]): (row["label"], content(row)) for row in rows}
    assert found == {(split, key): one for split, part in written.items() for key, one in part.items()}
    assert len(found) == len(rows) == len(set(table["id"].to_pylist()))


def text(lines: Sequence[str], end: str = "\n") -> bytes:
    return "".join(f"{line}{end}" for line in lines).encode()


def tar(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip whose JPEGs are stored or deflated in turn."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for row, (name, data) in enumerate(files.items()):
            archive.writestr(name, data, zipfile.ZIP_STORED if row % 2 else zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def bytes_of(part: Mapping[str, tuple[int, bytes]], lead: str = "", end: str = "") -> dict[str, bytes]:
    return {f"{lead}{key}{end}": data for key, (_, data) in part.items()}


def labels_of(part: Mapping[str, tuple[int, bytes]], separator: str = " ") -> list[str]:
    return [f"{key}{separator}{label}" for key, (label, _) in part.items()]


def write_webvision(
    root: str, images: Images | None = None, *, archives: bool = False, synsets: Sequence[str] | None = None
) -> Written:
    """WebVision at root/webvision and ImageNet at root/imagenet; of each class's images (6 or more) the first is val's,
    one is ImageNet's validation, two its training, one Flickr's and the rest Google's.

    Splits are train (Google), flickr, val, probe (ImageNet's training set) and imagenet (its validation set).
    """
    images = images or photos(3, 8)
    synsets = synsets or [f"n{1440764 + 1000 * k:08} thing {k}, Res {k}" for k in range(len(images))]
    wnids = [line.partition(" ")[0] for line in synsets]
    written: Written = {split: {} for split in ("train", "flickr", "val", "probe", "imagenet")}
    for k, (first, second, third, fourth, fifth, *rest) in enumerate(images):
        written["val"][f"val{len(written['val']) + 1:06}.jpg"] = k, first
        written["imagenet"][f"val/ILSVRC2012_val_{len(written['imagenet']) + 1:08}.JPEG"] = k, second
        for number, data in enumerate((third, fourth)):
            written["probe"][f"train/{wnids[k]}/{wnids[k]}_{10 * k + number}.JPEG"] = k, data
        written["flickr"][f"flickr/q{k + 1:04}/{k}.jpg"] = k, fifth
        for number, data in enumerate(rest):
            written["train"][f"google/q{k + 1:04}/{'x' * number}_-{k}.jpg"] = k, data
    info = {
        "synsets.txt": text(synsets),
        "train_filelist_google.txt": text(labels_of(written["train"])),
        "train_filelist_flickr.txt": text(labels_of(written["flickr"])),
        "val_filelist.txt": text(labels_of(written["val"])),
    }
    google, flickr = bytes_of(written["train"]), bytes_of(written["flickr"])
    val = bytes_of(written["val"], "val_images_256/")
    train = bytes_of(written["probe"])
    if archives:
        write(
            f"{root}/webvision",
            {
                "info.tar.gz": tar(below("info", info), "w:gz"),
                "google_resized_256.tar": tar(google),
                "flickr_resized_256.tar": tar(flickr),
                "val_images_256.tar": tar(val),
            },
        )
        of_class = {
            f"{wnid}.tar": tar({name.rpartition("/")[2]: data for name, data in train.items() if wnid in name})
            for wnid in wnids
        }
        flat = {key.removeprefix("val/"): one for key, one in written["imagenet"].items()}
        write(
            f"{root}/imagenet",
            {
                "ILSVRC2012_img_train.tar": tar(of_class),
                "ILSVRC2012_img_val.tar": tar(bytes_of(flat)),
                "val.txt": text(labels_of(flat)),
            },
        )
    else:
        write(f"{root}/webvision", {**below("info", info), **google, **flickr, **val})
        by_class = {f"val/{wnids[k]}/{key[4:]}": data for key, (k, data) in written["imagenet"].items()}
        write(f"{root}/imagenet", {**train, **by_class})
    return written


def write_clothing1m(
    root: str, images: Images | None = None, *, archives: bool = False, keys: Sequence[str] | None = None
) -> Written:
    """Clothing1M at `root`, with as many of its 14 classes as `images` has; of each class's images (4 or more) one each
    is val, test and probe, the rest train, every third of these with the label of the next class.
    """
    images = images or photos(14, 6)
    names = "T-Shirt Shirt Knitwear Chiffon Sweater Hoodie Windbreaker Jacket Downcoat Suit Shawl Dress Vest Underwear"
    written: Written = {split: {} for split in ("train", "probe", "val", "test")}
    number = 0
    for k, (first, second, third, *rest) in enumerate(images):
        for row, data in enumerate((first, second, third, *rest)):
            split = ("val", "test", "probe")[row] if row < 3 else "train"
            label = (k + 1) % len(images) if split == "train" and row % 3 == 0 else k
            folder = f"{number % 10}/{number % 10}{number // 10 % 10}"
            key = keys[number] if keys else f"images/{folder}/{1000 + number},{7 * number}.jpg"
            written[split][key] = label, data
            number += 1
    clean = {**written["probe"], **written["val"], **written["test"]}
    lists = {
        "category_names_eng.txt": "\n".join(names.split()[: len(images)]).encode(),  # no last line end, as the real one
        "noisy_train_key_list.txt": text(list(written["train"])),
        "noisy_label_kv.txt": text(labels_of(written["train"])),
        "clean_train_key_list.txt": text(list(written["probe"])),
        "clean_val_key_list.txt": text(list(written["val"])),
        "clean_test_key_list.txt": text(list(written["test"])),
        "clean_label_kv.txt": text(labels_of(clean)),
    }
    files = bytes_of(written["train"]) | bytes_of(clean)
    if archives:
        tars = {
            f"images/{d}.tar": tar({key[7:]: data for key, data in files.items() if key.startswith(f"images/{d}/")})
            for d in range(10)
        }
        write(root, {**below("annotations", lists), **tars})
    else:
        write(root, {**lists, **files})
    return written


def write_food101n(root: str, images: Images | None = None, *, archives: bool = False) -> Written:
    """Food-101N at root/food101n, Food-101 at root/food101; of each class's images (7 or more) the first is Food-101's
    test, two are verified as right for training and one for val, one of each as wrong; the list has all but the first.
    """
    images = images or photos(3, 9)
    names = [f"dish_{k:03}" for k in range(len(images))]
    written: Written = {split: {} for split in ("train", "probe", "val", "test")}
    checked: dict[str, list[str]] = {"train": [], "val": []}
    for k, (first, *rest) in enumerate(images):
        written["test"][f"{names[k]}/{100 + k}"] = k, first
        for row, data in enumerate(rest):
            key = f"{names[k]}/{k:02}{row:030x}.jpg"
            split = ("probe", "probe", "val")[row] if row < 3 else "train"
            written[split][key] = k, data
            if row < 5:
                checked["val" if row in (2, 4) else "train"].append(f"{key}\t{int(row < 3)}")
    files = bytes_of(written["train"]) | bytes_of(written["probe"]) | bytes_of(written["val"])
    release = {
        "meta/classes.txt": text(["class_name", *names]),
        "meta/imagelist.tsv": text(["class_name/key", *sorted(files)]),
        "meta/verified_train.tsv": text(["class_name/key\tverification_label", *checked["train"]]),
        "meta/verified_val.tsv": text(["class_name/key\tverification_label", *checked["val"]]),
        **below("images", files),
    }
    food101 = {
        "meta/test.txt": text(list(written["test"])),
        "meta/classes.txt": text(names),
        **bytes_of(written["test"], "images/", ".jpg"),
    }
    if archives:
        write(f"{root}/food101n", {"Food-101N_release.zip": zipped(below("Food-101N_release", release))})
        write(f"{root}/food101", {"food-101.tar.gz": tar(below("food-101", food101), "w:gz")})
    else:
        write(f"{root}/food101n", release)
        write(f"{root}/food101", food101)
    return written
