import io
import os
import re
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import archive, storage
from pipeline.dataset import InputError
from pipeline.tree import MISSING, Tree
from tests.pipeline.layouts import below, tar, write, zipped

JPEGS = {f"google/q{row % 3:04}/{row}.jpg": bytes([row]) * (row + 1) for row in range(20)}


def content(place: tuple) -> bytes:
    url, start, size, how = place
    fs, path = storage.connect(url)
    data = fs.cat_file(path) if how == "file" else fs.cat_file(path, start=start, end=start + size)
    return zlib.decompress(data, -zlib.MAX_WBITS) if how == "deflated" else data


def assert_holds(tree: Tree, files: dict[str, bytes]) -> None:
    assert [content(place) for place in tree.places(list(files))] == list(files.values())


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize(
    ("name", "lead", "key"),
    [
        ("google_resized_256", "google/", "google/"),  # names as listed
        ("val_images_256", "val_images_256/", ""),  # a folder more
        ("Food-101N_release", "./Food-101N_release/images/", "images/"),
        ("all", "home/me/data/images/", "images/"),  # three folders more
        ("images/0", "0/00/", "images/0/00/"),  # unpacked in its folder
        ("images/0", "00/", "images/0/00/"),  # unpacked in a folder of its name
        ("images/0", "images/0/00/", "images/0/00/"),
        ("train", "", "train/"),
    ],
)
def test_whatever_leading_folders_the_packer_chose_keys_find_their_members(tmp_path, pack, name, lead, key):
    files = {f"{number}.jpg": bytes([number]) * (number + 1) for number in range(20)}
    suffix = "zip" if pack is zipped else "tar"
    write(str(tmp_path), {f"{name}.{suffix}": pack({f"{lead}{file}": data for file, data in files.items()})})
    tree = Tree.open(str(tmp_path))
    assert_holds(tree, {f"{key}{file}": data for file, data in files.items()})
    plain = tree.places([f"{key}absent.jpg"])
    assert plain == [(f"{tmp_path}/{key}absent.jpg", 0, -1, "file")]  # shows when it is read
    if "/" not in name:
        alone = Tree.open(f"{tmp_path}/{name}.{suffix}")
        assert_holds(alone, {f"{key}{file}": data for file, data in files.items()})
        assert alone.places([f"{key}absent.jpg"]) == [MISSING]


def test_few_wanted_members_among_many_still_tell_the_mapping(tmp_path):
    files = {f"x/google/{number}.jpg": b"%d" % number for number in range(3000)}
    write(str(tmp_path), {"some.tar": tar(files)})
    assert_holds(Tree.open(str(tmp_path)), {"google/1234.jpg": b"1234"})


def test_tars_in_a_tar_are_read_through(tmp_path):
    classes = [f"n{number:08}" for number in range(5)]
    inner = {
        f"{name}.tar": tar({f"{name}_{row}.JPEG": f"{name}{row}".encode() for row in range(3)}) for name in classes
    }
    write(str(tmp_path), {"ILSVRC2012_img_train.tar": tar(inner)})
    tree = Tree.open(str(tmp_path))
    names = [f"{name}/{name}_{row}.JPEG" for name in classes for row in range(3)]
    assert list(tree.images()) == names
    assert list(tree.images(classes[2])) == names[6:9]
    assert_holds(tree, {name: name.split("/")[1][:-5].replace("_", "").encode() for name in names})


def test_tars_with_equal_names_keep_to_folders_of_their_own(tmp_path):
    write(str(tmp_path), {f"{name}.tar": tar({"1.jpg": name.encode()}) for name in ("cat", "dog")})
    tree = Tree.open(str(tmp_path))
    assert list(tree.images()) == ["cat/1.jpg", "dog/1.jpg"]
    assert_holds(tree, {"cat/1.jpg": b"cat", "dog/1.jpg": b"dog"})


