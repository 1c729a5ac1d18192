"""Connections of the served process: slow clients, thousands of them, and heads that are no requests."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from service_parts import parts, picture

from robusthash.apps.experiment.index_run import build_index

__all__ = ["parts"]  # a fixture

resource = pytest.importorskip("resource", reason="limits of open files are of Unix")

TIMEOUT = 2.0


class Served:
    """The service in a process of its own."""

    def __init__(
        self, index: Path, run: Path, *options: str, command: Sequence[str] = ("-m", "robusthash", "serve")
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command, str(index), "--run", str(run), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if address := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(address[1])
                break
        else:
            raise AssertionError("the service did not start")
        subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def search(self) -> httpx.Response:
        files = {"image": ("x.png", picture(3))}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/search", files=files, timeout=30)

    def resident(self) -> int:
        """Bytes in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@pytest.fixture(scope="module")
def served(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    index, settings = folder / "index", folder / "limits.yaml"
    build_index(index, *parts)
    settings.write_text(f"connections: 200\ntimeout: {TIMEOUT}\nrate: 0\nmax_wait: 60000\n")
    service = Served(index, parts[0], "--settings", str(settings))
    yield service
    service.process.terminate()
    assert service.process.wait(30) in (0, -15)


def ended(connection: socket.socket, within: float) -> bytes:
    """What a connection gets until the service ends it."""
    connection.settimeout(within)
    received = b""
    try:
        while part := connection.recv(4096):
            received += part
    except ConnectionResetError:
        pass
    return received


def test_a_head_that_never_ends_is_ended(served: Served) -> None:
    """Bytes that drip in do not renew the time; nor do they after an answer, on the same connection."""
    fresh, used, silent = served.connect(), served.connect(), served.connect()
    used.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answered = b""
    while not answered.endswith(b"}"):
        answered += used.recv(4096)
    start = time.monotonic()
    for connection in (fresh, used):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    for _ in range(5):
        time.sleep(0.3)
        for connection in (fresh, used):
            connection.sendall(b"x")
    assert ended(fresh, 10).startswith(b"HTTP/1.1 408")
    assert ended(used, 10) == b""
    assert ended(silent, 10).startswith(b"HTTP/1.1 408")
    assert TIMEOUT - 0.2 < time.monotonic() - start < TIMEOUT + 3
    assert served.search().status_code == 200


def test_a_body_that_drips_after_a_refusal_is_ended(served: Served) -> None:
    connection = served.connect()
    head = b"POST /v1/search HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 100000\r\n\r\n"
    connection.sendall(head)
    assert connection.recv(4096).startswith(b"HTTP/1.1 421")
    start = time.monotonic()
    with suppress(OSError):
        while time.monotonic() - start < TIMEOUT + 5:
            connection.sendall(b"x")
            time.sleep(0.2)
    assert time.monotonic() - start < TIMEOUT + 4


def test_thousands_of_slow_connections_leave_room_for_others(served: Served) -> None:
    """2,000 connections that send half a head, ten times what is allowed: others are answered meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3000:
        pytest.skip(f"the system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    assert served.search().status_code == 200
    before, seconds = served.resident(), []
    with ExitStack() as stack:
        for number in range(2000):
            connection = stack.enter_context(served.connect())
            connection.sendall(b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nX-Filler: " + b"x" * 8000)
            if number % 100 == 99:
                start = time.monotonic()
                assert served.search().status_code == 200
                seconds.append(time.monotonic() - start)
        during = served.resident()
    print(f"{(during - before) / 2**20:.1f} MiB more, slowest answer {max(seconds):.2f} s")
    assert during - before < 40 << 20
    assert max(seconds) < 5
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_all_work_refuse_one_more(served: Served) -> None:
    """Where every connection has a request under way, the newest is answered 503, and none is ended."""
    head = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with ExitStack() as stack:
        working = [stack.enter_context(served.connect()) for _ in range(200)]
        for connection in working:
            connection.sendall(head)
        time.sleep(0.5)
        answer = ended(stack.enter_context(served.connect()), 10)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in answer
        first = ended(working[0], 10)  # its body never came
        assert first.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /healthz\r\nHost: localhost\r\n\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 60 + b"\r\n\r\n",
    ],
    ids=["no host", "cr", "nul", "version", "lengths", "negative", "long target", "long head", "tls"],
)
def test_heads_that_are_no_requests_are_refused(served: Served, head: bytes) -> None:
    with served.connect() as connection:
        with suppress(OSError):
            connection.sendall(head)
        answer = ended(connection, 10)
    assert re.match(rb"HTTP/1\.1 4\d\d ", answer) or answer == b""
    assert b"Traceback" not in answer
    assert served.search().status_code == 200


_BUSY = """
import sys, time
from robusthash.__main__ import main
from robusthash.apps.service import serving
from robusthash.apps.service.search_service import SearchService
serving._GRACE, serving._LAST = 4, 2
def decode(*_):
    print("decoding", flush=True)
    time.sleep(60)
SearchService.decode = decode
sys.argv[1:] = ["serve", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_in_time_where_a_reader_is_busy(
    parts: tuple[Path, Path], tmp_path: Path, sent
) -> None:
    build_index(tmp_path / "index", *parts)
    service = Served(tmp_path / "index", parts[0], command=["-c", _BUSY])
    connection = service.connect()
    body = picture(3)
    head = "POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert service.process.stdout.readline() == "decoding\n"
    service.process.send_signal(sent)
    assert service.process.wait(30) == 128 + signal.SIGTERM


_SHORT_GRACE = """
import sys
from robusthash.__main__ import main
from robusthash.apps.service import serving
serving._GRACE, serving._LAST = 6, 4
sys.argv[1:] = ["serve", *sys.argv[1:]]
main()
"""


def test_the_process_fails_where_a_request_got_no_answer(parts: tuple[Path, Path], tmp_path: Path) -> None:
    build_index(tmp_path / "index", *parts)
    service = Served(tmp_path / "index", parts[0], command=["-c", _SHORT_GRACE])
    connection = service.connect()
    head = "POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + b"x" * 10)  # the rest never comes
    service.search()  # answered on another connection: the first is under way by now
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) == 1
