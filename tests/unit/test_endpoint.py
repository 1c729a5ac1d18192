"""Searches behind HTTP: honest ones, and those that time out, refuse, contradict themselves or lie about
order."""

from __future__ import annotations

import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from robusthash.models.external.wrapper import Broken, foreign

pytest.importorskip("httpx")

from robusthash.models.external.http_endpoint import Endpoint

IMAGES = torch.linspace(0, 1, 3 * 3 * 16 * 16).view(3, 3, 16, 16)


def mean_bits(body: bytes) -> list[int]:
    """A tiny hash: each of 16 rows against the mean."""
    pixels = np.asarray(Image.open(io.BytesIO(body)).convert("L"), dtype=float)
    return (pixels.mean(1) > pixels.mean()).astype(int).tolist()


@contextmanager
def served(answer):
    """An endpoint on 127.0.0.1 whose ``answer(body, number)`` is (status, headers, JSON or bytes)."""
    numbers = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            numbers.append(self.headers)
            status, headers, content = answer(body, len(numbers))
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/search", numbers
    finally:
        server.shutdown()
        server.server_close()


def quick(url, **settings):
    waits = []
    endpoint = Endpoint(url, **{"rate": 1e6, "sleep": waits.append, **settings})
    return endpoint, waits


def test_codes_and_hex_are_the_same_victim():
    with served(lambda body, n: (200, {}, {"code": mean_bits(body)})) as (url, _):
        listed = foreign(quick(url)[0], IMAGES, url)
    with served(lambda body, n: (200, {}, {"code": np.packbits(mean_bits(body)).tobytes().hex()})) as (
        url,
        asked,
    ):
        endpoint, _ = quick(url, headers={"authorization": "Bearer abc"})
        packed = foreign(endpoint, IMAGES, url)
        logits = packed.hasher({"image": IMAGES})["image"].logits
        assert endpoint.asked == len(asked) == 3  # the same pixels are asked about once
        assert asked[0]["authorization"] == "Bearer abc"
        assert asked[0]["content-type"] == "image/png"
        assert "abc" not in repr(endpoint)
    assert (listed.form, packed.form, packed.gradients) == ("zero-one", "zero-one", False)
    assert logits.shape == (3, 16)


def test_ids_with_distances_in_order():
    with served(lambda body, n: (200, {}, {"ids": ["a", 7], "distances": [0, 3]})) as (url, _):
        answer = quick(url)[0].check_consistency(IMAGES[:1])
    assert answer.ids == ("a", "7")
    assert answer.distances == (0.0, 3.0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"ids": ["a", "b"], "distances": [3, 1]},
            "lies about its order: 'b' at distance 1 stands after 'a'",
        ),
        ({"ids": ["a", "a"]}, "list of different ids"),
        ({"ids": []}, "list of different ids"),
        ({"ids": ["a", "b"], "distances": [1]}, "not as many numbers"),
        ({"ids": ["a", "b"], "distances": [1, None]}, "not as many numbers"),
        ({"code": "xyz"}, "hex digits"),
        ({"code": [0, 1, 2]}, "list of 0/1"),
        ({"code": [[0], [1]]}, "list of 0/1"),
        ({"hash": "ff"}, '"code"'),
        ([1, 2], '"code"'),
        (b"<html>", "no JSON"),
        (b'"' + b"x" * (1 << 20) + b'"', "more than 1048576"),
    ],
)
def test_answers_that_do_not_hold_together(content, said):
    with served(lambda body, n: (200, {}, content)) as (url, _), pytest.raises(Broken, match=said):
        quick(url)[0].check_consistency(IMAGES[:1])


def test_an_endpoint_that_changes_its_mind():
    with (
        served(lambda body, n: (200, {}, {"ids": [f"item {n}"]})) as (url, _),
        pytest.raises(Broken, match="two answers to the same image"),
    ):
        quick(url)[0].check_consistency(IMAGES[:1])


def test_an_endpoint_whose_codes_change_length():
    with (
        served(lambda body, n: (200, {}, {"code": [0, 1] * n})) as (url, _),
        pytest.raises(Broken, match=r"different length: \[2, 4, 6\]"),
    ):
        quick(url)[0](IMAGES)


def test_too_many_requests_are_waited_for():
    def answer(body, number):
        return (429, {"retry-after": "7"}, {}) if number <= 2 else (200, {}, {"code": [0, 1]})

    with served(answer) as (url, _):
        endpoint, waits = quick(url)
        assert endpoint(IMAGES[:1]).tolist() == [[False, True]]
    assert waits == [7.0, 7.0]
    assert endpoint.asked == 3


def test_pauses_grow_and_end():
    with served(lambda body, n: (429, {}, {})) as (url, _):
        endpoint, waits = quick(url, retries=3, pause=0.5)
        with pytest.raises(Broken, match="answered status 429, 4 times; lower --rate"):
            endpoint(IMAGES[:1])
    assert waits == [0.5, 1.0, 2.0]


def test_a_wait_of_an_hour_is_told_instead():
    with (
        served(lambda body, n: (429, {"retry-after": "3600"}, {})) as (url, _),
        pytest.raises(Broken, match="asks to wait 3600 s"),
    ):
        quick(url)[0](IMAGES[:1])


def test_an_endpoint_that_times_out():
    def answer(body, number):
        time.sleep(0.6)
        return 200, {}, {"code": [1]}

    with served(answer) as (url, _), pytest.raises(Broken, match=r"did not answer within 0.1 s, 2 times"):
        quick(url, timeout=0.1, retries=1)[0](IMAGES[:1])


def test_an_endpoint_that_is_not_there_or_refuses():
    with (
        served(lambda body, n: (403, {}, b"who are you")) as (url, _),
        pytest.raises(Broken, match="status 403: who are you"),
    ):
        quick(url)[0](IMAGES[:1])
    with pytest.raises(Broken, match="cannot be asked"):
        quick(url)[0](IMAGES[:1])


def test_the_budget_and_the_rate():
    with served(lambda body, n: (200, {}, {"code": [1]})) as (url, _):
        endpoint, waits = quick(url, budget=2, rate=4.0)
        with pytest.raises(Broken, match=r"budget of 2 questions .* is spent"):
            endpoint(IMAGES)
        assert len(waits) == 1
        assert 0 < waits[0] <= 0.25
        with pytest.raises(ValueError, match="5 questions and 0 of the budget"):
            endpoint.check_budget(5)


@pytest.mark.parametrize("settings", [{"budget": 0}, {"rate": 0}, {"timeout": -1}, {"retries": -1}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="must be"):
        Endpoint("http://127.0.0.1:1", **settings)