def test_a_name_that_comes_twice_means_the_last_as_when_unpacked(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as whole:
        for data in (b"old", b"newer"):
            member = tarfile.TarInfo("a/1.jpg")
            member.size = len(data)
            whole.addfile(member, io.BytesIO(data))
    write(str(tmp_path), {"some.tar": buffer.getvalue()})
    assert_holds(Tree.open(str(tmp_path)), {"a/1.jpg": b"newer"})


NAMES = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(names=st.sets(NAMES.filter(lambda name: name not in (".", "..", "._")), min_size=1, max_size=8))
def test_any_name_in_any_archive_comes_back(names):
    files = {f"images/{name}.jpg": name.encode() for name in names if not name.startswith("._")}
    for name, pack in (("names.tar", tar), ("names.zip", zipped)):
        write("memory://names", {name: pack(files)})
        tree = Tree.open(f"memory://names/{name}")
        assert sorted(tree.images()) == sorted(files)
        assert_holds(tree, files)


def test_members_that_could_lead_elsewhere_are_never_used(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as whole:
        for name in (
            "../up.jpg",
            "../up.tar",
            "a/../../up.jpg",
            "/etc/abs.jpg",
            "C:/win.jpg",
            "..\\up.jpg",
            "good/1.jpg",
        ):
            member = tarfile.TarInfo(name)
            whole.addfile(member)
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("null.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            whole.addfile(member)
        member = tarfile.TarInfo("caf\udce9.jpg")
        whole.addfile(member)
    link = zipfile.ZipInfo("zip/soft.jpg")
    link.external_attr = 0o120777 << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as whole_zip:
        whole_zip.writestr("../up.jpg", b"x")
        whole_zip.writestr(link, b"/etc/passwd")
        whole_zip.writestr("zip/secret.jpg", b"x")
        whole_zip.writestr("zip/odd.jpg", b"x", zipfile.ZIP_LZMA)
        whole_zip.writestr("zip/1.jpg", b"x")
    raw = bytearray(packed.getvalue())
    raw[raw.rindex(b"zip/secret.jpg") - 46 + 8] |= 1  # the directory says that it is encrypted
    write(str(tmp_path), {"a.tar": buffer.getvalue(), "b.zip": bytes(raw)})
    tree = Tree.open(str(tmp_path))
    assert list(tree.images()) == ["good/1.jpg", "zip/1.jpg"]
    assert dict(tree.unsafe) == {
        "a.tar: '../up.jpg'": "its name leaves the folder",
        "a.tar: '../up.tar'": "its name leaves the folder",
        "a.tar: 'a/../../up.jpg'": "its name leaves the folder",
        "a.tar: '/etc/abs.jpg'": "its name is absolute",
        "a.tar: 'C:/win.jpg'": "its name is absolute",
        "a.tar: '..\\\\up.jpg'": "its name leaves the folder",
        "a.tar: 'caf\\udce9.jpg'": "its name is not UTF-8",
        "a.tar: 'soft.jpg'": "it is a link, a device or sparse",
        "a.tar: 'hard.jpg'": "it is a link, a device or sparse",
        "a.tar: 'null.jpg'": "it is a link, a device or sparse",
        "b.zip: '../up.jpg'": "its name leaves the folder",
        "b.zip: 'zip/soft.jpg'": "it is a link",
        "b.zip: 'zip/secret.jpg'": "it is encrypted",
        "b.zip: 'zip/odd.jpg'": "its compression 14 is not read here",
    }


def outcome(name: str, data: bytes) -> list[str] | None:
    """The images that an archive of these bytes gives, or None where it is refused in one line."""
    write("memory://damaged", {name: data})
    try:
        return list(Tree.open(f"memory://damaged/{name}").images())
    except InputError as error:
        message = str(error)
    assert re.fullmatch(rf"memory://damaged/{name} is damaged \(.+\): copy it again", message)
    return None


@given(data=st.data())
def test_a_cut_off_archive_is_refused(data):
    for name, whole in (("a.tar", tar(JPEGS)), ("a.zip", zipped(JPEGS)), ("o.tar", tar({"i.tar": tar(JPEGS)}))):
        size = data.draw(st.integers(0, len(whole) - 1))
        found = outcome(name, whole[:size])
        # of a tar only the padding behind its end mark may be missing
        assert found is None or (name != "a.zip" and len(found) == 20 and not any(whole[size:]))


@given(size=st.integers(0, len(tar(JPEGS))))
def test_a_cut_off_tar_in_a_whole_one_is_refused(size):
    inner = tar(JPEGS)
    found = outcome("o.tar", tar({"i.tar": inner[:size], "j.tar": inner}))  # what comes next looks like more of it
    assert found is None or (len(found) == 40 and not any(inner[size:]))


def test_a_zip_s_own_notes_on_a_member_are_skipped(tmp_path):
    member = zipfile.ZipInfo("a/1.jpg")
    member.extra = b"UT\5\0\1abcd"  # the time, as zip programs write it
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as whole:
        whole.writestr(member, b"image")
    write(str(tmp_path), {"a.zip": packed.getvalue()})
    assert_holds(Tree.open(str(tmp_path)), {"a/1.jpg": b"image"})


@given(data=st.data())
def test_damaged_bytes_are_refused_or_lead_to_nothing_outside(data):
    for name, whole in (("a.tar", tar(JPEGS)), ("a.zip", zipped(JPEGS))):
        mixed = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            mixed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        found = outcome(name, bytes(mixed))
        assert found is None or len(found) <= 20


@pytest.mark.parametrize(
    ("name", "data"), [("a.tar", b""), ("a.zip", b""), ("a.tar", b"x" * 2000), ("a.tgz", b"x" * 99)]
)
def test_files_that_are_no_archives_are_refused(name, data):
    assert outcome(name, data) is None


def test_a_tar_whose_member_is_larger_than_itself_is_refused():
    member = tarfile.TarInfo("a/1.jpg")
    member.size = 10**6
    assert outcome("a.tar", member.tobuf() + bytes(2000)) is None
    negative = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 12  # −1 in base 256
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative[:512])
    assert outcome("a.tar", bytes(negative) + bytes(2000)) is None


def test_headers_close_together_cost_few_requests(monkeypatch):
    write("memory://many", {"a.tar": tar({f"a/{row}.jpg": bytes(3000) for row in range(1000)})})
    write("memory://far", {"o.tar": tar({f"{row}.tar": tar({"1.jpg": bytes(10**6)}) for row in range(5)})})
    read, sizes = storage.read, []
    monkeypatch.setattr(archive.storage, "read", lambda *args: sizes.append(args[3] - args[2]) or read(*args))
    assert len(list(Tree.open("memory://many").images())) == 1000
    assert len(sizes) < 10  # of 3.6 MB
    sizes.clear()
    assert len(list(Tree.open("memory://far").images())) == 5
    assert sum(sizes) < 2 * 10**6  # of 5 MB


# ---- compressed tars -------------------------------------------------------------------------------------------------


def test_compressed_lists_are_read_into_memory(tmp_path):
    write(str(tmp_path), {"info.tar.gz": tar({"info/synsets.txt": b"one", "../up.txt": b"two"}, "w:gz")})
    for url in (str(tmp_path), f"{tmp_path}/info.tar.gz"):
        tree = Tree.open(url)
        assert tree.read("info/synsets.txt") == tree.read("synsets.txt") == b"one"
        assert tree.unsafe == [("info.tar.gz: '../up.txt'", "its name leaves the folder")]
        assert not tree.exists("up.txt")


def test_a_compressed_tar_of_images_wants_to_be_decompressed(tmp_path, monkeypatch):
    write(str(tmp_path), {"images.tgz": tar(JPEGS, "w:gz"), "lists.tgz": tar({"a.txt": b"x"}, "w:gz")})
    assert [line.partition(": ")[0] for line in Tree.open(str(tmp_path)).unread] == [
        f"{tmp_path}/images.tgz is compressed as a whole, so that no image in it can be read alone"
    ]
    with pytest.raises(InputError, match=r"decompress it once \(gzip -d"):
        Tree.open(f"{tmp_path}/images.tgz")
    monkeypatch.setattr(archive, "SMALL", 10)
    with pytest.raises(InputError, match="decompress it once"):
        Tree.open(f"{tmp_path}/lists.tgz")


@pytest.mark.parametrize("place", ["local", "cloud"])
def test_a_compressed_tar_is_decompressed_once(tmp_path, place, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(tmp_path) if place == "local" else request.getfixturevalue("bucket") + "/data"
    url, spool = f"{root}/food-101.tar.gz", f"{root}/spool/here"
    write(root, {"food-101.tar.gz": tar(JPEGS, "w:gz")})
    assert_holds(Tree.open(url, spool=spool), JPEGS)
    fs, path = storage.connect(f"{spool}/food-101.tar")
    before = fs.info(path)
    again = Tree.open(url, spool="spool/here" if place == "local" else spool)
    assert_holds(again, JPEGS)
    assert [one.url for one in again.archives] == [f"{spool}/food-101.tar"]  # absolute
    assert fs.info(path) == before
    here = sorted(fs.find(path.rpartition("/")[0]))
    assert [name.rpartition("/")[2] for name in here] == ["food-101.tar", "food-101.tar.json"]
    changed = {**JPEGS, "google/q0000/new.jpg": os.urandom(2000)}
    write(root, {"food-101.tar.gz": tar(changed, "w:gz")})  # another file of that name
    assert_holds(Tree.open(url, spool=spool), changed)


@pytest.mark.parametrize("place", ["local", "cloud"])
def test_a_cut_off_compressed_tar_leaves_nothing_behind(tmp_path, place, request):
    root = str(tmp_path) if place == "local" else request.getfixturevalue("bucket") + "/data"
    packed = tar({f"a/{row}.jpg": os.urandom(1000) for row in range(50)}, "w:gz")
    write(root, {"food-101.tar.gz": packed[:-5000]})
    with pytest.raises(InputError, match=r"food-101.tar.gz is damaged .*: copy it again"):
        Tree.open(f"{root}/food-101.tar.gz", spool=f"{root}/spool")
    fs, path = storage.connect(root)
    assert [name.rpartition("/")[2] for name in fs.find(path)] == ["food-101.tar.gz"]


# ---- names -----------------------------------------------------------------------------------------------------------


def test_lists_are_read_from_the_folder_then_from_archives(tmp_path):
    lists = {"data/meta/a.txt": b"packed a", "data/meta/b.txt": b"packed b" * 99, "b.txt.old": b"x"}
    write(str(tmp_path), {"meta/a.txt": b"plain a", "data.zip": zipped(lists), "meta/more.tar": tar({"m/c.txt": b"c"})})
    tree = Tree.open(str(tmp_path))
    assert tree.read("meta/a.txt") == b"plain a"
    assert tree.read("meta/b.txt") == tree.read("b.txt") == b"packed b" * 99
    assert tree.read("c.txt") == b"c"
    assert [tree.exists(name) for name in ("meta/a.txt", "meta", "b.txt", "eta/b.txt", "txt")] == [
        *[True] * 3,
        False,
        False,
    ]
    with pytest.raises(FileNotFoundError, match=r"has no none.txt"):
        tree.read("none.txt")


def test_a_list_that_grows_without_end_is_refused(tmp_path, monkeypatch):
    write(str(tmp_path), {"data.zip": zipped({"a.txt": bytes(10**6)})})
    monkeypatch.setattr("pipeline.tree.LIST_LIMIT", 10**5)
    with pytest.raises(InputError, match=r"a.txt in .*data.zip is cut off or larger than"):
        Tree.open(str(tmp_path)).read("a.txt")


def test_images_are_found_in_folders_and_archives(tmp_path):
    plain = ["a.jpg", "b/c.JPEG", "b/d/e, f.png", "b/d/g.Webp", "z/é '\".gif", "z/y.bmp", "z/x.tif", "z/w.TIFF"]
    others = ["a.txt", "b/._c.jpg", "z/jpg", "z/a.jpg.txt"]
    files = dict.fromkeys((*plain, *others), b"x")
    write(str(tmp_path), {**files, "b/more.tar": tar({"in/1.jpg": b"", "in/._1.jpg": b"", "1.txt": b""})})
    os.symlink(tmp_path / "z", tmp_path / "b" / "linked")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "b" / "broken")
    tree = Tree.open(str(tmp_path))
    linked = [f"b/linked/{name[2:]}" for name in plain if name.startswith("z/")]
    assert sorted(tree.images()) == sorted([*plain, *linked, "b/in/1.jpg"])
    assert sorted(tree.images("b/d", "b/in", "none")) == ["b/d/e, f.png", "b/d/g.Webp", "b/in/1.jpg"]
    assert sorted(Tree.open(f"{tmp_path}/b/more.tar").images()) == ["in/1.jpg"]
    assert_holds(tree, dict.fromkeys(plain, b"x"))
    os.symlink("x", os.fsencode(f"{tmp_path}/z/caf") + b"\xe9.jpg")
    Path(os.fsdecode(os.fsencode(f"{tmp_path}/z/caf") + b"\xe8.jpg")).write_bytes(b"x")
    assert "z/caf" not in "".join(tree.images())
    assert ("'z/caf\\udce8.jpg'", "its name is not UTF-8") in tree.unsafe


def test_of_several_folders_the_one_that_has_images_counts(tmp_path):
    write(str(tmp_path), {"val_images/2.jpg": b"x"})
    tree = Tree.open(str(tmp_path))
    keys = ["1.jpg", "2.jpg", "3.jpg"]
    assert tree.places(keys, ("val_images_256", "val_images"))[0] == (f"{tmp_path}/val_images/1.jpg", 0, -1, "file")
    assert tree.places(keys, ("val_images_256", "val")) == [MISSING] * 3


def test_files_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    tree = Tree.open(str(tmp_path))
    monkeypatch.setattr("pipeline.storage.attempt", None)
    assert len(tree.places([f"{row}.jpg" for row in range(10)])) == 10


def test_storage_in_the_cloud(bucket):
    files = {"images/1, 2 é.jpg": b"one", "images/a/3.jpg": b"three"}
    write(f"{bucket}/raw", {**files, "b/more.tar": tar(JPEGS), "z.zip": zipped({"meta/list.txt": b"list" * 99})})
    tree = Tree.open(f"{bucket}/raw/")
    assert_holds(tree, {**files, **JPEGS})
    assert sorted(tree.images()) == sorted([*files, *below("b", JPEGS)])
    assert tree.read("meta/list.txt") == b"list" * 99
    assert_holds(Tree.open(f"{bucket}/raw/b/more.tar"), JPEGS)


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "no such folder or archive: .*absent: check the path"), ("a.txt", "is no folder and no .tar")],
)
def test_places_that_cannot_work_are_named(tmp_path, name, message):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=message):
        Tree.open(f"{tmp_path}/{name}")
    with pytest.raises(InputError, match="its scheme is unknown"):
        Tree.open("nowhere://x")
