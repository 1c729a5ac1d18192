"""What every exact index promises: the oracle's answers, ties included, whatever was added, removed or
reopened.

An adapter joins by a line in ``EXACT``. The approximate engine has its own tests at the end.
"""

from __future__ import annotations

import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robusthash.core import hamming
from robusthash.core.types import Codes, Ranking
from robusthash.index import CodeIndex, open_index
from robusthash.index import search_engines as engines_module

EXACT = {"faiss": "file", "numpy": "file", "scan": "postgresql", "bin-flat": "milvus"}
WIDTHS = [1, 12, 32, 60, 64, 128]
LABELS = ["cat", "dog", "sky"]


def random_codes(
    count: int, bits: int, seed: int = 0, ids: torch.Tensor | None = None, origin: str = ""
) -> Codes:
    """Random codes; from four distinct ones where ``seed`` is odd, so that nearly all distances are tied."""
    draws = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count, bits), generator=draws) * 2 - 1
    if seed % 2 and count:
        signs = signs[torch.randint(min(4, count), (count,), generator=draws)]
    return Codes(hamming.pack(signs), bits, torch.arange(count) if ids is None else ids, origin)


def shuffled(count: int, seed: int = 0) -> torch.Tensor:
    """Unique ids in no order, with gaps."""
    return torch.randperm(count * 3, generator=torch.Generator().manual_seed(seed))[:count]


def agrees(found: Ranking, queries: Codes, held: Codes, k: int) -> None:
    ids, distances = hamming.topk(queries.packed, held.packed, k, held.ids)
    assert found.ids.dtype == torch.int64
    assert found.distances.dtype == torch.int32
    assert torch.equal(found.distances, distances)
    assert torch.equal(found.ids, ids)
    assert not found.cut.any()
    assert found.cut.shape == (len(queries),)


def some(codes: Codes, keep: torch.Tensor) -> Codes:
    return Codes(codes.packed[keep], codes.bits, codes.ids[keep], codes.origin)


@pytest.fixture(params=EXACT)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def new_address(engine: str, request: pytest.FixtureRequest, bits: int = 32) -> str:
    """An address of an engine where no index is yet, or an empty one of these bits."""
    if EXACT.get(engine, "file") == "file":
        return f"file:{request.getfixturevalue('tmp_path_factory').mktemp('index') / 'index'}"
    if EXACT[engine] == "milvus" and bits not in (3, 12, 32, 64):
        pytest.skip("making a collection takes seconds; these are parts of a byte and whole ones")
    return request.getfixturevalue(EXACT[engine]).empty(bits)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    named = "engine" in request.fixturenames
    bits = request.getfixturevalue("bits") if "bits" in request.fixturenames else 32
    return new_address(request.getfixturevalue("engine") if named else "faiss", request, bits)


