"""The client of the search service among answers of all kinds, each an error of one line or a result."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from robusthash.client import Client, ServiceError

Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler, **options: Any) -> Client:
    client = Client("http://service", **options)
    client._http = httpx.Client(base_url="http://service", transport=httpx.MockTransport(handler))
    return client


def answering(*answers: httpx.Response, **options: Any) -> tuple[Client, list[httpx.Request]]:
    """A client whose requests get these answers, and the requests."""
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answers[min(len(requests), len(answers)) - 1]

    return client_of(handle, **options), requests


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def busy(status: int = 503, **headers: str) -> httpx.Response:
    return httpx.Response(
        status, json={"error": "busy"}, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


DONE = httpx.Response(200, json={"removed": 1})


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("-1", 1, 1),
        ("soon", 1, 1),
        ("nan", 1, 1),
        (None, 1, 1),
        ("date", 3, 6),
        ("past", 0, 0),
    ],
)
def test_it_waits_as_it_is_told(slept: list[float], after: str | None, least: float, most: float) -> None:
    dates = {"date": formatdate(time.time() + 6, usegmt=True), "past": formatdate(0, usegmt=True)}
    told = {} if after is None else {"Retry_After": dates.get(after, after)}
    client, requests = answering(busy(**told), DONE)
    assert client.remove([1]) == 1
    assert len(requests) == 2
    assert least <= slept[0] <= most


def test_a_long_wait_is_an_error_at_once(slept: list[float]) -> None:
    client, requests = answering(busy(429, Retry_After="3600"))
    with pytest.raises(ServiceError, match=r"429: busy \(may be asked again in 3600 s\)") as raised:
        client.info()
    assert (len(requests), slept, raised.value.status, raised.value.retry_after) == (1, [], 429, 3600)


CALLS: dict[str, Callable[[Client], Any]] = {
    "search": lambda client: client.search(b"x"),
    "add": lambda client: client.add([b"x"]),
    "item": lambda client: client.item(1),
    "remove": lambda client: client.remove([1]),
    "info": lambda client: client.info(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("content", [b"<html>", b"", b"[1]", b"null", b"3", b'"a"', b"[" * 100_000])
def test_a_success_that_is_none_of_the_service_is_an_error(call: str, content: bytes) -> None:
    client, _ = answering(httpx.Response(200, content=content))
    with pytest.raises(ServiceError, match="200: no answer of this service: "):
        CALLS[call](client)


@pytest.mark.parametrize(
    ("call", "body"),
    [(c, {}) for c in CALLS if c != "info"]
    + [
        ("search", {"results": [{"id": 1}]}),
        ("add", {"items": [{}]}),
        ("item", {"payload": 3}),
        ("remove", {"removed": None}),
    ],
)
def test_an_answer_without_its_fields_is_an_error(call: str, body: Any) -> None:
    client, _ = answering(httpx.Response(200, json=body))
    with pytest.raises(ServiceError, match="no answer of this service"):
        CALLS[call](client)


def test_errors_have_a_message_whatever_the_answer() -> None:
    client, _ = answering(httpx.Response(302, headers={"Location": "https://other/v1/info"}))
    with pytest.raises(
        ServiceError, match="302: Found; it redirects to https://other/v1/info: give the client"
    ):
        client.info()
    client, _ = answering(httpx.Response(500, json=[1]))
    with pytest.raises(ServiceError, match=r"500: \[1\]"):
        client.info()
    client, _ = answering(httpx.Response(502))
    with pytest.raises(ServiceError, match="502: Bad Gateway"):
        client.info()


def test_arguments_that_cannot_be_sent_are_refused() -> None:
    client, requests = answering(DONE)
    for ids, keys in (([1], ["a"]), (None, None)):
        with pytest.raises(ValueError, match="give ids or keys: one of them"):
            client.remove(ids, keys)
    for key in ("schl\u00fcssel", "", " a", "a\nb", "a" * 201):
        with pytest.raises(ValueError, match="an idempotency key has 1 to 200 printable ASCII"):
            client.add([b"x"], idempotency_key=key)
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        Client("http://service", attempts=0)
    with pytest.raises(ValueError, match="a token is printable ASCII"):
        Client("http://service", token="rh_\u00fc")
    assert requests == []


@pytest.mark.parametrize(("fields", "sent"), [([], True), (None, False)])
def test_no_fields_are_sent_as_none(fields: list[str] | None, sent: bool) -> None:
    client, requests = answering(httpx.Response(200, json={"results": []}))
    client.search(text="a", fields=fields)
    assert (b"fields=" in requests[0].content) == sent
