"""Signs, packing, distances, keyed draws, target labels and the registry."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from helpers import image_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robusthash.core import registry
from robusthash.core.hamming import as_words, distance, pack, sign, topk, unpack
from robusthash.core.labels import cosine, draw_targets, overlap, relevant
from robusthash.core.runtime import Draws, choose_device, digest, precision
from robusthash.core.types import Codes, Reference

BITS = [1, 7, 8, 9, 32, 48, 63, 64, 65, 128, 130]


def random_signs(rows: int, bits: int, seed: int = 0) -> Tensor:
    return torch.where(torch.rand(rows, bits, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)


# --- signs, packing, distances


def test_sign_of_zero_is_plus_one_in_every_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = sign(torch.tensor([0.0, -0.0, 1e-6, -1e-6, 3.0], dtype=dtype))
        assert found.dtype == dtype
        assert found.tolist() == [1.0, 1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_sign_refuses_what_is_not_a_number(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 3 code values are NaN or infinite"):
        sign(torch.tensor([0.1, bad, -2.0]))


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 9), bits=st.integers(1, 140), seed=st.integers(0, 999))
def test_pack_and_unpack_are_inverse(rows: int, bits: int, seed: int) -> None:
    signs = random_signs(rows, bits, seed)
    packed = pack(signs)
    assert packed.shape == (rows, -(-bits // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits).float(), signs)
    assert Codes(packed, bits, torch.arange(rows)).signs().dtype == torch.int8


def test_first_bit_is_the_highest_and_zeros_pad_the_end() -> None:
    assert pack(torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, -1]])).tolist() == [[128]]
    assert pack(torch.tensor([[-1.0, -1, -1, -1, -1, -1, -1, 1, 1, 1]])).tolist() == [[1, 0b11000000]]


def test_lengths_that_do_not_fit_are_refused() -> None:
    packed = pack(random_signs(2, 16))
    for bits, said in [
        (17, "17 bits need 3 bytes a code, got 2"),
        (8, "8 bits need 1 bytes"),
        (0, "positive, got 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            unpack(packed, bits)
    with pytest.raises(ValueError, match="different length: 2 and 3"):
        distance(packed, pack(random_signs(2, 24)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        topk(packed, packed, 0)


@pytest.mark.parametrize("bits", BITS)
def test_distance_equals_the_dot_product_formula(bits: int) -> None:
    left, right = random_signs(5, bits, 1), random_signs(7, bits, 2)
    found = distance(pack(left), pack(right))
    assert found.dtype == torch.int32
    assert torch.equal(found, ((bits - left @ right.T) / 2).to(torch.int32))
    assert as_words(pack(left).numpy()).shape == (5, -(-bits // 64))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    items=st.integers(1, 40),
    k=st.integers(1, 50),
    block=st.sampled_from([1, 3, 64]),
)
def test_topk_is_ordered_by_distance_and_then_id(seed: int, items: int, k: int, block: int) -> None:
    """Few bits, so that most distances tie; ids that are neither sorted nor consecutive."""
    queries, database = random_signs(4, 3, seed), random_signs(items, 3, seed + 1)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:items] - 200
    found, distances = topk(pack(queries), pack(database), k, ids, block)
    assert found.shape == distances.shape == (4, k)
    for row in range(4):
        gaps = ((3 - database @ queries[row]) / 2).int().tolist()
        expected = sorted(zip(gaps, ids.tolist(), strict=True))[:k]
        padded = expected + [(-1, -1)] * (k - len(expected))
        assert list(zip(distances[row].tolist(), found[row].tolist(), strict=True)) == padded


def test_topk_of_positions_by_default() -> None:
    database = torch.tensor([[1.0, 1, 1], [1, 1, -1], [1, 1, 1]])
    found, distances = topk(pack(database[:1]), pack(database), 3)
    assert found.tolist() == [[0, 2, 1]]
    assert distances.tolist() == [[0, 0, 1]]


# --- keyed draws


def test_draws_do_not_depend_on_order_or_batch() -> None:
    draws = Draws(3).within("a", 1)
    ids = torch.tensor([5, 0, 2**40 + 7, -3, 11])
    whole = draws.uniform(ids, (2, 3))
    assert whole.shape == (5, 2, 3)
    assert whole.dtype == torch.float32
    assert torch.equal(draws.uniform(ids.flip(0), (2, 3)), whole.flip(0))
    for row in range(5):
        assert torch.equal(draws.uniform(ids[row : row + 1], (2, 3))[0], whole[row])
    torch.rand(4)
    assert torch.equal(draws.uniform(ids, (2, 3)), whole)
    assert torch.equal(draws.uniform(ids.int().long(), (2, 3))[0], whole[0])
    assert draws.uniform(torch.arange(3), ()).shape == (3,)
    assert draws.uniform(torch.empty(0, dtype=torch.int64), (4,)).shape == (0, 4)


def test_draws_are_keyed_by_seed_scope_and_id() -> None:
    ids = torch.arange(50)
    made = [
        draws.uniform(ids, (4,))
        for draws in (
            Draws(0),
            Draws(1),
            Draws(0).within("a"),
            Draws(0).within("b"),
            Draws(0).within("a", "b"),
        )
    ]
    for left, right in itertools.combinations(made, 2):
        assert float((left == right).double().mean()) < 0.01
    assert Draws(0).within("a").within(1) == Draws(0).within("a", "1")
    assert len(torch.unique(made[0])) == made[0].numel()  # no id repeats another, nor a column
    far = Draws(0).uniform(torch.tensor([1, 1 + 2**32]), (8,))
    assert not torch.equal(far[0], far[1])  # the upper half of an id counts


def chi_square(counts: Tensor) -> float:
    expected = float(counts.sum()) / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("shape", [(200, 50), (5000, 2)], ids=["wide", "tall"])
def test_draws_are_uniform_and_uncorrelated(shape: tuple[int, int]) -> None:
    values = Draws(7, ("chi",)).uniform(torch.arange(shape[0]), shape[1:]).double()
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    # 99.99 % point of chi-square: 19 degrees of freedom 50.8, 99 degrees 157
    assert chi_square(torch.histc(values, 20, 0, 1)) < 51
    neighbours = (values[:-1] * 10).floor() * 10 + (values[1:] * 10).floor()
    assert chi_square(torch.histc(neighbours, 100, 0, 100)) < 157
    columns = (values[:, :-1] * 10).floor() * 10 + (values[:, 1:] * 10).floor()
    assert chi_square(torch.histc(columns, 100, 0, 100)) < 157


def test_draws_are_the_same_in_another_process() -> None:
    code = (
        "import torch; from robusthash.core.runtime import Draws, digest; d = Draws(5, ('x',));"
        "print(d.key(), d.uniform(torch.arange(3), (2,)).double().tolist(), digest({'b': 1, 'a': [2.5]}))"
    )
    source = str(Path(registry.__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": source, "PYTHONHASHSEED": "7"},
    )
    draws = Draws(5, ("x",))
    expected = f"{draws.key()} {draws.uniform(torch.arange(3), (2,)).double().tolist()} {digest({'a': [2.5], 'b': 1})}"
    assert done.stdout.strip() == expected


def test_generator_is_fresh_each_time() -> None:
    draws = Draws(0, ("g",))
    assert torch.equal(torch.rand(3, generator=draws.generator()), torch.rand(3, generator=draws.generator()))
    assert 0 <= draws.key() < 2**62


# --- labels


def test_relevance_is_a_shared_label() -> None:
    left = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    right = torch.tensor([[0.0, 1, 1], [0, 0, 1], [1, 1, 0]])
    assert overlap(left, right).tolist() == [[1, 0, 2], [0, 0, 0]]
    assert relevant(left, right).tolist() == [[True, False, True], [False] * 3]
    expected = [[0.5, 0.0, 1.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(cosine(left, right), torch.tensor(expected))


def test_targets_share_nothing_with_the_query_and_come_from_the_database() -> None:
    generator = torch.Generator().manual_seed(0)
    database = (torch.rand(60, 5, generator=generator) < 0.3).float()
    queries = (torch.rand(40, 5, generator=generator) < 0.3).float()
    ids = torch.arange(100, 140)
    targets = draw_targets(queries, ids, database, 3, Draws(0))
    assert targets.shape == (40, 3, 5)
    known = {tuple(row) for row in database.tolist()}
    for query, rows in zip(queries, targets, strict=True):
        possible = [
            row
            for row in known
            if sum(row) and not sum(a * b for a, b in zip(row, query.tolist(), strict=True))
        ]
        for row in rows.tolist():
            assert tuple(row) in possible or (not possible and sum(row) == 0)
    assert torch.equal(draw_targets(queries, ids, database, 3, Draws(0)), targets)
    assert not torch.equal(draw_targets(queries, ids, database, 3, Draws(1)), targets)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(draw_targets(queries[order], ids[order], database, 3, Draws(0)), targets[order])
    assert torch.equal(
        draw_targets(queries, ids, database.flip(0), 3, Draws(0)), targets
    )  # a set has no order


def test_targets_are_uniform_over_label_sets_not_over_items() -> None:
    database = torch.tensor([[0.0, 1, 0]] * 97 + [[0.0, 0, 1], [0, 1, 1], [0, 0, 0]])
    queries = torch.tensor([[1.0, 0, 0]]).repeat(3000, 1)
    targets = draw_targets(queries, torch.arange(3000), database, 1, Draws(0))[:, 0]
    sets, counts = torch.unique(targets, dim=0, return_counts=True)
    assert sets.tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 1]]  # never the empty set
    assert counts.min() > 900


def test_impossible_targets_are_all_zero() -> None:
    database = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    targets = draw_targets(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.arange(2), database, 2, Draws(0))
    assert targets[0].sum() == 0
    assert targets[1].tolist() == [[1, 0], [1, 0]]


# --- records


def test_records_are_frozen_and_replaced() -> None:
    batch = image_batch(torch.rand(3, 4), torch.eye(3))
    with pytest.raises(AttributeError):
        batch.ids = torch.arange(3)  # type: ignore[misc]
    other = batch.with_inputs({"image": torch.zeros(3, 1, 1, 4)})
    assert other.ids is batch.ids
    assert float(batch.inputs["image"].sum()) > 0
    assert len(batch.to("cpu")) == 3
    assert Reference({"image": torch.ones(2, 4)}, None).to("cpu").labels is None


# --- devices and precision


def test_devices_and_precisions_that_are_not_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match=r"'abacus' is not usable here.*--device cpu"):
        choose_device("abacus")
    with pytest.raises(ValueError, match="'float32', 'bf16' or 'fp16', got 'half'"), precision("half", "cpu"):
        pass
    with precision("bf16", "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with precision("float32", "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_digest_is_short_stable_and_blind_to_key_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert len(digest("x")) == 12
    assert len(digest("x", 16)) == 16


# --- registry


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own, forgotten afterwards."""
    monkeypatch.setattr(registry, "_CARDS", {})
    monkeypatch.setattr(registry, "_UNREAD", [])

    @registry.register("fruit", "apple", paper="Newton 1687", evidence="paper")
    def apple(weight: float = 1.0, colour: str = "red") -> tuple[str, float, str]:
        """A round fruit.

        More about it.
        """
        return "apple", weight, colour

    @registry.register("fruit", "pear")
    def pear(weight: float) -> tuple[str, float]:
        return "pear", weight


