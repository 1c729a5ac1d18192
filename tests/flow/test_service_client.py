"""The typed client against a service that listens, and what happens when it ends or is overloaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from service_parts import index, parts, picture

from robusthash.apps.service.tokens import TokenFile
from robusthash.client import Client, ServiceError

__all__ = ["index", "parts"]  # fixtures


@pytest.fixture
def running(
    parts: tuple[Path, Path], index: Path, tmp_path: Path
) -> Iterator[tuple[str, subprocess.Popen[str], str]]:
    """A service in a process of its own: address, process, token."""
    tokens = tmp_path / "tokens.json"
    token = TokenFile(tokens).add("test", ["read", "write"])
    port = 20_000 + os.getpid() % 20_000
    command = [
        sys.executable,
        "-m",
        "robusthash",
        "serve",
        str(index),
        "--tokens",
        str(tokens),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            try:
                if httpx.get(url + "/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url, process, token
    finally:
        process.kill()
        process.wait()


def test_the_client_searches_adds_and_removes(running, tmp_path: Path) -> None:
    url, process, token = running
    file = tmp_path / "new.png"
    file.write_bytes(picture(80))
    with Client(url, token) as client:
        assert client.info()["items"] == 12
        ids = client.add([file, picture(81)], keys=["a", "b"], payload=[{"label": "cat"}, {}])
        hits = client.search(file, k=14, where={"label": "cat"}, fields=["label"])
        assert [(hit.id, hit.distance, hit.payload) for hit in hits] == [(ids[0], 0, {"label": "cat"})]
        assert [hit.key for hit in hits] == ["a"]
        assert client.item(ids[0]) == {"label": "cat"}
        again = [client.add([file], idempotency_key="once") for _ in range(2)]
        assert again[0] == again[1]
        assert client.remove(ids=again[0]) == 1
        assert client.remove(keys=["a"]) == 1
        assert client.remove(ids=[ids[1]]) == 1
        with pytest.raises(ServiceError, match="404"):
            client.item(ids[0])
        with pytest.raises(ServiceError, match="this model takes no texts"):
            client.search(text="a cat")
    with Client(url) as stranger, pytest.raises(ServiceError, match="401"):
        stranger.info()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    errors = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in errors
    assert "stopped; every request under way was answered" in errors
    assert errors.count('"route": "/v1/items"') == 6


def test_a_port_that_is_taken_is_named(running, index: Path, call) -> None:
    port = running[0].rpartition(":")[2]
    code, _, errors = call("serve", index, "--port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in errors


def test_what_was_acknowledged_survives_a_kill(running, index: Path) -> None:
    import robusthash as rh

    url, process, token = running
    with Client(url, token) as client:
        ids = [client.add([picture(100 + n)], keys=[f"n{n}"])[0] for n in range(5)]
        process.kill()
        process.wait()
        with pytest.raises(httpx.TransportError):
            client.info()
    with rh.open_index(f"file:{index}") as held:
        assert [held.held([f"n{n}"])[f"n{n}"][0] for n in range(5)] == ids
