"""Indexes on real servers: kills of client and server, writers at once, and what is said when it goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from index_servers import PASSWORD, PostgresServer, Server, free_port

from robusthash.core import hamming
from robusthash.core.types import Codes, Ranking
from robusthash.index import open_index
from robusthash.index.index_address import ServerAddress, address_of, address_without_password

KINDS = ["postgresql", "milvus"]
_CLIENT = """
import sys, torch
from robusthash.core import hamming
from robusthash.core.types import Codes
from robusthash.index import open_index
url, seed, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open_index(url, 32) as index:
    for batch in range(first, 10_000):
        draws = torch.Generator().manual_seed(batch)
        codes = Codes(hamming.pack(torch.randn(20, 32, generator=draws)), 32, torch.arange(20))
        try:
            index.add(codes, [{"batch": batch}] * 20, keys=[f"{seed}/{batch}/{at}" for at in range(20)])
        except ConnectionError:
            print("gone", flush=True)
            break
        print(batch, flush=True)
"""


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def codes(count: int, seed: int = 0, bits: int = 32, origin: str = "") -> Codes:
    draws = torch.Generator().manual_seed(seed)
    return Codes(hamming.pack(torch.randn(count, bits, generator=draws)), bits, torch.arange(count), origin)


def client(url: str, seed: int, first: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CLIENT, url, str(seed), str(first)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def acknowledged(process: subprocess.Popen[str], batches: int) -> list[int]:
    """The batches that a client has reported, once they are so many."""
    seen = []
    for line in process.stdout:
        seen.append(int(line))
        if len(seen) == batches:
            break
    return seen


def when_it_answers(call: Callable[[], Ranking]) -> Ranking:
    """The answer of a server that was just started: Milvus lets calls in before it has loaded everything."""
    end = time.monotonic() + 60
    while True:
        try:
            return call()
        except ConnectionError:
            if time.monotonic() > end:
                raise


def check(url: str, batches: dict[int, list[int]]) -> None:
    """Each acknowledged batch is there once, whole, with its codes and payload, found by its codes."""
    with open_index(url, create=False) as index:
        keys = index.keys()
        assert len(keys) == len(set(keys)) == index.count()
        for seed, some in batches.items():
            for batch in some:
                held = index.held([f"{seed}/{batch}/{at}" for at in range(20)])
                ids = [held[f"{seed}/{batch}/{at}"][0] for at in range(20)]
                assert index.payload(ids) == [{"batch": batch}] * 20
                given = codes(20, batch)
                found = index.search(given, 1, where=ids)
                assert found.distances.flatten().tolist() == [0] * 20
                assert found.ids.flatten().tolist() == ids


def test_what_was_acknowledged_survives_kills_of_a_client(server: Server) -> None:
    url, seen, first = server.empty(), list[int](), 0
    for _ in range(2):
        process = client(url, 0, first)
        seen += acknowledged(process, 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen += [int(line) for line in process.stdout.read().split()]  # reported before it was killed
        first = seen[-1] + 1
    process = client(url, 0, first)  # goes on after the killed one, whatever that held locked
    seen += acknowledged(process, 1)
    process.kill()
    process.wait()
    assert len(seen) >= 7
    check(url, {0: seen})


def test_writers_at_once_wait_for_each_other(server: Server) -> None:
    url = server.empty()
    processes = {seed: client(url, seed) for seed in range(2)}
    seen = {seed: acknowledged(process, 3) for seed, process in processes.items()}
    for seed, process in processes.items():
        process.kill()
        process.wait()
        seen[seed] += [int(line) for line in process.stdout.read().split()]
    check(url, seen)


def test_tied_groups_larger_than_an_answer_of_the_server(server: Server) -> None:
    """Milvus gives 16,384 at most and chooses freely among equals."""
    held = Codes(codes(3, 1).packed[torch.arange(40_000) % 3], 32, torch.randperm(40_000) * 7)
    queries = codes(2, 1)
    with open_index(server.empty(), 32) as index:
        index.add(held)
        for k in (5, 9_000):
            ids, distances = hamming.topk(queries.packed, held.packed, k, held.ids, block=1)
            found = index.search(queries, k)
            assert torch.equal(found.distances, distances)
            assert torch.equal(found.ids, ids)
        near = index.range(queries, 0)
        assert [len(ids) for ids in near.ids] == [13_334, 13_333]
        assert len(index.range(queries, 32).ids[0]) == index.count() == 40_000


def test_ids_of_sixty_three_bits(server: Server) -> None:
    last = 2**63 - (1 if isinstance(server, PostgresServer) else 2)  # Milvus finds no id 2**63 - 1
    ids = torch.tensor([last, 2**53 + 1, 2**53 + 2, 0])
    held = Codes(codes(4).packed, 32, ids)
    with open_index(server.empty(), 32) as index:
        index.add(held, [{"n": at} for at in range(4)])
        assert index.search(codes(4), 1).ids.flatten().tolist() == ids.tolist()
        assert index.payload(ids) == [{"n": at} for at in range(4)]
        assert index.search(codes(4), 2, where=[2**53 + 1, 5]).ids.tolist() == [[2**53 + 1, -1]] * 4
        with pytest.raises(ValueError, match=r"below 2\*\*63"):
            index.add(codes(1), keys=["a"])
        assert index.remove([last, 2**53 + 2]) == 2
        assert index.count() == 2


def test_texts_go_through_whole(server: Server) -> None:
    payload = {
        "quote ' \t": "a\\'b",
        "t": "line\n, é, \U0001f600",
        "big": 10**30,
        "f": 0.1,
        "n": None,
    }
    payload = {key: value for key, value in payload.items() if "\t" not in key} | {"quote '": "a\\'b\"c"}
    keys = ["a'b\"c\\d", "%s {x} é \U0001f600", "]; drop"]
    with open_index(server.empty(), 32) as index:
        index.add(codes(3), [payload, {}, {}], keys=keys, stamps=["'", '"', ""])
        assert index.held(keys) == {keys[0]: (0, "'"), keys[1]: (1, '"'), keys[2]: (2, "")}
        assert index.payload([0]) == [payload]
        for key, value in payload.items():
            assert index.search(codes(1), 3, where={key: value}).ids.tolist() == [[0, -1, -1]]
        assert index.keys("%s") == [keys[1]]
        assert index.keys("a'b") == [keys[0]]


def test_the_child_of_a_fork_has_a_connection_of_its_own(server: Server) -> None:
    with open_index(server.empty(), 32) as index:
        index.add(codes(5))
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                os._exit(int(index.search(codes(5), 1).distances.sum()) + (index.count() != 5))
            os._exit(9)
        assert os.waitpid(child, 0)[1] == 0
        assert index.search(codes(5), 1).ids.flatten().tolist() == list(range(5))


@pytest.mark.parametrize("engine", ["hnsw", "bin-ivf-flat"])
def test_approximate_engines_say_so(request: pytest.FixtureRequest, engine: str) -> None:
    server = request.getfixturevalue("postgresql" if engine == "hnsw" else "milvus")
    held, queries = codes(3000), codes(20, 5)
    with open_index(server.empty(32, engine), 32, engine) as index:
        index.add(held, [{"even": at % 2 == 0} for at in range(3000)])
        found = index.search(queries, 100)
        assert found.cut.all()
        assert (found.ids >= 0).all()  # the graph is followed until there are k
        info = index.info()
        assert info["engine"] == engine
        assert not info["exact"]
        assert 0.3 < info["approximation"]["recall@10"] <= 1
        few = index.search(queries, 10, where={"even": True})  # exact
        ids, _ = hamming.topk(queries.packed, held.packed[::2], 10, held.ids[::2])
        assert torch.equal(few.ids, ids)
        assert not few.cut.any()
        near = hamming.distance(queries.packed, held.packed) <= 9
        assert [len(ids) for ids in index.range(queries, 9).ids] == near.sum(1).tolist()


# What is said when it goes wrong


def test_other_bits_other_engine_and_missing(server: Server) -> None:
    url = server.url()
    with pytest.raises(FileNotFoundError, match="no index at"):
        open_index(url, 32, create=False)
    with pytest.raises(ValueError, match="needs the number of bits"):
        open_index(url)
    open_index(url, 32).close()
    with pytest.raises(ValueError, match="holds codes of 32 bits, asked for 64"):
        open_index(url, 64)
    with pytest.raises(ValueError, match=r"'fais'.*it has"):
        open_index(url, 32, "fais")
    index = open_index(url)
    index.close()
    with pytest.raises(ValueError, match="is closed"):
        index.count()


def test_a_milvus_collection_keeps_its_engine(milvus: Server) -> None:
    url = milvus.url()
    open_index(url, 32).close()
    with pytest.raises(ValueError, match="made with the engine 'bin-flat', asked for 'bin-ivf-flat'"):
        open_index(url, 32, "bin-ivf-flat")


def test_tables_of_another_program(postgresql: PostgresServer) -> None:
    import psycopg

    url = postgresql.url()
    address = ServerAddress.read(url)
    with psycopg.connect(address.libpq(), autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {address.collection}_meta (at int)")
    with pytest.raises(ValueError, match="are not those of an index"):
        open_index(url, 32)


def test_a_collection_of_another_program(milvus: Server) -> None:
    from pymilvus import MilvusClient

    url = milvus.url()
    name = ServerAddress.read(url).collection
    MilvusClient(f"http://127.0.0.1:{milvus.port}").create_collection(name, dimension=8)
    with pytest.raises(ValueError, match="is not that of an index; name another"):
        open_index(url, 32)


def test_a_wrong_password_is_not_repeated(postgresql: PostgresServer) -> None:
    with pytest.raises(PermissionError, match="check name and password") as said:
        open_index(postgresql.url(password="wrong-word"), 32)
    assert "wrong-word" not in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "said",
    ["auth check failure, please check username and password are correct", "missing authorization in header"],
)
def test_a_login_that_milvus_refuses(said: str) -> None:
    """The words of Milvus with authorisation, from a server that says nothing else."""
    pytest.importorskip("pymilvus")
    import grpc

    class Refusing(grpc.GenericRpcHandler):
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, said)
            )

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(PermissionError, match=r"refuses the user.*check name and password") as error:
        open_index(f"milvus://me:{PASSWORD}@127.0.0.1:{port}/x", 32)
    server.stop(None)
    assert PASSWORD not in str(error.value)


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "1e9", "2.5"])
def test_a_timeout_is_whole_seconds(timeout: str) -> None:
    pytest.importorskip("pymilvus")
    with pytest.raises(ValueError, match=f"timeout is whole seconds from 1 to 9999, got '{timeout}'"):
        open_index(f"milvus://127.0.0.1:1/x?timeout={timeout}", 32)


@pytest.mark.parametrize(
    "form",
    ["postgresql://me:s3cret-word@127.0.0.1:{}/db", "milvus://me:s3cret-word@127.0.0.1:{}/x?timeout=3"],
)
def test_an_absent_server_is_one_line(form: str) -> None:
    pytest.importorskip("psycopg" if form.startswith("postgres") else "pymilvus")
    url = form.format(free_port())
    with pytest.raises(ConnectionError, match=r"does not answer.*start the server or check") as said:
        open_index(url, 32)
    assert PASSWORD not in str(said.value)
    assert "\n" not in str(said.value)
    command = [sys.executable, "-m", "robusthash", "index", "info", url]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert PASSWORD not in done.stdout + done.stderr
    assert "does not answer" in " ".join(done.stderr.split())


def test_a_database_that_is_not_there(postgresql: PostgresServer) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*make the database"):
        open_index(postgresql.url().replace("/postgres?", "/nowhere?"), 32)


@pytest.mark.parametrize("url", ["milvus:local.db", "milvus:///tmp/local.db", "milvus://local.db"])
def test_a_file_of_milvus_lite_is_refused(url: str) -> None:
    pytest.importorskip("pymilvus")
    with pytest.raises(ValueError, match="Milvus Lite, which takes no binary vectors"):
        open_index(url, 32)


@pytest.mark.parametrize("name", ["a-b", "x" * 41, "1a", "a;b", 'a"b'])
def test_names_of_collections_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="a collection is named by"):
        open_index(f"postgresql://host/db?collection={name}", 32)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cret-word/x@host/db",
        "postgresql://me:s3cret-word?x@host/db",
        "redis://me:s3cret-word@host/db",
        "milvus:me:s3cret-word@host/db",
    ],
)
def test_no_message_about_an_address_has_its_password(url: str) -> None:
    if url.startswith("milvus"):
        pytest.importorskip("pymilvus")
    with pytest.raises(ValueError, match=r"%40|Milvus Lite|supported schemes") as error:
        open_index(address_of(url), 32)
    assert "s3cret" not in str(error.value)


def test_options_of_an_address_reach_libpq_as_they_are() -> None:
    address = ServerAddress.read("postgresql://host/db?options=-c%20statement_timeout=9&application_name=a+b")
    assert address.libpq().endswith("?options=-c%20statement_timeout%3D9&application_name=a%2Bb")


def test_a_shown_address_has_no_password() -> None:
    url = "postgresql://me:s3cret-word@host:5432/db?collection=shop&sslmode=require"
    assert address_without_password(url) == "postgresql://me@host:5432/db?collection=shop"
    assert "s3cret-word" not in repr(ServerAddress.read(url))
    assert address_without_password("some/folder") == "some/folder"


# The last test: the server that all share is killed


def test_what_was_acknowledged_survives_a_kill_of_the_server(server: Server) -> None:
    url = server.empty()
    with open_index(url, 32) as index:
        index.add(codes(20, 7), keys=[f"own/{at}" for at in range(20)])
        process = client(url, 0)
        seen = acknowledged(process, 4)
        server.kill()
        began = time.monotonic()
        with pytest.raises(ConnectionError) as said:
            index.search(codes(1), 3)
        assert time.monotonic() - began < 60
        assert "\n" not in str(said.value)
        assert PASSWORD not in str(said.value)
        out, err = process.communicate(timeout=120)
        assert out.split()[-1] == "gone", err
        seen += [int(line) for line in out.split()[:-1]]
        server.start()
        assert index.next_id() >= 20 * (len(seen) + 1)  # else the next batch takes the ids of one of these
        near = when_it_answers(lambda: index.search(codes(20, 7), 1))  # the same object goes on
        assert near.distances.flatten().tolist() == [0] * 20
        index.remove(keys=[f"own/{at}" for at in range(20)])
    again = client(url, 0, seen[-1] + 1)  # the batch that was under way is given again, by key
    seen += acknowledged(again, 2)
    again.kill()
    again.wait()
    check(url, {0: seen})
