"""Counting by distance against a naive loop, and the accuracy of the closed forms at database size."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from robusthash.core.hamming import pack
from robusthash.core.types import Codes, Profile
from robusthash.metrics import distance_histogram as core
from robusthash.metrics.average_precision import average_precision, harmonic
from robusthash.metrics.distance_histogram import (
    code_profile,
    merge,
    prepare,
    prepared_counts,
    prepared_profile,
    streamed_profile,
)

FIELDS = ("items", "relevant", "gain", "gain_exp", "ideal")


def make(
    count: int, bits: int, classes: int, seed: int, *, distinct: int | None = None, labels_each: float = 1.5
) -> tuple[Codes, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (distinct or count, bits), generator=generator) * 2 - 1
    labels = (torch.rand(distinct or count, classes, generator=generator) < labels_each / classes).float()
    if distinct:
        rows = torch.randint(distinct, (count,), generator=generator)
        signs, labels = signs[rows], labels[rows]
    return Codes(pack(signs), bits, torch.arange(count)), labels


def naive(query: Codes, query_labels: Tensor, database: Codes, labels: Tensor) -> Profile:
    distance = (query.signs()[:, None] != database.signs()[None]).sum(2)
    shared = (query_labels[:, None] * labels[None]).sum(2).long()
    at = torch.nn.functional.one_hot(distance, query.bits + 1)  # (Q, N, K + 1)
    width = min(int(query_labels.sum(1).max()), int(labels.sum(1).max())) + 1
    return Profile(
        at.sum(1),
        (at * (shared > 0)[:, :, None]).sum(1),
        (at * shared[:, :, None]).sum(1),
        (at * (2.0 ** shared.double() - 1)[:, :, None]).sum(1),
        torch.nn.functional.one_hot(shared, width).sum(1),
    )


def assert_equal(left: Profile, right: Profile) -> None:
    for name in FIELDS:
        assert getattr(left, name).dtype == getattr(right, name).dtype, name
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize(
    ("bits", "classes", "labels_each"),
    [(1, 1, 0.5), (8, 5, 1.5), (12, 10, 2.0), (24, 21, 2.0), (32, 24, 3.0), (48, 38, 3.0), (64, 64, 2.0), (65, 65, 2.0),
     (128, 80, 3.0), (300, 300, 4.0), (1200, 300, 60.0)],
)  # fmt: skip
@pytest.mark.parametrize("narrow", [0, 1 << 14])
def test_profile_equals_a_naive_count(
    bits: int, classes: int, labels_each: float, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "_NARROW", narrow)
    query, query_labels = make(21, bits, classes, 0, labels_each=labels_each)
    database, labels = make(333, bits, classes, 1, labels_each=labels_each)
    assert_equal(
        code_profile(query, query_labels, database, labels), naive(query, query_labels, database, labels)
    )


NEVER = 1 << 62


@pytest.mark.parametrize(
    ("bits", "classes", "distinct", "labels_each"),
    [(1, 1, None, 0.5), (12, 10, None, 2.0), (64, 24, None, 3.0), (64, 38, 40, 3.0), (65, 64, None, 2.0),
     (128, 80, None, 3.0), (48, 10, 7, 1.0), (300, 300, 30, 4.0)],
)  # fmt: skip
@pytest.mark.parametrize("columns", [64, 1 << 17])
def test_machine_code_counts_the_same_integers(
    bits: int,
    classes: int,
    distinct: int | None,
    labels_each: float,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("numba", reason="needs the extra 'fast' (pip install robusthash[fast])")
    query, query_labels = make(21, bits, classes, 0, labels_each=labels_each)
    database, labels = make(333, bits, classes, 1, distinct=distinct, labels_each=labels_each)
    monkeypatch.setattr(core, "_COMPILED", NEVER)
    expected = code_profile(query, query_labels, database, labels)
    monkeypatch.setattr(core, "_COMPILED", 0)
    monkeypatch.setattr(core, "_COLUMNS", columns)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_equal(code_profile(query, query_labels, database, labels), expected)
    torch.set_num_threads(threads)


def test_machine_code_is_used_for_large_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="needs the extra 'fast' (pip install robusthash[fast])")
    from robusthash.metrics import distance_histogram_numba as compiled

    calls: list[int] = []
    counted = compiled.count
    monkeypatch.setattr(compiled, "count", lambda *given: calls.append(1) or counted(*given))
    small, large = make(20, 16, 4, 0), make(1 << 13, 16, 4, 1)
    code_profile(*small, *small)
    assert calls == []
    found = code_profile(*make(1 << 10, 16, 4, 2), *large)
    assert calls == [1]
    monkeypatch.setattr(core, "_numba_installed", lambda: False)
    assert_equal(found, code_profile(*make(1 << 10, 16, 4, 2), *large))
    assert calls == [1]


def test_machine_code_leaves_the_threads_of_torch_as_they_are() -> None:
    """Numba's first call changes the threads of OpenMP, which are torch's; so in a process of its own."""
    pytest.importorskip("numba", reason="needs the extra 'fast' (pip install robusthash[fast])")
    lines = (
        "import numpy as np, torch",
        "torch.set_num_threads(1)",
        "assert torch.get_num_threads() == 1",
        "from robusthash.metrics.distance_histogram_numba import count",
        "one = np.ones((1, 1), np.uint64)",
        "count(one, one, one, one, np.zeros(0, np.int64), np.zeros((1, 2, 2), np.int64))",
        "print(torch.get_num_threads())",
    )
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize("shards", [1, 7, 50])
def test_a_streamed_database_gives_the_profile_of_the_whole(shards: int) -> None:
    query, query_labels = make(30, 20, 9, 14)
    database, labels = make(403, 20, 9, 15)

    def stream() -> object:
        for rows in torch.arange(403).chunk(shards):
            yield Codes(database.packed[rows], 20, database.ids[rows]), labels[rows]
            yield Codes(database.packed[:0], 20, database.ids[:0]), labels[:0]

    expected = code_profile(query, query_labels, database, labels)
    assert_equal(streamed_profile(query, query_labels, stream()), expected)  # type: ignore[arg-type]
    assert_equal(streamed_profile(query, query_labels, stream(), block=13), expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="database is empty"):
        streamed_profile(query, query_labels, [])


@pytest.mark.parametrize("compiled", [0, NEVER], ids=["compiled", "numpy"])
def test_the_order_of_the_database_does_not_matter(compiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T16 on both ways to count: shuffled, sorted by class, reversed."""
    if compiled == 0:
        pytest.importorskip("numba", reason="needs the extra 'fast' (pip install robusthash[fast])")
    monkeypatch.setattr(core, "_COMPILED", compiled)
    query, query_labels = make(20, 12, 5, 16)
    database, labels = make(700, 12, 5, 17)
    expected = code_profile(query, query_labels, database, labels)
    shuffled = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    by_class = (labels @ 2.0 ** torch.arange(5)).argsort(stable=True)
    for order in (shuffled, by_class, torch.arange(700).flip(0)):
        ordered = Codes(database.packed[order], 12, database.ids)
        assert_equal(code_profile(query, query_labels, ordered, labels[order]), expected)