@pytest.mark.parametrize("seed", [0, 1], ids=["random", "tied"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_search_is_the_oracle(url: str, engine: str, bits: int, seed: int) -> None:
    held, queries = random_codes(300, bits, seed, shuffled(300)), random_codes(40, bits, seed + 2)
    with open_index(url, bits, engine) as index:
        index.add(held)
        for k in (1, 7, 299, 300, 305):
            agrees(index.search(queries, k), queries, held, k)
        assert index.count() == 300
        assert index.next_id() == int(held.ids.max()) + 1
        assert index.bits == bits


def test_ties_across_the_scan_blocks_of_the_engine(url: str) -> None:
    held, queries = random_codes(140_000, 12, 1), random_codes(3, 12, 2)
    with open_index(url, 12) as index:
        index.add(held)
        for k in (10, 100, 70_000):
            agrees(index.search(queries, k), queries, held, k)


def test_ties_with_several_threads(url: str) -> None:
    held, queries = random_codes(70_000, 32, 1), random_codes(70, 32, 2)
    with open_index(url, 32) as index:
        index.add(held)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(2)
        try:
            for few in (queries, some(queries, torch.tensor([3]))):
                agrees(index.search(few, 100), few, held, 100)
        finally:
            faiss.omp_set_num_threads(threads)


def test_an_empty_index_answers_with_minus_one(url: str, engine: str) -> None:
    with open_index(url, 32, engine) as index:
        found = index.search(random_codes(3, 32), 2)
        assert found.ids.tolist() == found.distances.tolist() == [[-1, -1]] * 3
        assert index.range(random_codes(3, 32), 12).ids[2].tolist() == []
        assert index.search(random_codes(3, 32), 2, where=[1]).ids.tolist() == [[-1, -1]] * 3
        assert index.count() == index.remove([1]) == index.next_id() == 0


def test_no_queries_and_no_codes(url: str, engine: str) -> None:
    none = random_codes(0, 32)
    with open_index(url, 32, engine) as index:
        index.add(none)
        index.add(random_codes(5, 32))
        index.add(none, payload=[])
        assert index.search(none, 3).ids.shape == (0, 3)
        assert len(index.range(none, 3)) == 0
        assert index.count() == 5


@pytest.mark.parametrize("bits", [12, 64])
def test_range_is_all_within_the_radius_in_order(url: str, engine: str, bits: int) -> None:
    held, queries = random_codes(200, bits, 1, shuffled(200)), random_codes(9, bits, 2)
    exact = hamming.distance(queries.packed, held.packed)
    with open_index(url, bits, engine) as index:
        index.add(held)
        for radius in (0, 3, bits // 2, bits, bits + 50):
            found = index.range(queries, radius)
            for row in range(9):
                near = torch.nonzero(exact[row] <= radius).flatten().tolist()
                pairs = sorted((int(exact[row, at]), int(held.ids[at])) for at in near)
                assert list(zip(found.distances[row].tolist(), found.ids[row].tolist(), strict=True)) == pairs


@pytest.mark.parametrize("bits", [12])
def test_filter_by_ids(url: str, engine: str, bits: int) -> None:
    held, queries = random_codes(300, bits, 1, shuffled(300)), random_codes(5, bits, 2)
    allowed = [*held.ids[:40].tolist(), 10_000_000]  # the last is not held, and is ignored
    with open_index(url, bits, engine) as index:
        index.add(held)
        few = some(held, torch.arange(40))
        for kind in (set, list, np.array, torch.tensor):
            agrees(index.search(queries, 50, where=kind(allowed)), queries, few, 50)
            near = index.range(queries, bits, where=kind(allowed)).ids
            assert all(set(ids.tolist()) <= set(allowed) for ids in near)
            assert near[0].shape == (40,)
            assert (index.search(queries, 3, where=kind([])).ids == -1).all()


def labelled(index: CodeIndex) -> Codes:
    held = random_codes(120, 32, 1, shuffled(120))
    payload = [
        {
            "label": LABELS[at % 3],
            "year": 2000 + at % 5,
            "tags": ["even", "all"] if at % 2 == 0 else ["all"],
            "é": True,
        }
        for at in range(119)
    ]
    index.add(held, [*payload, {}])
    return held


FILTERS = [
    ({"label": "cat"}, lambda at: at % 3 == 0),
    ({"label": ["cat", "sky"]}, lambda at: at % 3 != 1),
    ({"label": "dog", "year": [2001, 2002]}, lambda at: at % 3 == 1 and at % 5 in (1, 2)),
    ({"tags": "even"}, lambda at: at % 2 == 0),
    ({"tags": ["even", "never"], "é": True}, lambda at: at % 2 == 0),
    ({"year": "2001"}, lambda at: at % 5 == 1),  # a file of labels says either, and so does a command line
    ({"year": 2001.0}, lambda at: at % 5 == 1),
    ({"year": "02001"}, lambda at: False),
    ({"é": "true"}, lambda at: True),
    ({"é": 1}, lambda at: False),
    ({"label": []}, lambda at: False),
    ({"label": "cow"}, lambda at: False),
]


def test_filter_by_payload(url: str, engine: str) -> None:
    with open_index(url, 32, engine) as index:
        held, queries = labelled(index), random_codes(4, 32, 2)
        for where, keep in FILTERS:
            kept = torch.tensor([at for at in range(119) if keep(at)], dtype=torch.int64)
            agrees(index.search(queries, 20, where=where), queries, some(held, kept), 20)
            assert len(index.range(queries, 32, where=where).ids[0]) == len(kept), where
        agrees(index.search(queries, 20, where={}), queries, held, 20)


def test_payload_comes_back(url: str, engine: str) -> None:
    with open_index(url, 32, engine) as index:
        held = labelled(index)
        first, last = int(held.ids[0]), int(held.ids[-1])
        full = {"label": "cat", "year": 2000, "tags": ["even", "all"], "é": True}
        assert index.payload([last, first, first]) == [{}, full, full]
        index.add(random_codes(1, 32, 0, torch.tensor([5000])))
        assert index.payload(torch.tensor([5000])) == [{}]
        assert index.payload([]) == []


def test_keys_of_ids(url: str, engine: str) -> None:
    with open_index(url, 32, engine) as index:
        first = index.add(random_codes(3, 32), keys=["a", "b/c.jpg", "d"]).ids.tolist()
        bare = index.add(random_codes(1, 32, ids=torch.tensor([90]))).ids.tolist()
        index.remove([first[2]])
        assert index.keys_of([*first, *bare, 1000]) == {first[0]: "a", first[1]: "b/c.jpg"}
        assert index.keys_of([]) == {}


def test_remove_and_add_again(url: str, engine: str) -> None:
    with open_index(url, 32, engine) as index:
        held, queries = labelled(index), random_codes(4, 32, 2)
        gone = held.ids[:30]
        assert index.remove(torch.cat([gone, gone[:3], torch.tensor([999_999])])) == 30
        assert index.remove(gone) == 0
        left = some(held, torch.arange(30, 120))
        agrees(index.search(queries, 95), queries, left, 95)
        assert index.count() == 90
        again = random_codes(30, 32, 4, gone)  # other codes under the same ids, in the middle of the id order
        index.add(again, [{"label": "new"}] * 30)
        both = Codes(torch.cat([left.packed, again.packed]), 32, torch.cat([left.ids, again.ids]))
        agrees(index.search(queries, 125), queries, both, 125)
        agrees(index.search(queries, 35, where={"label": "new"}), queries, again, 35)
        assert index.payload(gone[:1]) == [{"label": "new"}]


def test_queries_of_another_origin_are_refused(url: str, engine: str) -> None:
    held, near = random_codes(20, 32, 0, origin="model-a"), random_codes(2, 32, 2)
    queries = {origin: Codes(near.packed, 32, near.ids, origin) for origin in ("", "model-a", "model-b")}
    with open_index(url, 32, engine) as index:
        assert index.origin == ""
        index.add(some(held, torch.arange(10)))
        index.add(
            Codes(held.packed[10:], 32, held.ids[10:])
        )  # a foreign array says no origin, and is taken as it is
        assert index.origin == "model-a"
        for origin in ("", "model-a"):
            agrees(index.search(queries[origin], 5), near, held, 5)
            assert len(index.range(queries[origin], 32).ids[0]) == 20
        for call in (
            lambda c: index.search(c, 5),
            lambda c: index.range(c, 32),
            lambda c: index.search(c, 5, where=[]),
        ):
            with pytest.raises(ValueError, match=r"'model-b'.*'model-a'"):
                call(queries["model-b"])


def test_an_index_of_unknown_origin_takes_queries_of_any(url: str, engine: str) -> None:
    held, queries = random_codes(20, 32, 0), random_codes(2, 32, 2, origin="model-b")
    with open_index(url, 32, engine) as index:
        index.add(held)
        agrees(index.search(queries, 5), queries, held, 5)
        assert len(index.range(queries, 32).ids[1]) == 20


def test_a_reader_knows_the_origin_that_another_wrote(url: str, engine: str) -> None:
    queries = random_codes(2, 32, 2, origin="model-b")
    with open_index(url, 32, engine) as reader, open_index(url, engine=engine, create=False) as writer:
        reader.search(queries, 1)
        writer.add(random_codes(3, 32, 0, origin="model-a"))
        with pytest.raises(ValueError, match=r"'model-b'.*'model-a'"):
            reader.search(queries, 1)


def test_reopening_keeps_everything(url: str, engine: str) -> None:
    queries = random_codes(4, 32, 2)
    with open_index(url, 32, engine) as index:
        held = labelled(index)
        index.add(random_codes(1, 32, 0, torch.tensor([7000]), "model-a"))
        index.remove([7000])
        before = index.info()
    with open_index(url, engine=engine, create=False) as index:
        assert index.info() == before
        assert before["count"] == 120
        assert before["bits"] == 32
        assert before["origin"] == "model-a"
        assert before["exact"] is True
        agrees(index.search(queries, 50), queries, held, 50)
        assert index.payload(held.ids[-1:]) == [{}]
        index.add(random_codes(1, 32, 0, torch.tensor([7000])))
        assert index.count() == 121


def test_a_snapshot_opens_and_equals(url: str, engine: str, tmp_path: Path) -> None:
    queries, copy = random_codes(4, 32, 2), tmp_path / "below" / "copy"
    with open_index(url, 32, engine) as index:
        held = labelled(index)
        if not url.startswith("file:"):
            with pytest.raises(ValueError, match="is on a server, whose own backup is meant"):
                index.snapshot(str(copy))
            return
        index.snapshot(str(copy))
        index.remove(held.ids[:50])  # what comes later is not in the copy
    with open_index(f"file:{copy}", engine=engine, create=False) as index:
        agrees(index.search(queries, 125), queries, held, 125)
        assert index.payload(held.ids[:1])[0]["label"] == "cat"
        index.remove([int(held.ids[0])])
        assert index.count() == 119
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]  # nothing half-written is left beside it


ZERO = {
    "payload": lambda index: index.add(random_codes(1, 32, 6), [{"tenant": ["alice\0x"]}], keys=["new"]),
    "key": lambda index: index.add(random_codes(1, 32, 6), keys=["sku\0x"]),
    "stamp": lambda index: index.add(random_codes(1, 32, 6), keys=["new"], stamps=["a\0"]),
    "filter": lambda index: index.search(random_codes(1, 32), 9, where={"tenant": "alice\0nobody"}),
    "options": lambda index: index.range(random_codes(1, 32), 32, where={"tenant": ["x", "alice\0"]}),
    "removal": lambda index: index.remove({"tenant": "alice\0nobody"}),
    "removed key": lambda index: index.remove(keys=["sku\0x"]),
    "key that is looked up": lambda index: index.held(["sku\0x"]),
}


def test_zero_characters_cut_no_text(url: str, engine: str) -> None:
    literal = "alice\\u0000"  # a backslash, no zero character
    with open_index(url, 32, engine) as index:
        index.add(random_codes(2, 32), [{"tenant": "alice"}, {"tenant": literal}], keys=["sku", "other"])
        for name, call in ZERO.items():
            with pytest.raises(ValueError, match="zero character"):
                raise AssertionError(f"{name}: {call(index)!r}")
        assert index.count() == 2
        assert index.keys("sku\0x") == []
        assert index.search(random_codes(1, 32), 2, where={"tenant": literal}).ids.tolist() == [[1, -1]]


def test_filters_are_bounded(url: str, engine: str) -> None:
    keys, values = {f"key {at}": 1 for at in range(33)}, {"label": list(range(900)), "year": list(range(101))}
    with open_index(url, 32, engine) as index:
        index.add(random_codes(2, 32), [{"label": 899, "year": 3}, {}])
        for where in (keys, values):
            with pytest.raises(ValueError, match="at most 32 keys and 1000 values"):
                index.search(random_codes(1, 32), 1, where=where)
            with pytest.raises(ValueError, match="at most 32 keys and 1000 values"):
                index.remove(where)
        most = {"label": list(range(900)), "year": list(range(100))}
        assert index.search(random_codes(1, 32), 2, where=most).ids.tolist() == [[0, -1]]


def test_another_opener_sees_what_was_written(url: str, engine: str) -> None:
    held, more, queries = (
        random_codes(20, 32, 0),
        random_codes(5, 32, 2, torch.arange(50, 55)),
        random_codes(4, 32, 4),
    )
    with open_index(url, 32, engine) as writer, open_index(url, 32, engine) as reader:
        writer.add(held)
        agrees(reader.search(queries, 30), queries, held, 30)
        writer.add(more)
        writer.remove([0])
        reader.add(random_codes(1, 32, 6, torch.tensor([99])))
        packed = torch.cat([held.packed[1:], more.packed, random_codes(1, 32, 6).packed])
        all_of_it = Codes(packed, 32, torch.cat([held.ids[1:], more.ids, torch.tensor([99])]))
        for index in (reader, writer):
            agrees(index.search(queries, 30), queries, all_of_it, 30)


def test_searching_while_another_thread_writes(url: str, engine: str) -> None:
    """Each answer is the exact one for some number of whole batches."""
    codes, queries = random_codes(400, 32, 1), random_codes(3, 32, 2)
    batches = [some(codes, torch.arange(at, at + 20)) for at in range(0, 400, 20)]
    possible = [hamming.topk(queries.packed, codes.packed[:at], 9)[0].tolist() for at in range(20, 401, 20)]
    with open_index(url, 32, engine) as index:
        index.add(batches[0])
        writer = threading.Thread(target=lambda: [index.add(batch) for batch in batches[1:]])
        writer.start()
        seen = [index.search(queries, 9).ids.tolist() for _ in range(30)]
        writer.join()
        assert all(answer in possible for answer in seen)
        agrees(index.search(queries, 400), queries, codes, 400)


def test_the_index_keeps_no_hold_of_the_callers_tensors(url: str, engine: str) -> None:
    held, queries = random_codes(20, 32, 0), random_codes(4, 32, 2)
    with open_index(url, 32, engine) as index:
        given_away = Codes(held.packed.clone(), 32, held.ids.clone())
        index.add(given_away)
        given_away.packed.zero_()
        given_away.ids.add_(1000)
        agrees(index.search(queries, 20), queries, held, 20)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), max_size=8)),
        st.tuples(st.just("remove"), st.lists(st.integers(0, 30), max_size=8)),
        st.tuples(st.just("reopen"), st.just(())),
        st.tuples(st.just("search"), st.integers(1, 12)),
    ),
    max_size=10,
)


