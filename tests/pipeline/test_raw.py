import http.server
import threading
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import raw, storage
from pipeline.dataset import InputError
from pipeline.images import Rejected
from pipeline.layout import SCHEMA
from pipeline.raw import fetch, image_columns


def listed(*places) -> pa.Table:
    rows = [
        {"id": i, "key": str(i), "label": 0, "split": "train", "file": file, "start": start, "size": size, "how": how}
        for i, (file, start, size, how) in enumerate(places)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def said(table: pa.Table) -> list[bytes | str]:
    return [str(image) if isinstance(image, Rejected) else image for image in fetch(table)]


@pytest.fixture(params=["local", "cloud"])
def folder(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket") + "/raw"


def test_bytes_come_in_order_from_wherever_they_are(folder):
    packed = deflated(b"packed" * 100)
    storage.write(*storage.connect(f"{folder}/a, ü.jpg"), b"whole")
    storage.write(*storage.connect(f"{folder}/some.tar"), b"....stored...." + packed + b"....")
    table = listed(
        (f"{folder}/some.tar", 4, 6, "stored"),
        (f"{folder}/a, ü.jpg", 0, -1, "file"),
        (None, 0, -1, "file"),
        (f"{folder}/some.tar", 14, len(packed), "deflated"),
        (f"{folder}/nowhere.jpg", 0, -1, "file"),
        (f"{folder}/some.tar", 0, 20, "deflated"),
        (f"{folder}/some.tar", 14, len(packed) - 3, "deflated"),
    )
    assert said(table) == [
        b"stored", b"whole", "missing", b"packed" * 100, "missing", "damaged in its archive",
        "cut off in its archive, or grows too large",
    ]  # fmt: skip


class Answers(http.server.BaseHTTPRequestHandler):
    """What servers answer to /STATUS and /image."""

    def do_GET(self) -> None:
        status = {"image": 200, "page": 200, "moved": 302}.get(self.path[1:]) or int(self.path[1:])
        body = b"<!DOCTYPE html><html>gone</html>" if self.path == "/page" else b"bytes"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", "/image")
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_dead_link_is_the_matter_of_its_own_image(server, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    paths = ("image", "404", "403", "410", "500", "page", "moved")
    links = [(f"{server}/{path}", 0, -1, "file") for path in paths]
    dead = [("http://127.0.0.1:9/none", 0, -1, "file"), ("https://[bad/none", 0, -1, "file")]
    found = said(listed(*links, *dead))
    assert found[:7] == [
        b"bytes", "missing", "permission denied", "HTTP 410", "HTTP 500", b"<!DOCTYPE html><html>gone</html>", b"bytes",
    ]  # fmt: skip
    assert all(isinstance(reason, str) and len(reason) < 60 for reason in found[7:])


def test_a_member_that_grows_without_end_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "MAX_BYTES", 1000)
    bomb = deflated(bytes(10**6))
    (tmp_path / "bomb.zip").write_bytes(bomb)
    assert said(listed((f"{tmp_path}/bomb.zip", 0, len(bomb), "deflated"))) == [
        "cut off in its archive, or grows too large"
    ]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
)
def test_rows_of_parquet_are_read_by_row_groups(folder, kind, monkeypatch):
    images = [b"%d" % row for row in range(20)]
    images[7] = None
    values = [{"bytes": image, "path": ""} for image in images] if pa.types.is_struct(kind) else images
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"label": list(range(20)), "picture": pa.array(values, kind)}), sink, row_group_size=4)
    storage.write(*storage.connect(f"{folder}/t.parquet"), sink.getvalue().to_pybytes())
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, number, columns: read.append(number) or original(self, number, columns),
    )
    wanted = [19, 3, 7, 0, 18, 3]
    assert said(listed(*[(f"{folder}/t.parquet", row, -1, "row") for row in wanted])) == [
        b"19", b"3", "empty", b"0", b"18", b"3"
    ]  # fmt: skip
    assert read == [0, 1, 4]


def test_a_parquet_source_that_is_none_is_one_line(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="is no readable Parquet file") as caught:
        said(listed((f"{tmp_path}/t.parquet", 0, -1, "row")))
    assert "\n" not in str(caught.value)


def test_columns_of_images_are_known_by_their_type():
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("a", pa.binary()),
            ("b", pa.struct([("x", pa.int8())])),
            ("c", pa.struct([("bytes", pa.binary())])),
        ]
    )
    assert image_columns(schema) == ["a", "c"]