def test_single_labels_count_as_multi_hot_ones_and_items_without_a_label_never_match() -> None:
    query, _ = make(12, 16, 4, 2)
    database, _ = make(200, 16, 4, 3)
    padded = torch.cat([torch.eye(4), torch.zeros(1, 4)])  # the fifth kind has no label
    query_labels, labels = padded[torch.arange(12) % 5], padded[torch.arange(200) % 5]
    profile = code_profile(query, query_labels, database, labels)
    assert_equal(profile, naive(query, query_labels, database, labels))
    assert int(profile.relevant[4].sum()) == 0


@pytest.mark.parametrize("narrow", [0, 1 << 14])
def test_equal_rows_are_merged_and_nothing_changes(narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_NARROW", narrow)
    query, query_labels = make(60, 32, 10, 4, distinct=7)
    database, labels = make(900, 32, 10, 5, distinct=23)
    prepared = prepare(database, labels)
    assert prepared.counts is not None
    assert prepared.codes.shape[1] <= 23
    assert int(prepared.counts.sum()) == 900
    expected = naive(query, query_labels, database, labels)
    assert_equal(code_profile(query, query_labels, database, labels), expected)
    assert_equal(prepared_profile(query, query_labels, prepared), expected)
    items, relevant = prepared_counts(query, query_labels, prepared)
    assert torch.equal(items, expected.items)
    assert torch.equal(relevant, expected.relevant)


def test_hash_collisions_cannot_change_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, query_labels = make(9, 16, 6, 6)
    database, labels = make(400, 16, 6, 7, distinct=20)
    monkeypatch.setattr(core, "_mix", lambda words: core.np.zeros(words.shape[1]))  # as if all rows collided
    assert_equal(
        code_profile(query, query_labels, database, labels), naive(query, query_labels, database, labels)
    )


@pytest.mark.parametrize("narrow", [0, 1 << 14])
@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_blocks_do_not_matter(block: int, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_NARROW", narrow)
    query, query_labels = make(37, 40, 12, 8)
    database, labels = make(130, 40, 12, 9)
    expected = code_profile(query, query_labels, database, labels)
    monkeypatch.setattr(core, "_COLUMNS", 29)
    monkeypatch.setattr(core, "_CELLS", 29 * 5)
    monkeypatch.setattr(core, "_TABLE", 41 * 6 * 7)
    assert_equal(code_profile(query, query_labels, database, labels, block=block), expected)


def test_boolean_and_integer_labels_are_as_good_as_floats() -> None:
    query, query_labels = make(5, 16, 6, 10)
    database, labels = make(50, 16, 6, 11)
    expected = code_profile(query, query_labels, database, labels)
    assert_equal(code_profile(query, query_labels.bool(), database, labels.to(torch.uint8)), expected)


def test_bad_input_is_named() -> None:
    query, query_labels = make(3, 16, 6, 12)
    database, labels = make(10, 16, 6, 13)
    other_bits, _ = make(10, 24, 6, 13)
    with pytest.raises(ValueError, match="16 bits and the database 24"):
        code_profile(query, query_labels, other_bits, labels)
    with pytest.raises(ValueError, match="6 label columns and the database 5"):
        code_profile(query, query_labels, database, labels[:, :5])
    with pytest.raises(ValueError, match="9 label rows for 10"):
        code_profile(query, query_labels, database, labels[:9])
    with pytest.raises(ValueError, match="database is empty"):
        code_profile(query, query_labels, Codes(database.packed[:0], 16, database.ids[:0]), labels[:0])
    with pytest.raises(ValueError, match="empty"):
        code_profile(Codes(query.packed[:0], 16, query.ids[:0]), query_labels[:0], database, labels)
    for wrong in (2.0, 0.5, float("nan"), -1.0):
        bad = labels.clone()
        bad[7, 2] = wrong
        with pytest.raises(ValueError, match="row 7"):
            code_profile(query, query_labels, database, bad)
    with pytest.raises(ValueError, match="padding"):
        code_profile(Codes(query.packed, 15, query.ids), query_labels, database, labels)
    with pytest.raises(ValueError, match="no profiles"):
        merge([])
    with pytest.raises(ValueError, match="do not add"):
        merge(
            [
                code_profile(query, query_labels, database, labels),
                naive(other_bits, labels, other_bits, labels),
            ]
        )


@pytest.mark.parametrize("before", [0, 1, 5, 31, 32, 33, 1000, 99_999, 10**7])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 40, 3000])
def test_harmonic_sums_are_exact_to_rounding(before: int, count: int) -> None:
    exact = math.fsum(1 / (before + j) for j in range(1, count + 1))
    found = float(harmonic(torch.tensor([before]), torch.tensor([count])))
    assert found == pytest.approx(exact, rel=1e-15 * 8, abs=0)


