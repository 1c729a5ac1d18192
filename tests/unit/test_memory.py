"""What does not fit into memory is done again, less at a time, with the same numbers; that is said, or there
is one error with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers import make_data, trained_hasher

from robusthash.attacks.published import guided_apgd
from robusthash.core.out_of_memory import DoesNotFit, SmallerBatch, halving, out_of_memory
from robusthash.core.types import Inputs, Outputs
from robusthash.data import RetrievalData
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.evaluate import attack_all
from robusthash.evaluation.runner import run_attacks
from robusthash.models import Hasher, encode_split
from robusthash.robustness.specs.oracle_attacks import OracleAttack, oracle_attacks, oracle_curve

EPS = 16 / 255
pytestmark = pytest.mark.filterwarnings("ignore::robusthash.core.out_of_memory.SmallerBatch")


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data(query=20)


@pytest.fixture(scope="module")
def victim(data: RetrievalData) -> Hasher:
    return trained_hasher(data)


class Hungry(Hasher):
    """The same model on a device that holds so many images at a time, and a list of the batches that it was
    given."""

    def __init__(self, victim: Hasher, fits: int) -> None:
        super().__init__(dict(victim.encoders), dict(victim.heads), victim.spec)
        self.fits, self.given = fits, list[int]()

    def forward(self, inputs: Inputs) -> Outputs:
        self.given.append(len(inputs["image"]))
        if self.given[-1] > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(inputs)


# ---------------------------------------------------------------------------------------------- the helper


def at_most(fits: int, error: Exception) -> Callable[[int], str]:
    def work(size: int) -> str:
        if size > fits:
            raise error
        return f"by {size}"

    return work


@pytest.mark.parametrize(
    ("size", "fits", "expected"), [(250, 250, 250), (250, 100, 25), (256, 100, 64), (12, 4, 3), (7, 6, 1)]
)
def test_sizes_fall_by_divisors(size: int, fits: int, expected: int) -> None:
    said: list[str] = []
    assert halving(at_most(fits, MemoryError()), size, "items", "encoded", said.append) == (
        f"by {expected}",
        expected,
    )
    assert bool(said) == (expected < size)
    if said:
        assert said[-1].endswith(f"did not fit into memory; {expected} were encoded at a time")


def test_one_that_does_not_fit_is_one_error_however_deep() -> None:
    asked: list[int] = []

    def nested(size: int) -> object:
        asked.append(size)
        return halving(at_most(0, torch.OutOfMemoryError("full")), size, "items", "encoded", lambda _: None)

    with pytest.raises(MemoryError, match=r"for items to be encoded one at a time; .*runtime\.device: cpu"):
        halving(nested, 8, "queries", "attacked", lambda _: None)
    assert asked == [8]


def test_errors_of_other_kinds_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        halving(
            at_most(1, RuntimeError("shapes cannot be multiplied")), 8, "items", "encoded", lambda _: None
        )
    with pytest.raises(ValueError, match="out of memory"):
        halving(at_most(1, ValueError("out of memory")), 8, "items", "encoded", lambda _: None)


def full() -> Iterator[BaseException]:
    yield torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    yield RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    yield MemoryError("Unable to allocate 8.00 EiB for an array")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    yield caught.value


def test_every_library_says_it_in_its_own_words() -> None:
    assert all(out_of_memory(error) for error in full())
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))


# ---------------------------------------------------------------------------------------------- encoding


def test_a_split_is_encoded_again_by_less(victim: Hasher, data: RetrievalData) -> None:
    hungry = Hungry(victim, 10)
    with pytest.warns(
        SmallerBatch, match="16 items at a time did not fit into memory; 8 were encoded at a time"
    ):
        codes = encode_split(hungry, data.database, batch_size=32)["image"]
    assert hungry.given == [32, 16, 8, 8, 8, 8, 4]
    assert torch.equal(codes.packed, encode_split(victim, data.database)["image"].packed)
    with pytest.raises(DoesNotFit, match="items to be encoded one at a time"), pytest.warns(SmallerBatch):
        encode_split(Hungry(victim, 0), data.database)


def test_all_splits_of_a_bench_share_the_smaller_batch(victim: Hasher, data: RetrievalData) -> None:
    """The database fits and the queries do not: it is encoded again, and so is what the attacker is told
    later."""

    class Lopsided(Hungry):
        def for_database(self) -> Hasher:
            return roomy

    roomy, hungry = Hungry(victim, 100), Lopsided(victim, 10)
    with pytest.warns(SmallerBatch, match="16 items at a time did not fit"):
        context = make_context(hungry, data, batch_size=4)
    assert roomy.given == [36, 36, 36, 32, 4, 16, 16, 4, 8, 8, 8, 8, 4]
    assert hungry.given == [20, 20, 20, 20, 16, 8, 8, 4]
    assert context.encoded_by == 8
    assert context.notes[-1] == "16 items at a time did not fit into memory; 8 were encoded at a time"
    expected = make_context(victim, data)
    assert torch.equal(context.database.packed, expected.database.packed)
    assert torch.equal(context.query.packed, expected.query.packed)
    roomy.given.clear()
    assert context.known(guided_apgd(EPS, 2)) is not None
    assert replace(context, batch_size=2)._training.codes["image"].shape == (48, 8)
    assert set(roomy.given) == {8}


# ---------------------------------------------------------------------------------------------- attacks


@pytest.fixture(scope="module")
def context(victim: Hasher, data: RetrievalData) -> EvaluationContext:
    return make_context(victim, data, batch_size=8)


@pytest.mark.parametrize("fits", [8, 5, 1])
def test_an_attack_in_parts_finds_the_same(context: EvaluationContext, fits: int) -> None:
    attack = guided_apgd(EPS, 3)
    expected = attack_all(context, attack)
    narrow = replace(context, victim=Hungry(context.victim, fits), encoded_by=1)
    seen: list[int] = []
    if fits == 8:
        found = attack_all(narrow, attack)
    else:
        with pytest.warns(
            SmallerBatch, match="8 queries at a time did not fit into memory; 4 were attacked at a time"
        ):
            found = attack_all(narrow, attack, progress=lambda done, total, text: seen.append(done))
        assert seen == [1, 2, 3]
    assert torch.equal(found.signs, expected.signs)
    torch.testing.assert_close(found.inputs, expected.inputs)
    assert torch.equal(found.passes, expected.passes)


def test_the_size_that_fits_is_kept_for_later_blocks(context: EvaluationContext) -> None:
    hungry = Hungry(context.victim, 5)
    with pytest.warns(SmallerBatch):
        attack_all(replace(context, victim=hungry, encoded_by=4), guided_apgd(EPS, 2))
    assert hungry.given.count(8) == 1


def test_one_query_that_does_not_fit_is_an_error_with_a_remedy(context: EvaluationContext) -> None:
    narrow = replace(context, victim=Hungry(context.victim, 0))
    attack = replace(guided_apgd(EPS, 2), threat=replace(guided_apgd(EPS, 2).threat, knowledge="W2"))
    message = r"queries to be attacked one at a time; free some memory"
    with pytest.raises(MemoryError, match=message), pytest.warns(SmallerBatch):
        attack_all(narrow, attack)
    with pytest.raises(MemoryError, match=message):
        run_attacks(narrow, (GradientAttack("guided", attack),))


def test_a_suite_notes_the_smaller_batches_of_encoding_too(victim: Hasher, data: RetrievalData) -> None:
    with pytest.warns(SmallerBatch):
        narrow = make_context(Hungry(victim, 5), data, batch_size=8)
    found = run_attacks(narrow, (GradientAttack("guided", guided_apgd(EPS, 2)),))
    assert found is not None
    assert found.notes[-2:] == (
        "8 items at a time did not fit into memory; 4 were encoded at a time",
        "8 queries at a time did not fit into memory; 4 were attacked at a time",
    )


def test_questions_are_asked_in_parts(context: EvaluationContext) -> None:
    spec: OracleAttack = oracle_attacks(guided_apgd(EPS, 2).threat, 6)[0]
    expected = oracle_curve(context, spec, (2, 6))
    with pytest.warns(SmallerBatch):
        found = oracle_curve(replace(context, victim=Hungry(context.victim, 5)), spec, (2, 6))
    assert torch.equal(found.ap, expected.ap)