@pytest.mark.usefixtures("shelf")
def test_registry_builds_by_name_options_and_context() -> None:
    assert registry.build("fruit", "apple") == ("apple", 1.0, "red")
    assert registry.build("fruit", {"name": "apple", "weight": 2.0}, colour="green", price=3) == (
        "apple",
        2.0,
        "green",
    )
    settings = {"name": "pear", "weight": 5.0}
    assert registry.build("fruit", settings) == ("pear", 5.0)
    assert settings == {"name": "pear", "weight": 5.0}  # what was handed over is left alone
    first, second = registry.catalogue("fruit")
    assert (first.name, first.summary) == ("apple", "A round fruit.")
    assert (first.paper, first.evidence) == ("Newton 1687", "paper")
    assert (second.name, second.summary, second.evidence) == ("pear", "", "own")
    assert registry.catalogue("vegetable") == []


def test_errors_of_attacks_name_the_verb_of_a_search() -> None:
    with pytest.raises(ValueError, match="the name of an attack is a text, got 3"):
        registry.build("attack", {"name": 3})
    with pytest.raises(KeyError, match="by oracle queries: 'robusthash questions RUN --search nes' runs it"):
        registry.build("attack", "nes")


@pytest.mark.usefixtures("shelf")
def test_registry_errors_offer_the_nearest() -> None:
    with pytest.raises(
        KeyError, match=r"no fruit is called 'aple'; did you mean 'apple'\? Known: apple, pear"
    ):
        registry.build("fruit", "aple")
    with pytest.raises(ValueError, match="the name of a fruit is a text, got 3"):
        registry.build("fruit", {"name": 3})
    with pytest.raises(KeyError, match="'apple' takes no 'wieght'; did you mean 'weight'"):
        registry.build("fruit", {"name": "apple", "wieght": 2})
    with pytest.raises(KeyError, match="needs a 'name'"):
        registry.build("fruit", {"weight": 2})
    for wrong in (["apple"], None, 3):
        with pytest.raises(ValueError, match="fruit is a name, or a mapping with 'name' and options, got"):
            registry.build("fruit", wrong)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no vegetable is called 'apple'"):
        registry.build("vegetable", "apple")
    with pytest.raises(KeyError, match="fruit 'pear' needs 'weight'"):
        registry.build("fruit", "pear")
    with pytest.raises(KeyError, match=r"takes no 'zzz'\. Known: colour, weight\."):
        registry.check("fruit", {"name": "apple", "zzz": 2})