def test_average_precision_of_a_large_database_is_exact_to_twelve_digits() -> None:
    """A group far down the list: where a table of harmonic numbers loses its digits to cancellation."""
    items, relevant = [99_000, 3, 997], [0, 2, 1]
    total, position, hits = Fraction(0), 0, 0
    for n, r in zip(items, relevant, strict=True):
        for j in range(1, n + 1) if r else ():
            inner = Fraction(hits + 1) + (Fraction((j - 1) * (r - 1), n - 1) if n > 1 else 0)
            total += Fraction(r, n) * inner / (position + j)
        position, hits = position + n, hits + r
    found = float(average_precision(torch.tensor([items]), torch.tensor([relevant])))
    assert found == pytest.approx(float(total / 3), rel=1e-12)


def test_a_cut_on_a_group_boundary_has_no_random_denominator() -> None:
    items, relevant = torch.tensor([[2, 3, 5]]), torch.tensor([[1, 2, 1]])
    at_boundary = float(average_precision(items, relevant, 5, "hits"))
    alone = float(average_precision(items[:, :2], relevant[:, :2]))
    assert at_boundary == pytest.approx(alone, abs=1e-15)


def test_unknown_names_and_cuts() -> None:
    items, relevant = torch.tensor([[2]]), torch.tensor([[1]])
    with pytest.raises(ValueError, match="denominator must be"):
        average_precision(items, relevant, denominator="hit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ties must be"):
        average_precision(items, relevant, ties="random")  # type: ignore[arg-type]
    for k in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            average_precision(items, relevant, k)
