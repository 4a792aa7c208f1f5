"""The files of a raw data set by name, on any fsspec URL: folders and the archives they came in count alike.

Archives are never unpacked: their members are indexed once, and an image is then a stretch of bytes of its archive.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.archive import ARCHIVE, IMAGE, LIST_LIMIT, Archive, Place, ReadLabel, index, index_inner, unsafe
from pipeline.dataset import InputError

MISSING: Place = (None, 0, -1, "file")

LISTINGS, INDEXERS = 32, 8  # threads
LEADING = 3  # folders that a packer may have put before the names that lists use
# What a disk station, an archiver or a desktop leaves behind.
TOOLS = {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
TOOLS |= {"Thumbs.db", "desktop.ini", "__pycache__"}
SAMPLE = 500  # members that tell how an archive's names map to keys


@dataclass(frozen=True)
class Tree:
    """Hold a folder with the archives in it, or one archive. Open it by `Tree.open`."""

    url: str  # absolute, without a final slash
    is_folder: bool
    archives: tuple[Archive, ...]
    unsafe: list[tuple[str, str]]  # names that are never used: where, and the reason
    unread: list[str]  # archives that cannot be used, one line each, with the fix
    fs: Any = field(repr=False)
    path: str = field(repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)  # of a whole tree: all plain files
    folders: tuple[str, ...] = field(default=(), repr=False)  # of a whole tree: all folders

    @staticmethod
    def open(url: str, *, spool: str = "", whole: bool = False, read_label: ReadLabel | None = None) -> Tree:
        """Return the tree at `url`: a folder, whose archives and those one folder below are indexed; or an archive
        itself.

        A `whole` one has its files and folders listed, and archives at any depth indexed but for hidden ones.
        A compressed tar of images is decompressed once into the folder `spool`, or noted in `unread` without one.
        Raises InputError for a missing or damaged place, and where `url` itself is an archive that cannot be used.
        """
        fs, path = storage.connect(url)
        url, spool = absolute(url), spool and absolute(spool)
        try:
            info = storage.attempt(fs, path, lambda: fs.info(path))
        except FileNotFoundError:
            raise InputError(f"no such folder or archive: {url}: check the path") from None
        is_folder = info["type"] == "directory"
        if not is_folder and not ARCHIVE.fullmatch(path.rpartition("/")[2]):
            raise InputError(f"{url} is no folder and no .tar, .tar.gz, .tgz or .zip: check the path")
        tree = Tree(url, is_folder, (), [], [], fs, path)
        files: list[str] = []
        folders: list[str] = []
        if not is_folder:
            names = [""]
        elif whole:
            files = list(tree.walk(folders=folders))
            names = [name for name in files if ARCHIVE.fullmatch(name.rpartition("/")[2]) and not hidden(name)]
        else:
            names = list(tree._archive_names())
        archives = tree._indexed(names, spool, read_label)
        if tree.unread and not is_folder:
            raise InputError(tree.unread[0])
        return replace(tree, archives=archives, names=tuple(files), folders=tuple(folders))

    def _indexed(self, names: Sequence[str], spool: str, read_label: ReadLabel | None) -> tuple[Archive, ...]:
        # The archives of these names, and the tars in them; what of them is never used goes to `unsafe` and `unread`.
        def outer_of(name: str) -> Archive:
            url = f"{self.url}/{name}" if name else self.url
            return index(url, name.rpartition("/")[0], spool, read_label)

        def inner_of(tar: tuple[Archive, str, int, int]) -> Archive:
            return index_inner(*tar, read_label=read_label)

        with ThreadPoolExecutor(INDEXERS) as pool:
            outer = list(pool.map(outer_of, names))
            inner = list(pool.map(inner_of, [(one, *tar) for one in outer for tar in one.tars]))
        for archive in (*outer, *inner):
            where = archive.url.rpartition("/")[2]
            self.unsafe.extend((f"{where}: {name}", reason) for name, reason in archive.unsafe)
        self.unread.extend(archive.refused for archive in outer if archive.refused)
        return (*outer, *inner)

    def read(self, name: str) -> bytes:
        """Return the bytes of a list: a plain file, or a member of an archive with up to three folders before `name`.

        Raises FileNotFoundError where there is none, InputError where it cannot be read.
        """
        if self.is_folder:
            try:
                return storage.read(self.fs, storage.join(self.path, name))
            except FileNotFoundError:
                pass
        found = self._member(name)
        if found is None:
            raise FileNotFoundError(f"{self.url} has no {name}")
        if isinstance(found, bytes):
            return found
        url, start, size, how = found
        assert url is not None
        data = storage.read(*storage.connect(url), start, start + size)
        return data if how == "stored" else _inflated(data, f"{name} in {url}")

    def exists(self, name: str) -> bool:
        """Return whether the tree has a list, file or folder of this name."""
        plain = self.is_folder and storage.exists(self.fs, storage.join(self.path, name))
        return plain or self._member(name) is not None

    def places(self, keys: Sequence[str], folders: Sequence[str] = ("",)) -> list[Place]:
        """Return where the images named by `keys` are: members of archives first, else files `folder/key`.

        Files are not asked for one by one: one that is missing shows when it is read. Of several `folders` the first
        counts that has one of the first keys; where none has, and in a lone archive, the place is MISSING.
        """
        found = self._members(keys)
        home: str | None = None
        if self.is_folder and len(found) < len(set(keys)):
            home = folders[0] if len(folders) == 1 else self._home(keys, folders)
        if home is None:
            return [found.get(key, MISSING) for key in keys]
        lead = storage.join(self.url, home).rstrip("/")
        return [found.get(key) or (f"{lead}/{key}", 0, -1, "file") for key in keys]

    def images(self, *under: str) -> Iterator[str]:
        """Return the names of all image files, or of those below the folders `under`: plain files, then archives'
        members.
        """
        yield from self.files(*under)
        yield from self.members(*under)

    def members(self, *under: str) -> Iterator[str]:
        """Return the names of the archives' images, as if each were unpacked where it lies (see Archive.home)."""
        folders = set(under)
        for archive in self.archives:
            lead = f"{archive.home}/" if archive.home else ""
            for name in archive.images:
                if not folders or _within(lead + name, folders):
                    yield lead + name

    def files(self, *under: str) -> Iterator[str]:
        """Return the names of the plain image files, in the order of `walk`."""
        return filter(IMAGE.fullmatch, self.walk(*under))

    def walk(self, *under: str, folders: list[str] | None = None) -> Iterator[str]:
        """Return the names of all plain files; folders are listed in parallel, level by level, so that the order is
        fixed, and their names are added to `folders`.

        Names that are not UTF-8 go to `unsafe`. A folder of `under` that is not there has no files.
        """
        level = [storage.join(self.path, name) for name in under] or [self.path]
        with ThreadPoolExecutor(LISTINGS) as pool:
            while level and self.is_folder:
                below: list[str] = []
                for entries in pool.map(self._list, level):
                    for path, is_folder in entries:
                        name = self._name(path)
                        if is_folder:
                            below.append(path)
                            if folders is not None:
                                folders.append(name)
                        elif reason := unsafe(name):
                            self.unsafe.append((ascii(name), reason))
                        else:
                            yield name
                level = below

    def _name(self, path: str) -> str:
        return path[len(self.path.rstrip("/")) + 1 :]

    def _list(self, folder: str) -> list[tuple[str, bool]]:
        # Path, and whether it is a folder, of all that is in `folder`, sorted; nothing where it is not there.
        try:
            entries = storage.attempt(self.fs, folder, lambda: self.fs.ls(folder, detail=True))
        except FileNotFoundError:
            return []
        listed = []
        for entry in entries:
            path, is_folder = entry["name"].rstrip("/"), entry["type"] == "directory"
            if entry.get("islink"):
                is_folder = os.path.isdir(path)
                if is_folder and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/"):
                    continue  # a loop
            if path != folder:  # or it is the object that stands for the folder
                listed.append((path, is_folder))
        return sorted(listed)

    def _archive_names(self) -> Iterator[str]:
        # Names of the archives at the root and one folder below.
        root = self._list(self.path)
        with ThreadPoolExecutor(LISTINGS) as pool:
            below = pool.map(self._list, [path for path, is_folder in root if is_folder])
            for path, is_folder in itertools.chain(root, *below):
                if not is_folder and ARCHIVE.fullmatch(path.rpartition("/")[2]):
                    yield self._name(path)

    def _home(self, keys: Sequence[str], folders: Sequence[str]) -> str | None:
        # The first of `folders` that has one of the first keys.
        for folder in folders:
            if any(storage.exists(self.fs, storage.join(self.path, f"{folder}/{key}".lstrip("/"))) for key in keys[:3]):
                return folder
        return None

    def _member(self, name: str) -> Place | bytes | None:
        # The member that `name` means: the one under the fewest leading folders.
        found = [
            (member.count("/"), place)
            for archive in self.archives
            for member, place in archive.others.items()
            if f"/{member}".endswith(f"/{name}") and member.count("/") <= name.count("/") + LEADING
        ]
        return min(found, key=lambda one: one[0])[1] if found else None

    def _members(self, keys: Sequence[str]) -> dict[str, Place]:
        # Key -> place, for the keys that archives have. The same images lie under other leading folders in each
        # packer's archive, so each archive gets the mapping of names by which most of a sample of its members are keys.
        wanted = set(keys)
        last = {key.rpartition("/")[2] for key in wanted} if self.archives else set()
        found: dict[str, Place] = {}
        for archive in self.archives:
            likely = [row for row, name in enumerate(archive.images) if name.rpartition("/")[2] in last]
            sample = [archive.images[row] for row in likely[:: len(likely) // SAMPLE + 1]]
            leads = dict.fromkeys(("", archive.folder, archive.stem, f"{archive.folder}/{archive.stem}".lstrip("/")))
            choices = [(strip, f"{lead}/" if lead else "") for strip in range(LEADING + 1) for lead in leads]
            best = max(choices, key=lambda choice: sum(_mapped(name, *choice) in wanted for name in sample))
            # Where a name comes twice the last one counts, as it does when an archive is unpacked.
            own = {_mapped(archive.images[row], *best): row for row in likely}
            for name in own.keys() & (wanted - found.keys()):
                found[name] = archive.place(own[name])
        return found


def hidden(name: str) -> bool:
    """Return whether a file, or a folder that it is in, is one that people do not see, or a tool's own."""
    return any(part.startswith(".") or part in TOOLS for part in name.split("/"))


def absolute(url: str) -> str:
    """Return the URL without a final slash; a local path from the root."""
    return url.rstrip("/") if "://" in url else storage.connect(url)[1]


def _mapped(name: str, strip: int, lead: str) -> str:
    # `name` without its first `strip` folders, behind `lead`; "" where it has fewer.
    parts = name.split("/", strip)
    return lead + parts[-1] if len(parts) == strip + 1 else ""


def _within(name: str, folders: set[str]) -> bool:
    end = name.find("/")
    while end >= 0:
        if name[:end] in folders:
            return True
        end = name.find("/", end + 1)
    return False


def _inflated(data: bytes, name: str) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        text = inflate.decompress(data, LIST_LIMIT)
    except zlib.error:
        raise InputError(f"{name} is damaged: copy the archive again") from None
    if not inflate.eof:
        raise InputError(f"{name} is cut off or larger than {LIST_LIMIT >> 20:,} MiB: copy the archive again")
    return text