@pytest.mark.usefixtures("shelf")
def test_an_option_of_a_few_words_is_checked_before_anything_is_made() -> None:
    @registry.register("fruit", "plum")
    def plum(skin: Literal["blue", "red"] = "blue", stones: Literal[0, 1] = 1) -> str:
        raise AssertionError("made")

    for options, said in (
        ({"skin": "green"}, "skin of fruit 'plum' must be 'blue' or 'red', got 'green'"),
        ({"stones": "1"}, "stones of fruit 'plum' must be 0 or 1, got '1'"),
        ({"skin": ["blue"]}, "got \\['blue'\\]"),
    ):
        with pytest.raises(ValueError, match=said):
            registry.check("fruit", {"name": "plum", **options})
    assert registry.check("fruit", {"name": "plum", "skin": "red", "stones": 0})[1] == {
        "skin": "red",
        "stones": 0,
    }


@pytest.mark.usefixtures("shelf")
def test_an_option_of_a_wrong_type_is_named() -> None:
    """The fault of who wrote the option; without one it is a fault of the code, and stays what it is."""

    @registry.register("fruit", "melon")
    def melon(weight: float = 1.0, broken: int = 0) -> float:
        return weight / 2 + len(broken) if broken else weight / 2  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="weight of fruit 'melon' must be a finite number, got 'heavy'"):
        registry.build("fruit", {"name": "melon", "weight": "heavy"})
    with pytest.raises(TypeError):
        registry.build("fruit", "melon", broken=3)


