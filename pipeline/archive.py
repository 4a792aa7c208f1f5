"""Where the members of a tar or zip lie, so that each can be read from storage without unpacking the archive.

Shapes: M image members of an archive.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import stat
import struct
import tarfile
import uuid
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.dataset import InputError
from pipeline.images import ENDINGS

# Where an image is: URL of a file or archive (None: known to be missing), first byte, bytes (−1: the whole file), and
# how it is kept there: "file", "stored" (as it is, in a tar or zip), "deflated" (zip), "row" (of a Parquet file, where
# bytes are the number of its column, −1 for the one of images).
Place = tuple[str | None, int, int, str]

ARCHIVE = re.compile(r"(?!\._)(?P<stem>.+)\.(?P<kind>tar|tar\.gz|tgz|zip)", re.IGNORECASE)
IMAGE = re.compile(
    rf"(?:.*/)?(?!\._)[^/]+\.(?:{'|'.join(ending[1:] for ending in sorted(ENDINGS))})", re.IGNORECASE | re.DOTALL
)  # ._: macOS's

# The label that a file beside an image holds, or None: of its name and a function that reads its bytes.
ReadLabel = Callable[[str, Callable[[], bytes]], str | None]
LABEL_LIMIT = 1 << 20  # bytes of such a file

SMALL = 200 * 10**6  # bytes: a compressed tar below this may hold lists, which are read into memory
LIST_LIMIT = 2**30  # bytes of lists taken from one archive: beyond it lies a decompression bomb
FIRST_BLOCK, BLOCK = 2**16, 2**23  # bytes read at once: at first and after a jump, and at most


@dataclass
class Archive:
    """Hold the members of one archive, by column: 2.4 million of them fit in 300 MB."""

    url: str
    folder: str  # where it lies in the tree, "" at its root
    stem: str  # its name without .tar or .zip
    images: list[str] = field(default_factory=list)  # M names, without a leading ./
    start_M: array[int] = field(default_factory=lambda: array("q"))
    size_M: array[int] = field(default_factory=lambda: array("q"))
    deflated_M: bytearray = field(default_factory=bytearray)
    others: dict[str, Place | bytes] = field(default_factory=dict)  # all other files: lists, and what nobody asks for
    tars: list[tuple[str, int, int]] = field(default_factory=list)  # name, first byte, bytes of the tars in a tar
    labels: dict[str, str] = field(
        default_factory=dict
    )  # of WebDataset's: what `read_label` made of files beside images
    unsafe: list[tuple[str, str]] = field(default_factory=list)  # members that are never used: name, reason
    refused: str = ""  # why nothing of it can be used, and the fix, in one line

    @property
    def home(self) -> str:
        """Return what its images' names lead with in the tree: its folder, and its stem where names have no folder.

        So tars of one class each, all with a 1.jpg, do not get into each other's way.
        """
        flat = any("/" not in name for name in self.images)
        return "/".join(part for part in (self.folder, self.stem if flat else "") if part)

    def place(self, row: int) -> Place:
        """Return where image `row` is."""
        return self.url, self.start_M[row], self.size_M[row], "deflated" if self.deflated_M[row] else "stored"

    def add(self, name: str, start: int, size: int, *, deflated: bool = False) -> None:
        """Take in one regular file."""
        name = name.removeprefix("./")
        if reason := unsafe(name):
            self.unsafe.append((ascii(name), reason))
        elif IMAGE.fullmatch(name):
            self.images.append(name)
            self.start_M.append(start)
            self.size_M.append(size)
            self.deflated_M.append(deflated)
        else:
            self.others[name] = (self.url, start, size, "deflated" if deflated else "stored")


def index(url: str, folder: str, spool: str = "", read_label: ReadLabel | None = None) -> Archive:
    """Return the members of the archive at `url`, which lies in `folder` of its tree.

    A tar compressed as a whole cannot be read from its middle. One of lists alone is read into memory; another is
    decompressed once into the folder `spool`, as far as that is given, and else `refused`. Small files of a tar for
    which `read_label` returns a label fill `labels`.
    Raises InputError where the archive is damaged.
    """
    fs, path = storage.connect(url)
    match = ARCHIVE.fullmatch(path.rpartition("/")[2])
    assert match is not None
    archive = Archive(url, folder, match["stem"])
    with _reading(url) as file:
        if match["kind"].lower() == "zip":
            _index_zip(archive, file)
        elif match["kind"].lower() == "tar":
            _index_tar(archive, file, 0, _size(fs, path), read_label)
        elif not _read_lists(archive, file, _size(fs, path)):
            if not spool:
                archive.refused = (
                    f"{url} is compressed as a whole, so that no image in it can be read alone: decompress it once "
                    "(gzip -d FILE; in the cloud gsutil cat FILE | gunzip | gsutil cp - FILE.tar; for Food-101 --spool)"
                )
            else:
                archive.url = _spooled(url, file, storage.join(spool, f"{match['stem']}.tar"))
                with _reading(archive.url) as tar:
                    _index_tar(archive, tar, 0, _size(*storage.connect(archive.url)))
    return archive


def index_inner(outer: Archive, name: str, start: int, size: int, read_label: ReadLabel | None = None) -> Archive:
    """Return the members of the tar `name` in the tar `outer`: stretches of the outer one, too. Raises as `index`."""
    folder, _, file_name = name.rpartition("/")
    folder = "/".join(part for part in (outer.folder, folder) if part)
    archive = Archive(outer.url, folder, file_name[: -len(".tar")])
    with _reading(outer.url) as file:
        _index_tar(archive, file, start, start + size, read_label)
    return archive


def unsafe(name: str) -> str:
    """Return why a file of this name is never used, or ""."""
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or re.fullmatch("[A-Za-z]:", parts[0]):
        return "its name is absolute"
    if ".." in parts:
        return "its name leaves the folder"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return ""


def _damaged(url: str, why: object) -> InputError:
    text = " ".join(str(why).split()) or type(why).__name__
    return InputError(f"{url} is damaged ({text}): copy it again")


@contextmanager
def _reading(url: str) -> Iterator[BinaryIO]:
    # The archive as a file; what its bytes make the readers raise is one InputError.
    fs, path = storage.connect(url)
    try:
        yield io.BufferedReader(_Blocks(fs, path, _size(fs, path)), BLOCK)
    except InputError:
        raise
    except (
        *(tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, struct.error, EOFError, ValueError),
        *(OverflowError, LookupError, NotImplementedError),
    ) as error:
        raise _damaged(url, error) from None


def _size(fs: Any, path: str) -> int:
    return int(storage.attempt(fs, path, lambda: fs.size(path)))


class _Blocks(io.RawIOBase):
    # A file in storage, read in blocks that grow while they follow each other: headers that lie close together cost one
    # request for thousands, and those of the tars in a tar, hundreds of megabytes apart, a small one each.
    def __init__(self, fs: Any, path: str, size: int):
        self.fs, self.path, self.size = fs, path, size
        self.at = self.end = 0  # position, and that of the end of the last block
        self.block = FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        near = 0 <= self.at - self.end <= self.block
        self.block = min(2 * self.block, BLOCK) if near else FIRST_BLOCK
        count = min(len(buffer), self.block, self.size - self.at)
        if count <= 0:
            return 0
        data = storage.read(self.fs, self.path, self.at, self.at + count)
        buffer[: len(data)] = data
        self.at = self.end = self.at + len(data)
        return len(data)


def _index_tar(archive: Archive, file: BinaryIO, start: int, end: int, read_label: ReadLabel | None = None) -> None:
    # The tar that fills bytes `start` to before `end` of `file`; offsets count from the start of the file.
    file.seek(start)
    with tarfile.TarFile(fileobj=file) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps all of them, a kilobyte each
            # (a negative size would send it back for ever)
            if member.size < 0 or tar.offset <= member.offset or member.offset_data + member.size > end:
                raise EOFError(f"its member {member.name!a} goes beyond its end")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                archive.unsafe.append((ascii(member.name), "it is a link, a device or sparse"))
            elif member.name.lower().endswith(".tar") and start == 0 and not unsafe(member.name):
                archive.tars.append((member.name.removeprefix("./"), member.offset_data, member.size))
            else:
                archive.add(member.name, member.offset_data, member.size)
                if read_label and member.size <= LABEL_LIMIT:
                    _read_label(archive, file, member, read_label)
        # It stops alike at the end mark and at bytes that make no sense.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or tar.offset >= end:
            raise EOFError(f"no end mark at byte {tar.offset:,}")


def _read_label(archive: Archive, file: BinaryIO, member: tarfile.TarInfo, read_label: ReadLabel) -> None:
    def data() -> bytes:
        file.seek(member.offset_data)
        return file.read(member.size)

    name = member.name.removeprefix("./")
    if name in archive.others and (label := read_label(name, data)) is not None:
        archive.labels[name] = label


def _index_zip(archive: Archive, file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as whole:
        members = sorted(whole.infolist(), key=lambda member: member.header_offset)
    for member in members:
        if member.is_dir():
            continue
        if stat.S_ISLNK(member.external_attr >> 16):
            archive.unsafe.append((ascii(member.filename), "it is a link"))
        elif member.flag_bits & 1:
            archive.unsafe.append((ascii(member.filename), "it is encrypted"))
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            archive.unsafe.append((ascii(member.filename), f"its compression {member.compress_type} is not read here"))
        else:
            # Only the header before the data says where they start: it is longer than the directory tells.
            file.seek(member.header_offset)
            header = file.read(30)
            if header[:4] != b"PK\3\4":
                raise EOFError(f"no member at byte {member.header_offset:,}")
            name, extra = struct.unpack("<HH", header[26:])
            start = member.header_offset + 30 + name + extra
            archive.add(member.filename, start, member.compress_size, deflated=bool(member.compress_type))


def _read_lists(archive: Archive, file: BinaryIO, size: int) -> bool:
    # Whether this compressed tar holds no images, and is small; then all its files are taken into memory.
    if size > SMALL:
        return False
    total = 0
    with gzip.GzipFile(fileobj=file) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                if not member.isdir():
                    archive.unsafe.append((ascii(member.name), "it is a link, a device or sparse"))
                continue
            name = member.name.removeprefix("./")
            total += member.size
            if IMAGE.fullmatch(name) or name.lower().endswith(".tar") or total > LIST_LIMIT:
                archive.others, archive.unsafe = {}, []
                return False
            if reason := unsafe(name):
                archive.unsafe.append((ascii(name), reason))
                continue
            data = tar.extractfile(member)
            assert data is not None
            archive.others[name] = data.read()
    return True


def _spooled(source: str, file: BinaryIO, target: str) -> str:
    # The URL of the tar in gzip file `source`, decompressed to `target` unless a record says that this is done.
    fs, path = storage.connect(target)
    file.seek(0, io.SEEK_END)
    record = {"source": source.rpartition("/")[2], "bytes": file.tell()}
    try:
        made = json.loads(storage.read(fs, f"{path}.json"))
        if made == record | {"tar_bytes": _size(fs, path)}:
            return target
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    # An object in the cloud is there once it is whole; a file has another name until then. The record comes last.
    part = path if storage.is_object_store(fs) else f"{path}.{uuid.uuid4().hex[:12]}.part"
    file.seek(0)
    if part != path:
        storage.attempt(fs, path, lambda: fs.makedirs(fs._parent(path), exist_ok=True))
    try:
        count = 0
        with gzip.GzipFile(fileobj=file) as stream, fs.open(part, "wb", block_size=BLOCK) as out:
            while block := stream.read(BLOCK):
                count += out.write(block)
        if part != path:
            storage.attempt(fs, path, lambda: fs.mv(part, path))
    except BaseException:
        if fs.exists(part):
            fs.rm_file(part)
        raise
    storage.write(fs, f"{path}.json", json.dumps(record | {"tar_bytes": count}).encode())
    return target
