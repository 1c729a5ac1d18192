"""Searches behind HTTP: honest ones, and those that time out, refuse, contradict themselves or lie about
order."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import resource
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from robusthash.models.external.wrapper import Broken, foreign

pytest.importorskip("httpx")

from robusthash.models.external import http_endpoint
from robusthash.models.external.http_endpoint import Endpoint

IMAGES = torch.linspace(0, 1, 3 * 3 * 16 * 16).view(3, 3, 16, 16)


def mean_bits(body: bytes) -> list[int]:
    """A tiny hash: each of 16 rows against the mean."""
    pixels = np.asarray(Image.open(io.BytesIO(body)).convert("L"), dtype=float)
    return (pixels.mean(1) > pixels.mean()).astype(int).tolist()


@contextmanager
def served(answer, port=0):
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

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
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
        assert endpoint.requests_sent == len(asked) == 3  # the same pixels are asked about once
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
        ({"ids": None}, "list of different ids"),
        ({"ids": ["a", "b"], "distances": [1]}, "not as many numbers"),
        ({"ids": ["a", "b"], "distances": [1, None]}, "not as many numbers"),
        ({"code": "xyz"}, "hex digits"),
        ({"code": [0, 1, 2]}, "list of 0/1"),
        ({"code": [[0], [1]]}, "list of 0/1"),
        ({"hash": "ff"}, '"code"'),
        ([1, 2], '"code"'),
        (b"<html>", "no JSON"),
        (b"[" * 100_000, "no JSON"),
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
    assert endpoint.requests_sent == 3


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
        shown: list[tuple[int, int]] = []
        endpoint.progress = lambda done, total, text: shown.append((done, total))
        with pytest.raises(Broken, match=r"budget of 2 queries .* is spent"):
            endpoint(IMAGES)
        assert len(waits) == 1
        assert 0 < waits[0] <= 0.25
        assert shown == [(1, 2), (2, 2)]
        with pytest.raises(ValueError, match=r"5 queries to .* and 0 of the budget"):
            endpoint.check_budget(5)


@pytest.mark.parametrize("settings", [{"budget": 0}, {"rate": 0}, {"timeout": -1}, {"retries": -1}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="must be"):
        Endpoint("http://127.0.0.1:1", **settings)


# ------------------------------------------------------------------------------- searches that find nothing


def nothing_but(found, reply):
    """Finds something for the images in ``found`` by their number, and answers ``reply`` to the others."""
    known = {}

    def answer(body, number):
        row = known.setdefault(body, len(known))
        return (200, {}, {"ids": ["a", "b"], "distances": [0, 2]}) if row in found else reply

    return answer


NOTHING = {
    "an empty list": (200, {}, {"ids": []}),
    "an empty list with distances": (200, {}, {"ids": [], "distances": []}),
    "204": (204, {}, b""),
    "404": (404, {}, b"<html>no match</html>"),
}


@pytest.mark.parametrize("reply", NOTHING.values(), ids=NOTHING)
def test_nothing_found_is_an_answer(reply):
    with served(nothing_but({1}, reply)) as (url, asked):
        endpoint, waits = quick(url)
        assert endpoint.check_consistency(IMAGES).ids == ("a", "b")  # the first image finds nothing
        assert [answer.nothing for answer in endpoint.answers(IMAGES)] == [True, False, True]
        assert len(asked) == 4
    assert waits == []


@pytest.mark.parametrize("reply", NOTHING.values(), ids=NOTHING)
def test_a_search_that_finds_nothing_at_all_is_the_wrong_address(reply):
    with (
        served(lambda body, n: reply) as (url, _),
        pytest.raises(Broken, match=r"nothing for 3 unchanged photographs .* check the address"),
    ):
        quick(url)[0].check_consistency(IMAGES)


# ------------------------------------------------------------------------------------ how codes are written


def coded(write):
    """A search of 32 bits, its codes written by ``write`` as a text."""
    return lambda body, n: (200, {}, {"code": write(mean_bits(body) + mean_bits(body)[::-1])})


VARIED = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_codes_of_zeros_and_ones_are_bits_and_not_hex_digits():
    def hexadecimal(bits):
        return np.packbits(bits).tobytes().hex()

    def binary(bits):
        return "".join(map(str, bits))

    with served(coded(hexadecimal)) as (url, _):
        by_hex = quick(url)[0](VARIED)
    with served(coded(binary)) as (url, _):
        endpoint = quick(url)[0]
        assert np.array_equal(endpoint(VARIED), by_hex)
        assert endpoint(VARIED[:1]).shape == (1, 32)  # held to, also where one code alone would not tell


def test_decimal_codes_are_refused():
    def decimal(bits):
        return str(int("".join(map(str, bits)), 2)).zfill(20)

    with served(coded(decimal)) as (url, _), pytest.raises(Broken, match="a decimal number; give hex"):
        quick(url)[0](VARIED)


# ----------------------------------------------------------------------- connections that fail, and go on


@contextmanager
def raw(*replies):
    """A server that speaks no HTTP of its own: each connection's request gets the next of ``replies``, a
    function of its socket, and the last of them for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    count, over = [0], threading.Event()

    def talk(connection, reply):
        with contextlib.suppress(OSError), connection:
            request = b""
            while b"IEND" not in request:
                request += connection.recv(1 << 16)
            reply(connection)

    def serve():
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            reply = replies[min(count[0], len(replies) - 1)]
            count[0] += 1
            threading.Thread(target=talk, args=(connection, reply), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", count
    finally:
        over.set()
        listener.close()


def says(head, body=b"", times=1):
    def reply(connection):
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n")
        for _ in range(times):
            connection.sendall(body)

    return reply


GOOD = says("HTTP/1.1 200 OK\ncontent-length: 15\nconnection: close\n", b'{"code": [0,1]}')


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def broken_gzip(body):
    return f"HTTP/1.1 200 OK\ncontent-encoding: gzip\ncontent-length: {len(body)}\n"


HALF_GZIP = gzip.compress(b'{"code": [0, 1], "pad": "' + bytes(range(48, 58)) * 50 + b'"}')[:-20]


@pytest.mark.parametrize(
    "bad",
    [
        lambda connection: None,  # closed without an answer
        reset,
        says("HTTP/1.1 200 OK\ncontent-length: 500\n", b"{"),
        says(broken_gzip(HALF_GZIP), HALF_GZIP),
        says("HTTP/1.1 408 Request Timeout\ncontent-length: 0\nconnection: close\n"),
        says("HTTP/1.1 503 Busy\ncontent-length: 0\nconnection: close\n"),
    ],
    ids=["dropped", "reset", "half a body", "half a compressed body", "408", "503"],
)
def test_what_may_pass_is_asked_again(bad):
    with raw(bad, GOOD) as (url, count):
        endpoint, waits = quick(url)
        assert endpoint(IMAGES[:1]).tolist() == [[False, True]]
        assert (count[0], endpoint.requests_sent, waits) == (2, 2, [0.5])
    with raw(bad) as (url, count):
        with pytest.raises(Broken, match=r"3 times; lower --rate"):
            quick(url, retries=2)[0](IMAGES[:1])
        assert count[0] == 3


@pytest.mark.parametrize("status", [301, 308, 400, 403, 501])
def test_what_will_not_pass_is_not_asked_again(status):
    head = f"HTTP/1.1 {status} No\nlocation: http://elsewhere.example/\ncontent-length: 0\n"
    with raw(says(head)) as (url, count):
        with pytest.raises(Broken, match=f"status {status}: http://elsewhere.example/"):
            quick(url)[0](IMAGES[:1])
        assert count[0] == 1


def test_a_server_that_goes_away_is_waited_for_and_one_that_never_was_is_not():
    with raw(GOOD) as (url, _):
        endpoint, waits = quick(url, retries=1)
        endpoint(IMAGES[:1])
    with pytest.raises(Broken, match=r"cannot be asked: .*, 2 times"):
        endpoint(IMAGES[1:])
    assert waits == [0.5]


def drip(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nx-header: ")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def flood(connection):
    while True:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 100)


def slow_body(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("hostile", [drip, flood, slow_body])
def test_the_time_is_that_of_the_whole_exchange(hostile):
    began = time.monotonic()
    with raw(hostile) as (url, _), pytest.raises(Broken, match=r"did not answer within 0.3 s, 2 times"):
        quick(url, timeout=0.3, retries=1)[0](IMAGES[:1])
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("hostile", [drip, flood, slow_body])
def test_all_tries_of_a_question_have_one_limit_together(hostile, monkeypatch):
    monkeypatch.setattr(http_endpoint, "_IN_ALL", 2.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with raw(hostile) as (url, count), pytest.raises(Broken, match=r"did not answer within 0.\d* s, 2 times"):
        Endpoint(url, rate=1e6, timeout=1.2, retries=4, pause=0.1)(IMAGES[:1])
    assert count[0] == 2
    assert time.monotonic() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_a_wait_that_the_server_asks_for_is_not_of_that_limit(monkeypatch):
    monkeypatch.setattr(http_endpoint, "_IN_ALL", 0.5)

    def answer(body, number):
        return (429, {"retry-after": "1"}, {}) if number == 1 else (200, {}, {"code": [0, 1]})

    with served(answer) as (url, _):
        assert Endpoint(url, rate=1e6, timeout=0.3)(IMAGES[:1]).tolist() == [[False, True]]


@pytest.mark.parametrize("size", [70_000, 300_000])
def test_headers_are_read_up_to_64_kib(size):
    lines = "".join(f"x-{n}: {'a' * 1000}\n" for n in range(size // 1000))
    with (
        raw(says(f"HTTP/1.1 200 OK\n{lines}content-length: 15\n", b'{"code": [0,1]}')) as (url, count),
        pytest.raises(Broken, match="headers of more than 65536 bytes"),
    ):
        quick(url)[0](IMAGES[:1])
    assert count[0] == 1


def bomb():
    """1 GB of zeros as 1 MB of gzip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    return b"".join([*(packer.compress(zeros) for _ in range(1024)), packer.flush()])


def test_bytes_are_counted_after_decompression_and_a_long_body_is_not_read_whole():
    packed = bomb()
    endless = says("HTTP/1.1 200 OK\ncontent-length: 6000000000\n", bytes(1 << 20), times=6000)
    for hostile in (says(broken_gzip(packed), packed), endless):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with raw(hostile) as (url, count), pytest.raises(Broken, match="more than 1048576 bytes"):
            quick(url)[0](IMAGES[:1])
        assert count[0] == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "zstd"])
def test_an_encoding_that_was_not_asked_for(encoding):
    with (
        served(lambda body, n: (200, {"content-encoding": encoding}, b"x")) as (url, _),
        pytest.raises(Broken, match="was not asked for"),
    ):
        quick(url)[0](IMAGES[:1])


def test_gzip_is_read():
    packed = gzip.compress(b'{"code": [0, 1]}')
    with served(lambda body, n: (200, {"content-encoding": "gzip"}, packed)) as (url, _):
        assert quick(url)[0](IMAGES[:1]).tolist() == [[False, True]]


# ------------------------------------------------------------------------------------------- kept answers


def test_an_interrupted_audit_goes_on_from_the_kept_answers(tmp_path):
    kept = tmp_path / "deeper" / "answers.jsonl"

    def half(body, number):
        return (200, {}, {"ids": ["a"]}) if number <= 2 else (403, {}, {})

    with served(half) as (url, _), pytest.raises(Broken, match="403"):
        quick(url, cache=kept, headers={"x": "secret"})[0].answers(IMAGES)
    with kept.open("a") as stream:
        stream.write('{"image": "cut o')  # a kill in the middle of a line
    assert "secret" not in kept.read_text()
    port = int(url.split(":")[2].split("/")[0])
    with served(lambda body, n: (200, {}, {"ids": ["a"]}), port) as (same, asked):
        assert same == url
        endpoint, _ = quick(url, cache=kept)
        assert endpoint.answers(IMAGES)[2].ids == ("a",)
        assert len(asked) == 1
        endpoint, _ = quick(url, cache=kept)
        endpoint.check_budget(5003)  # three are known
        endpoint.forget()
        assert not kept.exists()
        assert len(endpoint.answers(IMAGES)) == 3
        assert len(asked) == 4


def test_kept_answers_of_a_search_that_has_changed_are_asked_again(tmp_path):
    kept = tmp_path / "answers.jsonl"
    now = ["a"]
    with served(lambda body, n: (200, {}, {"ids": now[:]})) as (url, _):
        quick(url, cache=kept)[0].answers(IMAGES)
        now[0] = "b"
        endpoint, _ = quick(url, cache=kept)
        endpoint.check_consistency(IMAGES)
        assert {answer.ids for answer in endpoint.answers(IMAGES)} == {("b",)}
    with served(lambda body, n: (200, {}, {"ids": ["c"]})) as (url, _):  # another endpoint
        assert quick(url, cache=kept)[0].answers(IMAGES[:1])[0].ids == ("c",)