@pytest.mark.usefixtures("shelf")
def test_a_taken_name_is_refused_and_kinds_are_separate() -> None:
    with pytest.raises(ValueError, match=r"fruit 'apple' is already registered by .*test_core"):
        registry.register("fruit", "apple")(dict)
    registry.register("computer", "apple")(lambda: "silver")
    assert registry.build("computer", "apple") == "silver"
    assert [card.kind for card in registry.catalogue()] == ["computer", "fruit", "fruit"]


def test_words_of_numpy_and_torch_agree() -> None:
    """The packed layout is numpy's: other readers of the files can rely on it."""
    signs = random_signs(3, 20)
    assert np.array_equal(pack(signs).numpy(), np.packbits(signs.numpy() > 0, axis=1))


def page_faults(first_line: str) -> int:
    """Pages that the kernel fills during five attack steps of a small net."""
    code = f"""
import resource, torch
from robusthash.core.runtime import keep_freed_memory
from robusthash.models import build_hasher
{first_line}
torch.set_num_threads(1)
hasher = build_hasher(bits=32, image={{'name': 'small', 'width': 16}}).eval().requires_grad_(False)
images = torch.rand(64, 3, 48, 48)
def step():
    leaf = images.detach().requires_grad_(True)
    torch.autograd.grad(hasher({{'image': leaf}})['image'].relaxed(1.0).sum(), leaf)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    assert page_faults("keep_freed_memory()") < page_faults("") / 4