@pytest.mark.parametrize("name", EXACT)
def test_any_sequence_of_calls_matches_a_dictionary(request: pytest.FixtureRequest, name: str) -> None:
    @settings(
        max_examples=3 if EXACT[name] == "milvus" else 25, deadline=None
    )  # making one takes seconds there
    @given(steps=STEPS, bits=st.sampled_from([3, 12]))
    def follow(steps: list, bits: int) -> None:
        url, model = new_address(name, request, bits), {}

        def codes_of(items: dict[int, int]) -> Codes:
            numbers = torch.tensor(list(items.values()), dtype=torch.int64).reshape(-1, 1)
            signs = ((numbers >> torch.arange(bits)) & 1) * 2 - 1
            return Codes(hamming.pack(signs), bits, torch.tensor(list(items), dtype=torch.int64))

        queries, index = codes_of({at: at for at in range(8)}), open_index(url, bits, name)
        for step, value in [*steps, ("search", 40)]:
            if step == "add":
                new = {key: code for key, code in dict(value).items() if key not in model}
                index.add(codes_of(new))
                model.update(new)
            elif step == "remove":
                assert index.remove(value) == sum(model.pop(key, None) is not None for key in set(value))
            elif step == "reopen":
                index.close()
                index = open_index(url, bits, name)
            else:
                agrees(index.search(queries, value), queries, codes_of(model), value)
                assert index.count() == len(model)
        index.close()

    follow()


