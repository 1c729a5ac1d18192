"""The search service where requests repeat or collide, and where its index or its files are not as they were."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service_parts import index, parts, picture

from robusthash.apps.experiment.index_run import build_index
from robusthash.apps.service.api import create_app
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.serving import _reload
from robusthash.apps.service.settings import ServiceSettings
from robusthash.apps.service.tokens import Token, TokenFile
from robusthash.index.file_index import FileIndex

__all__ = ["index", "parts"]  # fixtures


def serving(
    parts: tuple[Path, Path], index: Path, tokens: tuple[Token, ...] = (), **settings: Any
) -> TestClient:
    given = ServiceSettings(rate=0, max_wait=60_000, detection=False, **settings)
    service = SearchService(parts[0], f"file:{index}", given, parts[1], "cpu")
    return TestClient(create_app(service, tokens), raise_server_exceptions=False)


@pytest.fixture
def client(parts: tuple[Path, Path], index: Path) -> Iterator[TestClient]:
    with serving(parts, index) as client:
        yield client


def add(
    client: TestClient, key: str, items: Any = None, seeds: tuple[int, ...] = (50,), **headers: str
) -> Any:
    files = [("image", ("x", picture(seed))) for seed in seeds]
    data = {} if items is None else {"items": json.dumps(items)}
    return client.post("/v1/items", files=files, data=data, headers={"Idempotency-Key": key, **headers})


def search(client: TestClient, seed: int = 1, **form: Any) -> Any:
    return client.post("/v1/search", files={"image": ("x", picture(seed))}, data=form)


def count(client: TestClient) -> int:
    return client.get("/v1/info").json()["items"]


# --- idempotency keys


@pytest.mark.parametrize("own", [False, True], ids=["made keys", "own keys"])
def test_of_different_requests_at_once_under_one_key_one_is_done(client: TestClient, own: bool) -> None:
    before = count(client)
    items = [[{"payload": {"n": n}, **({"key": f"own-{n}"} if own else {})}] for n in range(4)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda one: add(client, "k", one), items))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert count(client) == before + 1
    done = next(n for n, answer in enumerate(answers) if answer.status_code == 201)
    assert add(client, "k", items[done]).json() == answers[done].json()


@pytest.mark.parametrize("key", [{}, {"key": None}, {"key": "own"}], ids=["none", "null", "own"])
def test_a_key_belongs_to_one_whole_request_also_after_a_restart(parts, index: Path, key: dict) -> None:
    items, two = [{"payload": {"n": 1}, **key}], [{"payload": {"n": 1}, **key}, {}]
    with serving(parts, index) as client:
        first = add(client, "k", items)
        assert first.status_code == 201
        held = count(client)
    for _ in range(2):
        with serving(parts, index) as client:
            others = [
                add(client, "k", [{"payload": {"n": 2}, **key}]),
                add(client, "k", two, (50, 51)),
                add(client, "k", items, (51,)),
            ]
            assert [other.status_code for other in others] == [409] * 3
            assert add(client, "k", items).json() == first.json()
            assert add(client, "k", [{**key, "payload": {"n": 1}}]).json() == first.json()
            assert count(client) == held
    with serving(parts, index) as client:
        assert add(client, "j", two, (50, 51)).status_code == 201
        assert add(client, "j", items).status_code == 409


def test_a_request_that_failed_takes_no_key(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(SearchService, "add", full)
        assert add(client, "k", [{"payload": {"n": 1}}]).status_code == 507
    assert add(client, "k", [{"payload": {"n": 2}}]).status_code == 201


def test_each_client_has_keys_of_its_own(parts, index: Path, tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    texts = [file.add(name, ["read", "write"]) for name in ("alice", "bob")]
    with serving(parts, index, tuple(file.tokens())) as client:
        answers = [
            add(client, "17", [{"payload": {"n": n}}], Authorization=f"Bearer {text}")
            for n, text in enumerate(texts)
        ]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert answers[0].json()["items"][0]["id"] != answers[1].json()["items"][0]["id"]


def test_an_empty_key_is_refused(client: TestClient) -> None:
    assert add(client, "").status_code == 422


# --- the index


def test_a_reload_without_an_index_makes_none(
    client: TestClient, index: Path, tmp_path: Path, caplog
) -> None:
    index.rename(tmp_path / "away")
    answer = client.post("/v1/reload")
    assert answer.status_code == 503
    assert str(tmp_path) not in answer.text
    assert str(index) in caplog.text
    with caplog.at_level(logging.ERROR):
        _reload(client.app.state.working)
    assert not index.exists()
    assert len(search(client).json()["results"]) == 10
    (tmp_path / "away").rename(index)
    assert client.post("/v1/reload").json() == {"items": 12}


def test_nothing_is_made_where_there_is_no_index(parts, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no index"):
        serving(parts, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_reload_of_what_is_no_index_serves_the_one_before(
    client: TestClient, index: Path, tmp_path
) -> None:
    index.rename(tmp_path / "old")
    for make in (
        lambda: (index / "index.sqlite").write_bytes(b"no index" * 1024),
        lambda: (index / "index.sqlite").mkdir(),
    ):
        index.mkdir()
        make()
        answer = client.post("/v1/reload")
        assert answer.status_code == 503
        assert str(index) not in answer.text
        shutil.rmtree(index)
        assert search(client).status_code == 200


def test_reloads_at_once_all_answer(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = FileIndex.count

    def count_slowly(self: FileIndex) -> int:
        time.sleep(0.05)
        return counted(self)

    monkeypatch.setattr(FileIndex, "count", count_slowly)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: client.post("/v1/reload"), range(24)))
    assert [answer.json() for answer in answers] == [{"items": 12}] * 24


def test_a_damaged_payload_is_no_missing_item(client: TestClient, index: Path, caplog) -> None:
    with sqlite3.connect(index / "index.sqlite") as store:
        store.execute("UPDATE payloads SET value = '{' WHERE id = 3")
    store.close()
    for answer in (client.get("/v1/items/3"), search(client, 3), client.get("/v1/items/3/image")):
        assert answer.status_code == 503
        assert answer.headers["x-request-id"] in answer.json()["error"]
        assert "index.sqlite" not in answer.text
    assert "a payload is no JSON" in caplog.text
    assert client.get("/v1/items/4").status_code == 200


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EIO, 503), (errno.EACCES, 503)])
def test_faults_of_the_disk_are_no_faults_of_the_client(client, monkeypatch, caplog, number, status) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, "it failed", "/secret/index.sqlite")

    monkeypatch.setattr(SearchService, "add", fail)
    monkeypatch.setattr(SearchService, "remove", fail)
    for answer in (add(client, "k"), client.delete("/v1/items/1")):
        assert answer.status_code == status
        assert "/secret" not in answer.text
    assert "Traceback" not in caplog.text
    assert "/secret" in caplog.text


# --- what is given back, and what is taken


def test_a_file_is_shown_as_the_image_that_it_holds(parts, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "evil.html").write_bytes(picture(1))
    build_index(tmp_path / "index", parts[0], photos)
    with serving((parts[0], photos), tmp_path / "index") as client:
        shown = client.get("/v1/items/0/image")
        assert shown.headers["content-type"] == "image/png"
        assert "sandbox" in shown.headers["content-security-policy"]
        for content in (b"<script>alert(1)</script>", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
            (photos / "evil.html").write_bytes(content)
            shown = client.get("/v1/items/0/image")
            assert shown.headers["content-type"] == "application/octet-stream"
            assert shown.headers["content-disposition"] == "attachment"
            assert "sandbox" in shown.headers["content-security-policy"]


@pytest.mark.parametrize(
    "one", [True, 3.0, "3.0", "+3", " 3", "1_0", "\u0663", None, -1, 2**63, "9" * 19, [3]]
)
def test_ids_are_whole_numbers_or_their_digits(client: TestClient, one: Any) -> None:
    answer = client.request("DELETE", "/v1/items", json={"ids": [2, one]})
    assert answer.status_code == 422
    assert count(client) == 12
    if isinstance(one, str):
        assert client.get(f"/v1/items/{one}").status_code == 422


def test_filters_are_bounded_and_tell_nothing_of_other_items(client: TestClient) -> None:
    add(client, "k", [{"payload": {"tenant_of_bob": 1}}])
    filters: list[Any] = [
        {f"k{n}": 1 for n in range(999)},
        {"label": list(range(1_001))},
        {"tenant_of_bo": 1},
    ]
    for where in [*filters, {"\ud800": 1}]:
        answer = search(client, where=json.dumps(where))
        assert answer.status_code == 422
        assert "tenant_of_bob" not in answer.text
        assert len(answer.json()["error"]) > 10


def test_hosts_of_this_machine_are_taken_in_any_notation(client: TestClient) -> None:
    for host in ("127.0.0.2", "127.0.0.2:8765", "LOCALHOST:8765", "[::1]", "[::1]:8765"):
        own = {"Host": host, "Origin": f"http://{host.lower()}"}
        assert client.get("/v1/info", headers=own).status_code == 200
    for host in (
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "me@localhost",
        "[::1].evil",
        "localhost:x",
    ):
        assert client.get("/v1/info", headers={"Host": host}).status_code == 421


def test_answers_lead_nowhere_else(parts, index: Path) -> None:
    with serving(parts, index, max_pixels=100) as client:
        for path in ("/metrics/", "/v1/info/", "/v1/items/3/"):
            answer = client.get(path, headers={"Host": "localhost"}, follow_redirects=False)
            assert (answer.status_code, answer.headers.get("location")) == (404, None)
        large = search(client)
        assert large.status_code == 413
        assert large.json() == {
            "error": "the image has 80 x 60 = 4800 pixels, more than the limit of 100; send a smaller one"
        }


def test_the_type_of_a_body_is_read_in_any_case(client: TestClient) -> None:
    answer = client.post("/v1/search", content=picture(3), headers={"Content-Type": "Image/PNG"})
    assert answer.json()["results"][0]["id"] == 3
