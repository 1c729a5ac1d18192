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

REPO_ROOT = Path(__file__).resolve().parents[1]


os.environ["OMP_NUM_THREADS"] = (
    "1"  # of the programs that tests start: their sums must be those of this process
)
torch.set_num_threads(1)  # the tests run side by side, and small tensors do not gain from more threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--servers", action="store_true", help="start PostgreSQL and Milvus (extra dev-index)")
    parser.addoption("--all-entries", action="store_true", help="dry-run all tables and figures of papers")
    parser.addoption("--fuzz", type=int, default=140, help="malformed inputs of tests/fuzz (all: 1000)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--servers"):  # a run that is ended ends its servers too
        signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 128 + signal.SIGTERM))


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
