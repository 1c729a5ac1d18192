"""What strangers send to the search service: deceptive files, names, headers and filters."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from service_parts import index, parts, picture

from robusthash.apps.service.api import create_app
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.settings import ServiceSettings

__all__ = ["index", "parts"]  # fixtures


@pytest.fixture
def client(parts: tuple[Path, Path], index: Path) -> Iterator[TestClient]:
    settings = ServiceSettings(rate=0, max_wait=60_000)
    service = SearchService(parts[0], f"file:{index}", settings, parts[1], "cpu")
    with TestClient(create_app(service, ()), raise_server_exceptions=False) as client:
        yield client


def search(client: TestClient, content: bytes, name: str = "x", kind: str = "", **form: Any) -> Any:
    file = (name, content, kind) if kind else (name, content)
    return client.post("/v1/search", files={"image": file}, data=form)


def chunk(kind: bytes, content: bytes) -> bytes:
    length, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
    return length + kind + content + check


def png_with(extra: bytes, width: int = 8, height: int = 8) -> bytes:
    """A PNG whose head has other chunks before its pixels."""
    pixels = zlib.compress(b"".join(b"\0" + bytes(3 * 8) for _ in range(8)))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def frames(count: int) -> bytes:
    stream = io.BytesIO()
    pictures = [Image.new("RGB", (64, 64), (n % 256, 0, 0)) for n in range(count)]
    pictures[0].save(stream, "WEBP", save_all=True, append_images=pictures[1:])
    return stream.getvalue()


BOMB = zlib.compress(bytes(64 << 20), 9)
STRANGE = {
    "text that unpacks to 64 MiB": (png_with(chunk(b"zTXt", b"a\0\0" + BOMB)), (200, 413, 422)),
    "a profile that unpacks to 64 MiB": (png_with(chunk(b"iCCP", b"a\0\0" + BOMB)), (200, 413, 422)),
    "a size that its bytes do not fill": (png_with(b"", 4000, 4000), (422,)),
    "a size of nothing": (png_with(b"", 0, 8), (415, 422)),
    "two billion pixels": (png_with(b"", 46_000, 46_000), (413,)),
    "HTML under the head of a PNG": (b"\x89PNG\r\n\x1a\n<html><script>alert(1)</script>", (415, 422)),
    "SVG with an entity": (b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg/>', (415,)),
    "a zip": (b"PK\x03\x04" + bytes(100), (415,)),
    "an EPS that would be run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", (415,)),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_deceptive_files_are_refused_or_read_as_the_image_that_they_are(
    client: TestClient, name: str
) -> None:
    resource = pytest.importorskip("resource", reason="memory is measured on Unix")
    content, statuses = STRANGE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in ("image/png", "text/html", "application/zip"):  # what the client calls it counts for nothing
        answer = search(client, content, kind=kind)
        assert answer.status_code in statuses, answer.text
        assert "<script>" not in answer.text
        assert "Traceback" not in answer.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert search(client, picture(1)).status_code == 200


def test_a_picture_that_is_a_script_too_is_read_as_a_picture_and_never_given_back(client: TestClient) -> None:
    polyglot = picture(5, "JPEG") + b"<script>alert(1)</script>PK\x05\x06" + bytes(18)
    plain = search(client, picture(5, "JPEG")).json()["results"]
    answer = search(client, polyglot, name="x.html", kind="text/html")
    assert answer.json()["results"] == plain
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    added = client.post("/v1/items", files=[("image", ("x.html", polyglot, "text/html"))]).json()["items"][0]
    shown = client.get(f"/v1/items/{added['id']}/image")
    assert shown.status_code == 404  # what was sent is not stored
    assert "<script>" not in client.get(f"/v1/items/{added['id']}").text


def test_many_frames_are_read_as_the_first(client: TestClient) -> None:
    assert search(client, frames(60)).json()["results"] == search(client, frames(1)).json()["results"]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\\..\\b", "x" * 500, "a%00.png", "CON"]
)
def test_names_of_files_reach_no_file_and_no_answer(client: TestClient, name: str) -> None:
    answer = search(client, picture(1), name=name)
    assert answer.status_code == 200
    assert name not in answer.text
    added = client.post("/v1/items", files=[("image", (name, picture(90)))])
    assert added.status_code == 201
    item = added.json()["items"][0]["id"]
    assert "etc" not in client.get(f"/v1/items/{item}").text


FILTERS = [
    {"label'; DROP TABLE items; --": "cat"},
    {"label": "x' OR '1'='1"},
    {"label": {"$gt": ""}},
    {"label": ["cat'); DELETE FROM items; --"]},
    {"$.label": "cat"},
    {"": "cat"},
    {"a" * 5000: 1},
    {"label": [f"{n}" for n in range(5000)]},
]


@pytest.mark.parametrize("where", FILTERS, ids=range(len(FILTERS)))
def test_filters_are_values_and_no_code(client: TestClient, where: dict[str, Any]) -> None:
    before = client.get("/v1/info").json()["items"]
    answer = search(client, picture(1), where=json.dumps(where), k=100)
    if answer.status_code == 200:
        assert answer.json()["results"] == []
    else:
        assert answer.status_code == 422
        assert len(answer.text) < 2000
    assert client.get("/v1/info").json()["items"] == before
    assert len(search(client, picture(1), k=100).json()["results"]) == before


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 1000, "{", "null", '{"a": 1e999}', "\x00"])
def test_filters_that_are_none_are_refused(client: TestClient, text: str) -> None:
    answer = search(client, picture(1), where=text)
    assert answer.status_code == 422
    assert len(answer.text) < 2000


@pytest.mark.parametrize("path", ["/../etc/passwd", "/static/../../x", "/v1/items/1%2f..%2f..", "/%2e%2e/x"])
def test_paths_lead_nowhere(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (404, 405, 422)


def test_headers_do_not_come_back(client: TestClient) -> None:
    evil = {"Idempotency-Key": "a b;c", "X-Request-ID": "chosen", "X-Forwarded-For": "1.2.3.4"}
    answer = client.post("/v1/items", files=[("image", ("x", picture(91)))], headers=evil)
    assert answer.headers["x-request-id"] != "chosen"
    assert "chosen" not in answer.text
    long = {"Idempotency-Key": "k" * 100_000}
    assert client.post("/v1/items", files=[("image", ("x", picture(92)))], headers=long).status_code == 422
    squeezed = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    body = zlib.compress(bytes(1 << 20))
    assert client.request("DELETE", "/v1/items", content=body, headers=squeezed).status_code in (
        400,
        415,
        422,
    )


def test_zero_characters_cut_no_filter_and_no_key(client: TestClient) -> None:
    items = json.dumps([{"key": "sku", "payload": {"tenant": "alice"}}])
    client.post("/v1/items", files=[("image", ("x", picture(93)))], data={"items": items})
    where = json.dumps({"tenant": "alice\0nobody"})
    evil = json.dumps([{"payload": {"tenant": "alice\0"}}])
    answers = [
        search(client, picture(1), where=where),
        client.request("DELETE", "/v1/items", json={"keys": ["sku\0x"]}),
        client.post("/v1/items", files=[("image", ("x", picture(94)))], data={"items": evil}),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert "zero character" in answer.json()["error"]
    assert len(search(client, picture(93), where='{"tenant": "alice"}').json()["results"]) == 1
