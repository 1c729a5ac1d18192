"""One thread a process, and the one fixture that looks outside the checkout."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from index_servers import PACKAGES, Server, running

from robusthash.core.plugins import import_plugin
from robusthash.core.registry import Card, card_of, catalogue

REPO_ROOT = Path(__file__).resolve().parents[1]
METHODS = pytest.StashKey[list[Card]]()


os.environ["OMP_NUM_THREADS"] = (
    "1"  # of the programs that tests start: their sums must be those of this process
)
torch.set_num_threads(1)  # the tests run side by side, and small tensors do not gain from more threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--servers", action="store_true", help="start PostgreSQL and Milvus (extra dev-index)")
    parser.addoption("--fuzz", type=int, default=140, help="malformed inputs of tests/fuzz (all: 1000)")
    parser.addoption(
        "--method",
        metavar="MODULE:NAME",
        action="append",
        help="the contract tests of an outside method alone",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[METHODS] = [_method(named) for named in config.getoption("--method") or ()]
    if config.getoption("--servers"):  # a run that is ended ends its servers too
        signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 128 + signal.SIGTERM))


def _method(named: str) -> Card:
    """The card of ``module:name``, which registers itself so that the sweeps of ``tests/contract`` see it."""
    try:
        module, name = import_plugin(named)
    except (ImportError, KeyError) as error:
        raise pytest.UsageError(f"--method: {error}") from error
    card = card_of(getattr(module, name, None)) or next((c for c in catalogue() if c.name == name), None)
    if card is None or getattr(card.make, "__module__", "") != module.__name__:
        raise pytest.UsageError(
            f"--method: {named!r} is not registered; write @register(KIND, NAME) before it"
        )
    return card


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are made once for each method, where some methods are asked for."""
    methods = config.stash[METHODS]
    if not methods:
        return
    of_methods = {card.name: [item for item in items if _is_of(item, card)] for card in methods}
    kept = [item for item in items if any(item in those for those in of_methods.values())]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    missing = [f"{card.kind}, as {card.name!r} is" for card in methods if not of_methods[card.name]]
    if missing:
        raise pytest.UsageError(
            f"--method: no test is made for each {missing[0]}; tests/contract sweeps others"
        )


def _is_of(item: pytest.Item, card: Card) -> bool:
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return any(
        value == card or value == card.name for value in given.values() if isinstance(value, Card | str)
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that the project keeps beside the checkout."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the project's data folder beside the checkout")
    return folder


def _server(kind: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    if not request.config.getoption("--servers"):
        pytest.skip(f"needs a {kind} server: make test-servers")
    if find_spec(PACKAGES[kind]) is None:
        machine = platform.machine()
        if kind == "milvus" and machine != "x86_64":  # as the extra says
            pytest.skip(f"NOT TESTED: the package milvus 2.3.5 does not exist for {machine}")
        pytest.fail(f"the package {PACKAGES[kind]} is not installed; it is in the extra dev-index")
    with running(kind) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A PostgreSQL server with pgvector."""
    yield from _server("postgresql", request)


@pytest.fixture(scope="session")
def milvus_of_all(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A Milvus server that all tests share."""
    yield from _server("milvus", request)


@pytest.fixture
def milvus(milvus_of_all: Server) -> Iterator[Server]:
    """A Milvus server, which forgets the collections of a test when that ends."""
    yield milvus_of_all
    milvus_of_all.tidy()


@pytest.fixture(autouse=True, scope="session")
def _state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What own commands have imported is kept in a folder of the tests, not of the user."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
