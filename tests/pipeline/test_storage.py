import errno
import sys
import uuid
from typing import ClassVar

import aiohttp
import fsspec
import pytest
import requests
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from gcsfs.retry import HttpError
from yarl import URL

from pipeline import storage
from pipeline.dataset import InputError


class Flaky(MemoryFileSystem):
    """Files in memory, behind a network that fails with the next of `failures` for each byte read or written."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def fail(self):
        if self.failures:
            raise self.failures.pop(0)

    def cat_file(self, *args, **kwargs):
        self.fail()
        return super().cat_file(*args, **kwargs)

    def pipe_file(self, *args, **kwargs):
        self.fail()
        super().pipe_file(*args, **kwargs)

    def put_file(self, *args, **kwargs):
        super().put_file(*args, **kwargs)  # the connection breaks when all is sent
        self.fail()

    def info(self, *args, **kwargs):
        self.fail()
        return super().info(*args, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    Flaky.store.clear()
    Flaky.failures.clear()
    fs, path = storage.connect("flaky://folder/")
    assert path == "/folder"
    fs.pipe_file("/folder/file", b"0123456789")
    return fs


@pytest.fixture(params=["local", "memory", "cloud"])
def folder(request, tmp_path):
    if request.param == "cloud":
        return f"{request.getfixturevalue('bucket')}/deep/folder"
    return f"{tmp_path}/deep/folder" if request.param == "local" else f"memory://{uuid.uuid4().hex}/folder"


def test_what_is_written_is_read(folder, tmp_path):
    fs, path = storage.connect(storage.join(folder + "/", "a b.bin"))
    assert not storage.exists(fs, path)
    for data in (b"0123456789", b"9876543210"):
        storage.write(fs, path, data)
        assert storage.read(fs, path) == data
        assert storage.read(fs, path, 2, 5) == data[2:5]
        assert storage.read(fs, path, 7) == data[7:]
    (tmp_path / "made").write_bytes(b"made here")
    storage.commit(fs, str(tmp_path / "made"), path)
    assert storage.read(fs, path) == b"made here"
    assert storage.exists(fs, path)
    names = [name.rsplit("/", 1)[-1] for name in fs.find(storage.connect(folder)[1])]
    assert names == ["a b.bin"]  # no temporary name is left
    with pytest.raises(FileNotFoundError):
        storage.read(fs, path + "x")


@pytest.mark.parametrize("name", ["a::b.bin", "memory::c", "x[1]*?.bin", "~home", "{a,b}", "a%20b", "c#d"])
def test_a_local_name_is_what_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"here")
    fs, path = storage.connect(f"{tmp_path}/{name}")
    assert storage.read(fs, path) == b"here"
    storage.write(fs, path, b"anew")
    assert (tmp_path / name).read_bytes() == b"anew"
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_writable_folder_is_left_as_it_was(folder):
    storage.require_writable(folder)
    fs, path = storage.connect(folder)
    assert fs.find(path) == []


def test_others_files_are_seen_at_once(bucket):
    fs, path = storage.connect(bucket)
    assert fs.ls(path) == []
    fsspec.filesystem("gs").pipe_file(f"{path}/new", b"x")
    assert fs.ls(path, detail=False) == [f"{path}/new"]


def answer(status: int) -> aiohttp.ClientResponseError:
    url = URL("https://host/file?signature=SECRET")
    return aiohttp.ClientResponseError(aiohttp.RequestInfo(url, "GET", None, url), (), status=status, message="SECRET")


TRANSIENT = [
    TimeoutError("SECRET"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError(errno.EIO, "Input/output error"),
    HttpError({"code": 503, "message": "SECRET"}),
    HttpError({"code": "429", "message": "SECRET"}),
    aiohttp.ClientPayloadError("SECRET"),
    aiohttp.ServerDisconnectedError(),
    answer(500),
    requests.exceptions.ProxyError(),
    fsspec.exceptions.FSTimeoutError(),
]
PERMANENT = [
    (PermissionError(errno.EACCES, "Permission denied"), "permission denied.*: check its permissions"),
    (OSError("Forbidden: https://host/file?signature=SECRET\nuser SECRET"), "permission denied.*: check its perm"),
    (HttpError({"code": 401, "message": "SECRET"}), "permission denied.*credentials of this machine"),
    (answer(403), "permission denied"),
    (answer(400), "HTTP 400"),
    (HttpError({"code": 501, "message": "SECRET"}), "HTTP 501"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "Not a directory.*check the path"),
    (IsADirectoryError(errno.EISDIR, "Is a directory"), "Is a directory"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left.*free some space"),
    (ValueError("Bucket is requester pays. Set SECRET"), "bucket bills the reader"),
    (aiohttp.InvalidURL("https://SECRET"), "InvalidURL"),
    (NotImplementedError(), "cannot do that"),
]


def acts(fs, tmp_path):
    (tmp_path / "made").write_bytes(b"made")
    return {
        "read": lambda: storage.read(fs, "/folder/file"),
        "exists": lambda: storage.exists(fs, "/folder/file"),
        "write": lambda: storage.write(fs, "/folder/new", b"new"),
        "commit": lambda: storage.commit(fs, str(tmp_path / "made"), "/folder/new"),
    }


@pytest.mark.parametrize("failure", TRANSIENT, ids=lambda failure: type(failure).__name__)
def test_what_passes_is_tried_again(flaky, tmp_path, failure):
    for name, act in acts(flaky, tmp_path).items():
        Flaky.failures[:] = [failure] * (storage.TRIES - 1) if name in ("read", "exists") else [failure]
        act()
        assert Flaky.failures == []
    assert flaky.cat_file("/folder/new") == b"made"
    assert len(flaky.find("/folder")) == 2


@pytest.mark.parametrize("failure", TRANSIENT, ids=lambda failure: type(failure).__name__)
def test_what_does_not_pass_ends(flaky, failure):
    Flaky.failures[:] = [failure] * (storage.TRIES + 1)
    with pytest.raises(
        ConnectionError, match=r"flaky:///folder/file could not be reached in 5 tries.*run again"
    ) as error:
        storage.read(flaky, "/folder/file")
    assert len(Flaky.failures) == 1
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(("failure", "message"), PERMANENT, ids=lambda value: repr(value)[:30])
def test_what_no_try_can_mend_is_told_at_once(flaky, tmp_path, failure, message):
    for name, act in acts(flaky, tmp_path).items():
        Flaky.failures[:] = [failure]
        with pytest.raises(InputError, match=message) as error:
            act()
        assert "flaky:///folder/" + ("file" if name in ("read", "exists") else "new") in str(error.value)
        assert "\n" not in str(error.value)
        assert "SECRET" not in str(error.value)
        assert error.value.__suppress_context__
        assert flaky.find("/folder") == ["/folder/file"]  # nothing half-written is left


def test_a_missing_file_passes_through_at_once(flaky):
    Flaky.failures[:] = [FileNotFoundError("file"), TimeoutError()]
    with pytest.raises(FileNotFoundError):
        storage.read(flaky, "/folder/file")
    assert len(Flaky.failures) == 1


def test_a_missing_bucket_is_told_at_once(storage, tmp_path):
    from pipeline.storage import commit, connect, exists, read, require_writable, write

    url = f"gs://nosuch-{uuid.uuid4().hex}"
    fs, path = connect(f"{url}/folder/file")
    (tmp_path / "made").write_bytes(b"made")
    for act in (
        lambda: read(fs, path),
        lambda: exists(fs, path),
        lambda: write(fs, path, b"x"),
        lambda: commit(fs, str(tmp_path / "made"), path),
        lambda: require_writable(f"{url}/folder"),
        lambda: require_writable(url),
    ):
        with pytest.raises(InputError, match=f"^there is no bucket {url}: check its name, or make it first$"):
            act()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no path is given"),
        ("nowhere://x", "cannot open nowhere://x: its scheme is unknown: give a local path or a URL such as"),
        ("nowhere://user:SECRET@x?sig=SECRET", "cannot open nowhere://x: "),
        ("gs://", "gs:// names no bucket"),
    ],
)
def test_urls_that_cannot_be_opened_are_told(url, message):
    with pytest.raises(InputError, match=message) as error:
        storage.connect(url)
    assert "\n" not in str(error.value)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "driver", "extra"),
    [("s3://b/x", "s3fs", "s3"), ("abfs://c/x", "adlfs", "azure"), ("simplecache::az://c/x", "adlfs", "azure")],
)
def test_a_driver_that_is_missing_is_told(monkeypatch, url, driver, extra):
    monkeypatch.setitem(sys.modules, driver, None)
    for protocol in ("s3", "abfs", "az"):
        monkeypatch.delitem(_registry, protocol, raising=False)  # where another test has loaded it
    with pytest.raises(InputError) as error:
        storage.connect(url)
    assert str(error.value) == f"cannot open {url}, its driver is missing: pip install -e '.[{extra}]'"


def test_credentials_that_cannot_be_used_are_told(monkeypatch, tmp_path):
    (tmp_path / "token.json").write_text("SECRET")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": str(tmp_path / "token.json")})
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": str(tmp_path / "token.json")})
    with pytest.raises(InputError, match=r"cannot open gs://bucket/x .*credentials of this machine") as error:
        storage.connect("gs://bucket/x")
    assert "SECRET" not in str(error.value)


def test_a_local_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cannot use {tmp_path}/file/.*: check the path"):
        storage.require_writable(f"{tmp_path}/file/folder")
    fs, path = storage.connect(str(tmp_path))
    with pytest.raises(InputError, match="Is a directory"):
        storage.read(fs, path)
