"""The service over its parts: median time of a search by HTTP over that of encode and search called directly.

One client, 224 px JPEG files, in one run and taking turns; then clients at four times what one keeps busy:
the share that is refused, and the 99th percentile of those admitted over that of one client alone. The
clients are a process of their own on the same machine.
"""

from __future__ import annotations

import http.client
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image

import robusthash as rh
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.training_stages import train
from robusthash.apps.service.api import create_app
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.settings import ServiceSettings

TURNS, ITEMS, CLIENTS = 150, 20_000, 16
CONFIG = {
    "name": "service",
    "data": {"name": "photos", "size": 96, "train": 60, "query": 20, "database": 20},
    "hasher": {"bits": 64, "image": {"name": "resnet18"}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 32},
    "runtime": {"device": "cpu"},
}


def photograph(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = train(make_config(CONFIG), Path(folder) / "runs").path
        address = f"file:{folder}/index"
        codes = np.random.default_rng(0).integers(0, 256, (ITEMS, 8), dtype=np.uint8)
        with rh.open_index(address, bits=64) as index:
            index.add(codes)
        service = SearchService(run, address, ServiceSettings(rate=0))
        server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/search"
        measure(service, url)
        server.should_exit = True
        thread.join()


def measure(service: SearchService, url: str) -> None:
    files = [photograph(seed) for seed in range(16)]
    direct: list[float] = []
    served: list[float] = []
    with Searcher(url) as client:
        for turn in range(TURNS + 20):
            content = files[turn % len(files)]
            start = time.perf_counter()
            service.search(service.encode("image", [service.decode(content)])[0], 10, None, None)
            middle = time.perf_counter()
            assert client.status(content) == 200
            end = time.perf_counter()
            if turn >= 20:  # the first are warming up
                direct.append(middle - start)
                served.append(end - middle)
    whole, parts = (statistics.median(times) * 1e3 for times in (served, direct))
    print(
        f"p50 of the service {whole:.1f} ms, of its parts {parts:.1f} ms: {whole / parts:.2f} (target 1.25)"
    )

    pause = CLIENTS * statistics.median(direct) / 4  # of all clients: four times what one thread can do
    command = [sys.executable, __file__, "--clients", url, str(pause)]
    loaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    late, alone = percentile(loaded["admitted"], 0.99), percentile(served, 0.99)
    print(f"{CLIENTS} clients: {len(loaded['admitted'])} answered, {loaded['refused']} refused")
    print(
        f"p99 of those answered {late * 1e3:.0f} ms, {late / alone:.1f} times that of one client "
        f"({alone * 1e3:.0f} ms; target 3), {late / statistics.median(served):.1f} times its median"
    )


def clients(url: str, pause: float) -> None:
    """Searches by 16 clients for ten seconds, in a process of their own; prints what became of them."""
    files = [photograph(seed) for seed in range(16)]
    admitted: list[float] = []
    refused = [0]
    until = time.perf_counter() + 10

    def ask(seed: int) -> None:
        with Searcher(url) as searcher:
            while time.perf_counter() < until:
                start = time.perf_counter()
                status = searcher.status(files[seed % len(files)])
                if status == 200:
                    admitted.append(time.perf_counter() - start)
                else:
                    assert status == 503, status
                    refused[0] += 1
                    time.sleep(pause)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(CLIENTS)))
    print(json.dumps({"admitted": admitted, "refused": refused[0]}))


class Searcher:
    """A connection that searches, and does little else: clients share the machine with the service."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)

    def status(self, content: bytes) -> int:
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        self._connection.request("POST", "/v1/search", head + content + b"\r\n--x--\r\n", kind)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--clients"]:
        clients(sys.argv[2], float(sys.argv[3]))
    else:
        main()
