"""Start and end of the service: checks before it listens, a graceful stop, tokens and index read again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from robusthash.apps.experiment.index_run import source_of_index
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.settings import ServiceSettings
from robusthash.apps.service.tokens import AcceptedTokens, TokenFile
from robusthash.core.limited_files import read_yaml
from robusthash.core.registry import nearest
from robusthash.index.index_address import address_of, directory_of

_FILES = 200  # that the service has open besides its connections
_GRACE = 20  # seconds from SIGTERM to the end of the process
_LAST = 5  # of these, after requests under way were given up


@dataclass(frozen=True)
class Serving:
    """A service that is ready to listen."""

    service: SearchService
    tokens: AcceptedTokens
    compared: tuple[SearchService, ...] = ()

    @classmethod
    def of(
        cls,
        index: str,
        run: str | Path | None,
        images: Path | None,
        tokens: Path | None,
        settings: ServiceSettings,
        compared: Sequence[Path] = (),
        device: str | None = None,
    ) -> Serving:
        """From the options of the command line.

        Raises:
            ValueError: an open host without tokens, or an index of another run.
            FileNotFoundError: no such folder or index.
        """
        file = None if tokens is None else TokenFile(tokens)
        held = AcceptedTokens(() if file is None else file.tokens(), file)
        if file is not None and not len(held):
            raise ValueError(
                f"{tokens} holds no token: robusthash token new NAME --scopes read,write --tokens {tokens}"
            )
        if not held and not settings.is_loopback:
            raise ValueError(
                f"listening on {settings.host} without tokens opens the index to everybody; make one with "
                "'robusthash token new NAME' and name the file with --tokens, or leave out --host"
            )
        if images is not None and not images.is_dir():
            raise FileNotFoundError(f"no folder {images}; --images takes the folder of the indexed images")
        address = address_of(index)
        home = directory_of(address)
        if home is not None and not home.is_dir():
            raise FileNotFoundError(f"there is no index in {home}; make one with 'robusthash index build'")
        source = source_of_index(address, run)
        others = [
            SearchService(source_of_index(path), f"file:{path}", settings, images, device or "auto")
            for path in compared
        ]
        return cls(SearchService(source, address, settings, images, device or "auto"), held, tuple(others))


def read_settings(path: Path | None, overrides: Mapping[str, Any]) -> ServiceSettings:
    """The settings of a YAML file, with ``overrides`` laid over them."""
    content = {} if path is None else read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; write such as 'max_k: 50'")
    try:
        return ServiceSettings.model_validate({**content, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            fields = ServiceSettings.model_fields
            raise ValueError(f"there is no setting {name!r}{nearest(name, fields)}") from None
        raise ValueError(f"setting {name}: {first['msg']}, got {first['input']!r}") from None


def _end_at_once() -> None:
    """End the process as SIGTERM does, without its threads; what was acknowledged is on disk."""
    logging.getLogger("robusthash.service").error("requests still run after %d s; ended without them", _GRACE)
    os._exit(128 + signal.SIGTERM)


def _listening(settings: ServiceSettings) -> socket.socket:
    """A socket that listens at the address of the settings; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        address = f"{settings.host}:{settings.port}"
        raise OSError(f"cannot listen on {address}: {error.strerror or error}; try another --port") from None


def _reload(serving: Serving) -> None:
    """Read tokens and index again; what fails stays as it was, and the log says why."""
    for what, reload in (("tokens", serving.tokens.reload), ("index", serving.service.reload)):
        try:
            reload()
        except (OSError, ValueError) as error:
            logging.getLogger("robusthash.service").error("%s not read again: %s", what, error)


def _log_requests() -> None:
    """One line of JSON for each request, on stderr, and nowhere else."""
    log = logging.getLogger("robusthash.service")
    log.handlers, log.propagate = [logging.StreamHandler()], False
    log.setLevel(logging.INFO)


def _open_enough(connections: int) -> None:
    """Allow this process as many open files as the connections take, as far as the system lets it.

    Raises:
        ValueError: the system lets it have fewer.
    """
    try:
        import resource
    except ImportError:  # another system than Unix, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, unlimited = connections + _FILES, resource.RLIM_INFINITY
    if hard != unlimited and hard < needed:
        raise ValueError(
            f"{connections} connections need {needed} open files, and the system allows {hard} (ulimit -Hn); "
            f"set connections to {max(1, hard - _FILES)}"
        )
    if soft != unlimited and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def serve_forever(serving: Serving, note: Callable[[str], None]) -> None:
    """Listen until SIGINT or SIGTERM; requests under way are answered first.

    Raises:
        OSError: some were not answered, as they took too long or Ctrl-C came again.
    """
    try:
        import uvicorn

        from robusthash.apps.service.api import create_app
        from robusthash.apps.service.connections import bounded_protocol
    except ImportError as error:
        raise ImportError(
            f"serving needs more packages ({error}): pip install 'robusthash[serve]'"
        ) from error

    settings, service = serving.service.settings, serving.service
    _log_requests()
    _open_enough(settings.connections)
    app = create_app(service, serving.tokens, serving.compared)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        http=bounded_protocol(settings.connections, settings.timeout),
        ws="none",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=max(1, _GRACE - _LAST),
    )

    class Server(uvicorn.Server):
        """A server whose process ends in time, also where a thread goes on decoding, and ends well: a signal
        that stopped it is not raised again."""

        is_cut_off = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            late = threading.Timer(_GRACE, _end_at_once)
            late.daemon = True
            late.start()
            given_up = time.monotonic() + _GRACE - _LAST
            await super().shutdown(sockets)
            self.is_cut_off = self.force_exit or time.monotonic() >= given_up

    if hasattr(signal, "SIGHUP"):
        # in a thread: the signal may come while this one opens the index
        reload = partial(threading.Thread, target=_reload, args=(serving,), daemon=True)
        signal.signal(signal.SIGHUP, lambda *_: reload().start())
    kind = "with" if serving.tokens else "without"
    size = f"{service.info()['items']} items, {service.model.bits} bits"
    with _listening(settings) as listener:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        note(f"{size}, at http://{host}:{listener.getsockname()[1]}/ ({kind} tokens)")
        server = Server(config)
        server.run(sockets=[listener])
    if server.is_cut_off:
        raise OSError("stopped with requests under way, which got no answer")
    note("stopped; every request under way was answered")