# The approximate engine: exempt from exactness, held to everything else.


def clustered(count: int, seed: int = 0) -> Codes:
    """Codes as training makes them: twenty centres, a few bits flipped."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randint(2, (20, 64), generator=draws) * 2 - 1
    flips = (torch.rand(count, 64, generator=draws) < 0.03).long() * -2 + 1
    return Codes(hamming.pack(centres[torch.arange(count) % 20] * flips), 64, torch.arange(count))


def test_ivf_measures_its_recall_and_says_that_it_is_approximate(url: str) -> None:
    held, queries = clustered(6000), some(clustered(6000), torch.arange(50))
    exact = hamming.topk(queries.packed, held.packed, 10)[1]
    with open_index(url, 64, "faiss-ivf") as index:
        index.add(held)
        found = index.search(queries, 10)
        report = index.info()["approximation"]
        assert report["trained_on"] == 6000
        assert 1 < report["probes"] < report["lists"]
        assert 0.5 < report["recall@10"] <= 1
        assert found.cut.all()
        assert not index.info()["exact"]
        measured = (found.distances == exact).float().mean().item()
        assert abs(measured - report["recall@10"]) < 0.2
    with open_index(url) as index:  # the same store, exactly
        agrees(index.search(queries, 10), queries, held, 10)


def test_ivf_is_exact_under_a_filter_and_by_radius(url: str) -> None:
    held, queries = clustered(3000), some(clustered(3000), torch.arange(5))
    with open_index(url, 64, "faiss-ivf") as index:
        index.add(held)
        allowed = torch.arange(0, 3000, 7)
        agrees(index.search(queries, 20, where=allowed), queries, some(held, allowed), 20)
        near = hamming.distance(queries.packed, held.packed) <= 9
        assert [len(ids) for ids in index.range(queries, 9).ids] == near.sum(1).tolist()


def test_ivf_follows_adds_and_removals(url: str) -> None:
    held = clustered(3000)
    with open_index(url, 64, "faiss-ivf") as index:
        assert (index.search(held, 1).ids == -1).all()
        index.add(some(held, torch.arange(2000)))
        assert index.info()["approximation"]["trained_on"] == 2000
        index.add(some(held, torch.arange(2000, 3000)))
        last = some(held, torch.arange(2990, 3000))
        assert (index.search(last, 1).distances == 0).all()
        assert (
            index.info()["approximation"]["trained_on"] == 2000
        )  # lists are kept until the rows have doubled
        assert index.remove(range(1, 3000)) == 2999
        found = index.search(some(held, torch.tensor([0])), 3)
        assert found.ids.tolist() == [[0, -1, -1]]
        assert found.distances.tolist() == [[0, -1, -1]]


def test_the_check_of_the_tie_order_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that lets the last row win is found out."""

    class LastRowWins:
        def __init__(self, codes: np.ndarray) -> None:
            self.codes = codes

        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            backwards = torch.from_numpy(self.codes[::-1].copy())
            ids, distances = hamming.topk(torch.from_numpy(queries), backwards, k)
            return distances.numpy(), len(self.codes) - 1 - ids.numpy()

    monkeypatch.setattr(engines_module, "flat_index", LastRowWins)
    with pytest.raises(RuntimeError, match="does not order equal distances by row"):
        engines_module.check_tie_order.__wrapped__(8)
