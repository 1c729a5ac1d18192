"""The search service: answers, writes, limits, tokens, and what strangers send."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from service_parts import CONFIG, index, listening, parts, picture

import robusthash as rh
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.index_run import search_by
from robusthash.apps.experiment.training_stages import train
from robusthash.apps.service.api import create_app
from robusthash.apps.service.batching import Batcher, Overloaded
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.serving import Serving, _reload, read_settings
from robusthash.apps.service.settings import ServiceSettings
from robusthash.apps.service.tokens import Token, TokenFile, token_of
from robusthash.core.types import Codes
from robusthash.index.file_index import FileIndex
from robusthash.index.index_address import ServerRefused

__all__ = ["index", "parts"]  # fixtures

OPEN = ServiceSettings(rate=0, max_wait=60_000)


def serving(
    parts: tuple[Path, Path],
    index: Path,
    settings: ServiceSettings = OPEN,
    tokens: tuple[Token, ...] = (),
    images: bool = False,
) -> TestClient:
    service = SearchService(parts[0], f"file:{index}", settings, parts[1] if images else None, "cpu")
    return TestClient(create_app(service, tokens), raise_server_exceptions=False)


@pytest.fixture
def client(parts: tuple[Path, Path], index: Path) -> Iterator[TestClient]:
    with serving(parts, index) as client:
        yield client


def search(client: TestClient, content: bytes, **form: Any) -> Any:
    return client.post("/v1/search", files={"image": ("x", content)}, data=form)


def search_codes(run: Path, content: bytes) -> Codes:
    return rh.load(run).encode([Image.open(io.BytesIO(content)).convert("RGB")])


def found(client: TestClient, content: bytes) -> list[tuple[int, int]]:
    return [(hit["id"], hit["distance"]) for hit in search(client, content, k=100).json()["results"]]


def add(client: TestClient, content: bytes, items: Any = None, **headers: str) -> Any:
    data = {} if items is None else {"items": json.dumps(items)}
    return client.post("/v1/items", files=[("image", ("x", content))], data=data, headers=headers)


# --- answers


def test_a_search_answers_as_the_command_line_does(client: TestClient, index: Path, parts) -> None:
    path = parts[1] / "03.png"
    hits = search(client, path.read_bytes(), k=5).json()["results"]
    expected = search_by(index, path, k=5)
    assert [(hit["id"], hit["distance"]) for hit in hits] == [
        (one["id"], one["distance"]) for one in expected
    ]
    assert len(hits) == 5
    assert hits[0]["distance"] == 0


def test_ids_are_numbers_and_texts_and_taken_as_either(client: TestClient, index: Path, parts) -> None:
    large = (1 << 62) + 1
    with rh.open_index(f"file:{index}") as held:
        one = search_codes(parts[0], picture(90))
        held.add(Codes(one.packed, one.bits, torch.tensor([large]), one.origin), [{"label": "large"}])
    hit = search(client, picture(90), where=json.dumps({"label": "large"})).json()["results"][0]
    assert (hit["id"], hit["id_text"]) == (large, str(large))
    assert client.get(f"/v1/items/{large}").json()["id_text"] == str(large)
    made = add(client, picture(91)).json()["items"][0]
    assert made["id_text"] == str(made["id"])
    removed = client.request("DELETE", "/v1/items", json={"ids": [str(large), str(made["id"])]})
    assert removed.json() == {"removed": 2}


def test_a_search_is_repeated_where_an_item_was_removed_meanwhile(
    client: TestClient, index: Path, parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = found(client, picture(3)), FileIndex.payload
    assert (3, 0) in before

    def payload(self: FileIndex, ids: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(FileIndex, "payload", read)
        self.remove([3])
        return self.payload(ids)

    monkeypatch.setattr(FileIndex, "payload", payload)
    assert found(client, picture(3)) == [hit for hit in before if hit[0] != 3]


def test_a_snapshot_is_served_as_the_index_is(parts, index: Path, tmp_path: Path) -> None:
    with rh.open_index(f"file:{index}") as held:
        held.snapshot(tmp_path / "copy")
    serving = Serving.of(str(tmp_path / "copy"), None, None, None, ServiceSettings())
    assert serving.service.info()["items"] == 12
    serving.service.close()


def test_no_answer_names_a_path_of_the_servers_disk(client: TestClient, parts) -> None:
    answers = [search(client, picture(3)).text, client.get("/v1/items/3").text, client.get("/v1/info").text]
    guess = json.dumps({"path": str(parts[1] / "03.png")})
    assert search(client, picture(3), where=guess).status_code == 422
    answers += [search(client, b"\xff\xd8\xff broken").text, search(client, b"GIF89a").text]
    for text in answers:
        assert str(parts[1]) not in text
        assert "Traceback" not in text
        assert "/runs/" not in text
    assert json.loads(answers[1])["payload"] == {"file": "03.png"}


def test_answers_can_hide_distances(parts, index: Path) -> None:
    exact: list[int] = []
    for answer in ("distances", "coarse", "ids", "codes"):
        with serving(parts, index, OPEN.model_copy(update={"answer": answer, "step": 3})) as client:
            body = search(client, picture(0), k=12).json()
            shown = [hit.get("distance") for hit in body["results"]]
            if answer == "distances":
                exact = shown
                assert any(distance % 3 for distance in exact)
            expected = {"ids": [None] * 12, "coarse": [distance // 3 * 3 for distance in exact]}
            assert shown == expected.get(answer, exact)
            assert ("code" in body) == (answer == "codes")


def test_filters_fields_and_missing_items(client: TestClient) -> None:
    add(client, picture(40), [{"key": "a", "payload": {"label": "cat", "year": 2024}}])
    hits = search(client, picture(1), where='{"label": "cat"}', fields="year").json()["results"]
    assert [hit["payload"] for hit in hits] == [{"year": 2024}]
    none = search(client, picture(1), where='{"label": "cat"}', fields="").json()["results"]
    assert [hit["payload"] for hit in none] == [{}]
    unknown = search(client, picture(1), where='{"colour": "red"}')
    assert unknown.status_code == 422
    assert "colour" in unknown.json()["error"]
    assert client.get("/v1/items/999").status_code == 404
    assert client.delete("/v1/items/999").status_code == 404
    assert client.get("/v1/items/99999999999999999999").status_code == 422


def test_items_are_not_filtered_by_their_files_and_the_answer_says_so(client: TestClient) -> None:
    add(client, picture(40), [{"payload": {"label": "cat"}}])
    for where in ('{"path": "/a.png"}', '{"file": "00.png"}'):
        refused = search(client, picture(1), where=where)
        assert refused.status_code == 422
        message = refused.json()["error"]
        assert "neither is filtered by" in message
        assert "Known: path" not in message
    assert "'labels'" in search(client, picture(1), where='{"labels": "cat"}').json()["error"]


def test_the_keys_of_clients_are_answered_and_those_of_files_are_not(client: TestClient) -> None:
    new = add(client, picture(41), [{"key": "sku-7"}]).json()["items"][0]
    hits = search(client, picture(41), k="13").json()["results"]
    assert {hit["id"]: hit.get("key") for hit in hits if "key" in hit} == {new["id"]: "sku-7"}
    assert len(hits) == 13
    assert client.get(f"/v1/items/{new['id']}").json()["key"] == "sku-7"
    assert "key" not in client.get("/v1/items/0").json()


# --- writes


def test_info_says_which_guards_are_on(client: TestClient, parts, index: Path) -> None:
    limits = client.get("/v1/info").json()["limits"]
    assert (limits["detection"], limits["agreement"]) == (True, None)
    with serving(parts, index, ServiceSettings(detection=False, agreement=3)) as other:
        limits = other.get("/v1/info").json()["limits"]
        assert (limits["detection"], limits["agreement"]) == (False, 3)


def test_an_item_is_added_replaced_and_removed(client: TestClient) -> None:
    first = add(client, picture(50), [{"key": "shoe", "payload": {"label": "shoe"}}])
    assert first.status_code == 201
    item = first.json()["items"][0]
    assert not item["replaced"]
    assert (item["id"], 0) in found(client, picture(50))
    again = add(client, picture(51), [{"key": "shoe"}]).json()["items"][0]
    assert (again["id"], again["replaced"]) == (item["id"], True)
    assert (item["id"], 0) in found(client, picture(51))
    removed = client.request("DELETE", "/v1/items", json={"keys": ["shoe", "none"]})
    assert removed.json() == {"removed": 1}
    assert client.get(f"/v1/items/{item['id']}").status_code == 404


def test_the_same_write_twice_adds_once_and_another_under_its_key_is_refused(client: TestClient) -> None:
    before = client.get("/v1/info").json()["items"]
    one = add(client, picture(60), **{"Idempotency-Key": "k1"})
    two = add(client, picture(60), **{"Idempotency-Key": "k1"})
    assert one.json() == two.json()
    assert client.get("/v1/info").json()["items"] == before + 1
    assert add(client, picture(61), **{"Idempotency-Key": "k1"}).status_code == 409
    assert add(client, picture(60), **{"Idempotency-Key": "k2"}).json() != one.json()
    plain = [add(client, picture(60)).json()["items"][0]["id"] for _ in range(2)]
    assert plain[0] != plain[1]


def test_an_item_of_a_key_is_replaced_under_another_idempotency_key(client: TestClient) -> None:
    first = add(client, picture(62), [{"key": "own"}], **{"Idempotency-Key": "k3"}).json()["items"][0]
    second = add(client, picture(63), [{"key": "own"}], **{"Idempotency-Key": "k4"}).json()["items"][0]
    assert (second["id"], second["replaced"]) == (first["id"], True)
    assert (first["id"], 0) in found(client, picture(63))


def test_a_write_of_many_images_is_admitted_as_one(parts, index: Path) -> None:
    with serving(parts, index, ServiceSettings(rate=0, max_wait=0.001, queue=2, batch=1)) as client:
        search(client, picture(1))
        files = [("image", ("x", picture(200 + n))) for n in range(12)]
        assert len(client.post("/v1/items", files=files).json()["items"]) == 12


def test_an_index_that_was_replaced_is_taken_up_without_an_error(parts, index: Path, tmp_path: Path) -> None:
    run, photos = parts
    with serving(parts, index) as client:
        errors: list[int] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                if (status := search(client, picture(2)).status_code) != 200:
                    errors.append(status)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for count in (13, 14, 15):
            with rh.open_index(f"file:{index}") as old:
                old.snapshot(tmp_path / f"next-{count}")
            with rh.open_index(f"file:{tmp_path / f'next-{count}'}") as new:
                new.add(rh.load(run).encode([photos / "00.png"]), keys=[f"more-{count}"])
            index.rename(tmp_path / f"old-{count}")
            (tmp_path / f"next-{count}").rename(index)
            assert client.post("/v1/reload").json() == {"items": count}
        done.set()
        for thread in threads:
            thread.join()
        assert errors == []
        assert client.get("/v1/info").json()["items"] == 15


# --- limits


@pytest.mark.parametrize(
    ("content", "status", "word"),
    [
        (b"", 415, "JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "JPEG"),
        (b"GIF89a" + bytes(50), 415, "JPEG"),
        (b"%PDF-1.4" + picture(1), 415, "JPEG"),
        (picture(1)[:200], 422, "read"),
        (b"\xff\xd8\xff" + bytes(100), 422, "read"),
        (b"RIFF" + bytes(100), 422, "read"),
    ],
)
def test_uploads_that_are_no_image_are_refused(client, content: bytes, status: int, word: str) -> None:
    answer = search(client, content)
    assert answer.status_code == status
    assert word in answer.json()["error"]


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(client: TestClient) -> None:
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 200_000
    answer = search(client, stream.getvalue())
    assert answer.status_code == 413
    assert "20000 x 20000" in answer.json()["error"]


def test_requests_beyond_the_limits_are_refused(parts, index: Path) -> None:
    settings = ServiceSettings(rate=0, max_bytes=2_000, max_k=5, max_items=1)
    with serving(parts, index, settings) as client:
        assert search(client, bytes(3_000)).status_code == 413
        chunks = iter([b"x" * 1_500, b"x" * 1_500])  # no length is declared
        assert client.post("/v1/search", content=chunks).status_code == 413
        for k in ("6", "0", "-1", "2.5", "many"):
            answer = search(client, b"", k=k)
            assert answer.status_code == 422, k
            assert "k" in answer.json()["error"]
        two = client.post("/v1/items", files=[("image", ("x", b"1")), ("image", ("y", b"2"))])
        assert two.status_code == 422


@pytest.mark.parametrize(
    "items",
    [
        "{",
        "{}",
        "[]",
        '[{"kee": 1}]',
        '[{"key": "a\\nb"}]',
        '[{"key": 5}]',
        '[{"payload": {"path": "/etc/passwd"}}]',
        '[{"payload": 3}]',
        "[" * 5_000,
    ],
)
def test_descriptions_that_do_not_fit_are_refused(client: TestClient, items: str) -> None:
    answer = client.post("/v1/items", files=[("image", ("x", picture(1)))], data={"items": items})
    assert answer.status_code == 422
    assert "items" in answer.json()["error"]


def test_names_of_uploaded_files_are_not_used(client: TestClient, tmp_path: Path) -> None:
    files = [("image", ("../../../etc/cron.d/x", picture(70), "text/html\r\nX-Bad: 1"))]
    answer = client.post("/v1/items", files=files)
    assert answer.status_code in (201, 400, 422)
    assert "x-bad" not in {name.lower() for name in answer.headers}
    assert not (tmp_path / "etc").exists()


def test_a_client_that_asks_too_often_waits(parts, index: Path) -> None:
    with serving(parts, index, ServiceSettings(rate=0.001, burst=3)) as client:
        statuses = [client.get("/v1/info").status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert int(client.get("/v1/info").headers["retry-after"]) > 1
        assert client.get("/healthz").status_code == 200


def test_errors_nobody_expected_are_not_shown(parts, index: Path, monkeypatch, caplog) -> None:
    def broken(self: SearchService, *arguments: Any) -> Any:
        raise RuntimeError("secret of /etc/shadow")

    monkeypatch.setattr(SearchService, "item", broken)
    with serving(parts, index) as client:
        answer = client.get("/v1/items/1")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]
    assert "secret" in caplog.text


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_an_index_that_does_not_answer_is_no_fault_of_the_service(parts, index, monkeypatch, error) -> None:
    class Down:
        """An index on a server that is down, or where another writes all the time."""

        def __getattr__(self, name: str) -> Any:
            raise error("milvus://me@db.example:19530/shoes does not answer")

    with serving(parts, index) as client:
        service, content = client.app.state.working.service, (parts[1] / "03.png").read_bytes()
        monkeypatch.setattr(service, "_index", Down())
        answers = [search(client, content), add(client, content), client.get("/v1/items/1")]
        answers += [client.delete("/v1/items/1"), client.get("/v1/info")]
        for answer in answers:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json() == {"error": "the index does not answer; try again later"}
        monkeypatch.undo()
        assert found(client, content)[0] == (3, 0)


# --- tokens and hosts


def test_tokens_and_their_scopes(parts, index: Path, tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    reader, writer = file.add("shop", ["read"]), file.add("importer", ["read", "write"])
    content = file.path.read_text()
    assert reader not in content
    assert writer not in content
    assert file.path.stat().st_mode & 0o077 == 0
    with serving(parts, index, tokens=tuple(file.tokens())) as client:
        assert search(client, picture(1)).status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").status_code == 200
        for text in ("", "Bearer", "Bearer rh_wrong", f"Basic {reader}", f"Bearer {reader}x"):
            assert client.get("/v1/info", headers={"Authorization": text}).status_code == 401
        client.headers["Authorization"] = f"Bearer {reader}"
        assert search(client, picture(1)).status_code == 200
        assert add(client, picture(1)).status_code == 403
        assert client.post("/v1/reload").status_code == 403
        assert client.delete("/v1/items/1").status_code == 403
        client.headers["Authorization"] = f"Bearer {writer}"
        assert add(client, picture(1)).status_code == 201


def test_a_removed_token_is_refused_after_a_reload(parts, index: Path, tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    writer, reader = file.add("importer", ["read", "write"]), file.add("shop", ["read"])
    served = Serving.of(str(index), parts[0], None, file.path, read_settings(None, {}))
    with TestClient(create_app(served.service, served.tokens)) as client:

        def asked(token: str) -> int:
            return client.get("/v1/info", headers={"Authorization": f"Bearer {token}"}).status_code

        file.remove("shop")
        assert asked(reader) == 200, "as the verb's message says"
        writing = {"Authorization": f"Bearer {writer}"}
        assert client.post("/v1/reload", headers=writing).status_code == 200
        assert (asked(reader), asked(writer)) == (401, 200)
        new = file.add("new", ["read"])
        content = file.path.read_text()
        file.path.write_text("{")
        refused = client.post("/v1/reload", headers=writing)
        assert refused.status_code == 500
        assert str(tmp_path) not in refused.text
        _reload(served)
        assert (asked(new), asked(writer)) == (401, 200), "a damaged file changes nothing"
        file.path.write_text(content)
        _reload(served)  # as SIGHUP does
        assert asked(new) == 200
        for name in ("importer", "new"):
            file.remove(name)
        _reload(served)
        assert (asked(new), client.get("/v1/info").status_code) == (401, 401), "without any, nobody is let in"


def test_refusals_of_tokens_name_the_reason_and_the_client(parts, index: Path, tmp_path, caplog) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    reader = file.add("shop", ["read"])
    caplog.set_level("INFO", "robusthash.service")
    with serving(parts, index, tokens=tuple(file.tokens())) as client:
        assert "a token is needed" in client.get("/v1/info").json()["error"]
        wrong = client.get("/v1/info", headers={"Authorization": "Bearer rh_wrong"})
        assert "unknown token" in wrong.json()["error"]
        client.headers["Authorization"] = f"Bearer {reader}"
        assert client.post("/v1/reload").status_code == 403
    clients = [json.loads(one.message)["client"] for one in caplog.records if one.levelname == "INFO"]
    assert clients == ["testclient", "testclient", "shop"]


def test_token_files_refuse_what_they_cannot_mean(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    with pytest.raises(ValueError, match="scopes are read, write, audit, got admin"):
        file.add("x", ["admin"])
    text = file.add("x", ["read"])
    with pytest.raises(ValueError, match="a name of its own"):
        file.add("x", ["read"])
    assert token_of(text, file.tokens()) == file.tokens()[0]
    with pytest.raises(ValueError, match="has no token 'y'; it has x"):
        file.remove("y")
    file.remove("x")
    assert token_of(text, file.tokens()) is None
    file.path.write_text('{"tokens": [{"name": "x"}]}')
    with pytest.raises(ValueError, match="no token file"):
        file.tokens()


def test_an_open_host_without_tokens_is_refused(parts, index: Path) -> None:
    settings = read_settings(None, {"host": "0.0.0.0"})
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 without tokens"):
        Serving.of(str(index), parts[0], None, None, settings)


def test_pages_of_other_sites_cannot_use_the_service_of_this_machine(client: TestClient) -> None:
    assert client.get("/v1/info", headers={"Host": "evil.example"}).status_code == 421
    for origin in ("https://evil.example", "null"):
        assert client.get("/v1/info", headers={"Origin": origin}).status_code == 403
    own = {"Host": "localhost:8765", "Origin": "http://localhost:8765"}
    assert client.get("/v1/info", headers=own).status_code == 200


def test_settings_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text("max_kk: 5")
    with pytest.raises(ValueError, match=r"no setting 'max_kk'; did you mean 'max_k'\?"):
        read_settings(file, {})
    file.write_text("max_k: 0")
    with pytest.raises(ValueError, match=r"max_k.*got 0"):
        read_settings(file, {})
    file.write_text("max_k: 7")
    assert read_settings(file, {"port": 1}).max_k == 7


def test_an_index_of_another_model_is_refused(parts, index: Path, tmp_path: Path) -> None:
    other = train(make_config({**CONFIG, "runtime": {"device": "cpu", "seed": 1}}), tmp_path / "runs").path
    with pytest.raises(ValueError, match="codes of another model"):
        SearchService(other, f"file:{index}", OPEN, device="cpu")


# --- batches


def test_items_of_several_requests_are_worked_on_together_and_the_queue_is_bounded() -> None:
    sizes: list[int] = []

    def work(items: Any) -> list[int]:
        sizes.append(len(items))
        time.sleep(0.05)
        return [item * 2 for item in items]

    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(work, 4, 0.01, 8, 60)
        batcher.start()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.02)
        others = [asyncio.create_task(batcher.submit(item)) for item in range(1, 9)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded) as full:
            batcher.admit()
        assert full.value.retry_after >= 1
        assert [await first, *[await other for other in others]] == [2 * item for item in range(9)]
        assert sizes == [1, 4, 4]
        await batcher.stop()

    asyncio.run(run())


def test_requests_that_come_at_once_count_before_they_are_read() -> None:
    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(
            lambda items: (time.sleep(0.05), list(items))[1], 1, 0, 100, 0.02
        )
        batcher.start()
        await batcher.submit(0)  # so that the time of an item is known
        batcher.admit()
        with batcher.admitted(), batcher.admitted(), batcher.admitted(), pytest.raises(Overloaded):
            batcher.admit()
        await batcher.stop()

    asyncio.run(run())


def test_a_request_that_is_away_takes_no_room() -> None:
    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(lambda items: (time.sleep(0.05), list(items))[1], 1, 0, 9, 0.001)
        batcher.start()
        await batcher.submit(0)  # so that the time of an item is known
        with batcher.admitted():
            with batcher.away():
                batcher.admit()
            with pytest.raises(Overloaded):
                batcher.admit()
        await batcher.stop()

    asyncio.run(run())


def test_bodies_that_come_slowly_take_no_room(parts, index: Path, monkeypatch) -> None:
    encode = SearchService.encode

    def slowly(*given: Any) -> Any:
        time.sleep(0.1)
        return encode(*given)

    monkeypatch.setattr(SearchService, "encode", slowly)
    settings = ServiceSettings(rate=0, max_wait=50, detection=False)  # less than one encode takes
    service = SearchService(parts[0], f"file:{index}", settings, None, "cpu")
    head = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\nhalf"
    with listening(create_app(service)) as (url, _), ExitStack() as stack:
        files = {"image": ("x.png", picture(3))}
        assert httpx.post(f"{url}/v1/search", files=files).status_code == 200
        for _ in range(3):
            port = int(url.rpartition(":")[2])
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(head)
        time.sleep(0.2)
        assert httpx.post(f"{url}/v1/search", files=files).status_code == 200


def test_an_index_that_its_server_no_longer_has_is_no_fault_of_the_client(client, monkeypatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise ServerRefused("the tables are not those of an index")

    monkeypatch.setattr(FileIndex, "payload", gone)
    assert client.get("/v1/items/3").status_code == 503
    assert search(client, picture(0)).status_code == 503


def test_a_batch_that_fails_fails_its_own_requests_alone() -> None:
    def work(items: Any) -> list[int]:
        if 13 in items:
            raise ValueError("thirteen")
        return list(items)

    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(work, 4, 0, 8, 60)
        batcher.start()
        with pytest.raises(ValueError, match="thirteen"):
            await batcher.submit(13)
        assert await batcher.submit(1) == 1
        await batcher.stop()

    asyncio.run(run())


def test_what_would_wait_too_long_is_not_admitted() -> None:
    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(lambda items: (time.sleep(0.05), list(items))[1], 1, 0, 100, 0.1)
        batcher.start()
        await batcher.submit(0)
        waiting = [asyncio.create_task(batcher.submit(item)) for item in range(20)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            batcher.admit()
        await asyncio.gather(*waiting)
        batcher.admit()
        await batcher.stop()

    asyncio.run(run())


# --- fields that nobody reads


def refused(answer: Any) -> str:
    assert answer.status_code == 422, answer.text
    return answer.json()["error"]


def test_a_search_takes_its_fields_from_the_url_too(client: TestClient) -> None:
    where, image = json.dumps({"label": "cat"}), {"Content-Type": "image/png"}
    answer = client.post("/v1/search?k=3", content=picture(3), headers=image)
    assert answer.json() == search(client, picture(3), k=3).json()
    assert len(answer.json()["results"]) == 3
    answer = client.post(
        "/v1/search", params={"fields": "label", "k": 2}, files={"image": ("x", picture(3))}, data={}
    )
    assert answer.json() == search(client, picture(3), k=2, fields="label").json()
    answer = client.post("/v1/search", params={"where": where}, content=picture(3), headers=image)
    assert answer.json() == search(client, picture(3), where=where).json()
    for value in ("0", "x", "1.5", ""):
        answer = client.post(f"/v1/search?k={value}", content=picture(3), headers=image)
        assert refused(answer).startswith("k: "), value
    assert "at most 100" in refused(client.post("/v1/search?k=101", content=picture(3), headers=image))
    answer = client.post("/v1/search?k=3", files={"image": ("x", picture(3))}, data={"k": 3})
    assert refused(answer) == "k: given in the form and in the URL; give it once"


def test_unknown_fields_are_refused_by_name(client: TestClient) -> None:
    files = {"image": ("x", picture(3))}
    assert "'K' is no parameter of the URL" in refused(client.post("/v1/search?K=5", files=files))
    assert "did you mean 'where'" in refused(client.post("/v1/search?were={}", files=files))
    assert "'text' is no parameter of the URL of this route; it goes into the body" in refused(
        client.post("/v1/search?text=cat")
    )
    assert "'topk' is no form field" in refused(client.post("/v1/search", files=files, data={"topk": 5}))
    assert "k: given 2 times" in refused(client.post("/v1/search?k=5&k=6", files=files))
    twice = [("image", ("x", picture(3))), ("image", ("y", picture(4)))]
    assert "image: given 2 times" in refused(client.post("/v1/search", files=twice))
    assert "'key' is no form field" in refused(client.post("/v1/items", files=files, data={"key": "a"}))
    assert "'id' is no field of the body" in refused(
        client.request("DELETE", "/v1/items", json={"ids": [3], "id": [4]})
    )
    assert client.get("/v1/info").json()["items"] == 12
    assert client.post("/v1/items", files=twice).status_code == 201


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/items/3"),
        ("DELETE", "/v1/items/3"),
        ("GET", "/v1/items/3/image"),
        ("POST", "/v1/items"),
        ("DELETE", "/v1/items"),
        ("POST", "/v1/story"),
        ("GET", "/v1/info"),
        ("GET", "/v1/samples"),
        ("POST", "/v1/reload"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    ],
)
def test_every_route_refuses_unknown_parameters(client: TestClient, method: str, path: str) -> None:
    assert "'x' is no parameter of the URL of this route" in refused(client.request(method, f"{path}?x=1"))
    if method == "POST":
        assert "'x' is no form field of this route" in refused(client.post(path, data={"x": "1"}))
    assert client.get("/v1/info").json()["items"] == 12


# --- the page's story


def test_the_story_shows_a_query_before_and_after_an_attack(parts, index: Path) -> None:
    settings = OPEN.model_copy(update={"attacks": True})
    with serving(parts, index, settings, images=True) as client:
        told = client.post("/v1/story", data={"item": 3, "eps": 8}).json()["models"][0]
        assert 1 <= told["linf"] <= 8.001
        assert told["name"] == "tiny"
        assert 3 not in [hit["id"] for hit in told["clean"]["results"]]
        assert client.get("/v1/items/3/image").content == (parts[1] / "03.png").read_bytes()
        assert len(client.get("/v1/samples").json()["items"]) > 1
    with serving(parts, index) as client:
        assert client.post("/v1/story", data={"item": 3}).status_code == 403
        assert client.get("/v1/items/3/image").status_code == 404
        assert client.get("/v1/samples").json() == {"items": []}


def test_images_outside_the_folder_are_not_shown(parts, index: Path, tmp_path: Path) -> None:
    service = SearchService(parts[0], f"file:{index}", OPEN, tmp_path, "cpu")
    with TestClient(create_app(service)) as client:
        outside = client.get("/v1/items/3/image")
        assert (outside.status_code, outside.json()["error"]) == (
            404,
            "item 3: its image is not below --images",
        )
        assert client.get("/v1/items/99/image").json()["error"] == "there is no item 99"


def test_metrics_count_requests_by_known_routes(client: TestClient) -> None:
    for path in ("/v1/items/3", "/v1/items/4", "/a/b", "/.env", "/v1/x"):
        client.get(path)
    text = client.get("/metrics").text
    assert 'robusthash_requests_total{route="/v1/items/{id}",status="200"} 2.0' in text
    assert 'route="other",status="404"} 3.0' in text
    assert "robusthash_items 12.0" in text
    assert ".env" not in text
