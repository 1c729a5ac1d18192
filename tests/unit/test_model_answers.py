"""Answers of external models: how they are read, several outputs, copies of what foreign code gets."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from robusthash.attacks.oracle import QueryOracle
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes
from robusthash.models.external.model_answers import AnswerReading, Broken, no_logits
from robusthash.models.external.wrapper import foreign, normalisation_warning
from robusthash.models.hasher import Hasher, build_hasher
from robusthash.models.purifier import Purifier

SIZE, K = 24, 16


@pytest.fixture(scope="module")
def images() -> Tensor:
    small = Draws(1).uniform(torch.arange(12), (3, 6, 6))
    return nn.functional.interpolate(small, SIZE, mode="bilinear")


class Features(nn.Module):
    """Sixteen means of a grid: positive; ``logits`` of them by a random projection."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, K, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images.mean(1), 4).flatten(1)

    def logits(self, images: Tensor) -> Tensor:
        return (self(images) - 0.5) @ self.weight


NET = Features()


# ---------------------------------------------------------------------------------------- the reading


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda u: normalize(u, dim=1), "every row has length 1"),
        (lambda u: normalize(u, dim=1).half(), "every row has length 1"),
        (lambda u: normalize(u.abs(), dim=1), "every row has length 1"),
        (lambda u: u.softmax(1), "every row sums to 1"),
        (lambda u: 3 * u.relu() + 1, "none is below 0"),
        (lambda u: 0.01 * u.sigmoid(), "a cut at 0.5"),
        (lambda u: u, ""),
        (lambda u: u.sigmoid(), ""),
    ],
)
def test_numbers_that_are_no_logits_are_not_cut(answer, why, images):
    def model(x: Tensor) -> Tensor:
        return answer(5 * NET.logits(x).detach())

    assert why in no_logits(model(images))
    assert bool(why) == bool(no_logits(model(images)))
    made = foreign(model, images, "toy")
    assert made.hasher.distance == ("cosine" if why else "hamming")
    said = made.remarks[0]
    for words in ("Nobody said so", "--metric", why):
        assert words in said
    logits = made.hasher({"image": images})["image"].logits
    expected = model(images).float()
    assert torch.allclose(logits, expected - 0.5 if made.form == "probabilities" else expected)


def test_what_the_user_says_is_followed(images):
    made = foreign(NET.logits, images, "toy", reading=AnswerReading("float", "euclidean"))
    assert (made.hasher.distance, made.form) == ("euclidean", "embedding")
    assert "euclidean distance" in made.remarks[0]
    assert "Nobody" not in made.remarks[0]
    assert foreign(NET.logits, images, "toy", reading=AnswerReading(metric="euclidean")).form == "embedding"
    told = foreign(NET.logits, images, "toy", reading=AnswerReading("logits"))
    assert told.hasher.distance == "hamming"
    assert "Nobody" not in told.remarks[0]
    signs = foreign(lambda x: NET.logits(x) >= 0, images, "toy", reading=AnswerReading("signs"))
    assert signs.form == "zero-one"
    with pytest.raises(Broken, match=r"real numbers from .*--output logits"):
        foreign(NET.logits, images, "toy", reading=AnswerReading("signs"))
    with pytest.raises(Broken, match="every bit would be 1; say --output float"):
        foreign(lambda x: 3 * NET(x) + 1, images, "toy", reading=AnswerReading("logits"))
    with pytest.raises(Broken, match="logits are real numbers; say --output signs"):
        foreign(lambda x: NET.logits(x) >= 0, images, "toy", reading=AnswerReading("logits"))
    with pytest.raises(Broken, match="answers 16 numbers, and --bits says 512: this is another model"):
        foreign(NET, images, "toy", 512, AnswerReading("float"))


def test_readings_that_contradict_themselves():
    for options, said in [
        ({"output": "floats"}, "output must be one of auto, logits, signs, float, got 'floats'"),
        ({"metric": "l2"}, "metric must be one of cosine, euclidean, got 'l2'"),
        ({"output": "signs", "metric": "cosine"}, "bits have no cosine distance"),
    ]:
        with pytest.raises(ValueError, match=said):
            AnswerReading(**options)


def test_signed_bytes_get_a_remedy_that_works(images):
    def packed(x: Tensor) -> np.ndarray:
        return np.packbits((NET.logits(x) >= 0).numpy(), axis=1)

    def signed(x: Tensor) -> np.ndarray:
        return (packed(x).astype(int) - 128).astype(np.int8)

    with pytest.raises(Broken, match=r"uint8 by \+ 128 where 128 was taken off, else by .view"):
        foreign(signed, images, "toy")
    right = foreign(packed, images, "toy").hasher({"image": images})["image"].logits
    advised = foreign(lambda x: (signed(x).astype(int) + 128).astype(np.uint8), images, "toy")
    assert torch.equal(advised.hasher({"image": images})["image"].logits, right)


def test_vectors_that_change_are_refused(images):
    numbers = iter(range(100))
    with pytest.raises(Broken, match=r"changes its answers: by .* asked twice"):
        foreign(lambda x: NET(x) + 0.01 * next(numbers), images, "toy", reading=AnswerReading("float"))
    with pytest.raises(Broken, match=r"changes its answers: by .* alone and among others"):
        foreign(
            lambda x: NET(x) - NET(x).mean(0) * (len(x) > 1), images, "toy", reading=AnswerReading("float")
        )


def test_normalisation_is_judged_by_the_models_own_distance(images):
    shift = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    made = foreign(NET, images, "toy")
    assert normalisation_warning(made.hasher, images, (images + 0.002 * shift).clamp(0, 1)) == ""


# ------------------------------------------------------------------------------------- several outputs


def test_several_outputs_are_listed_and_one_is_named(images):
    Pair = namedtuple("Pair", ["logits", "code"])
    answers = {
        "tuple": lambda x: (NET(x)[:, :5], NET.logits(x)),
        "list": lambda x: [NET(x)[:, :5], NET.logits(x)],
        "dict": lambda x: {"logits": NET(x)[:, :5], "code": NET.logits(x)},
        "named tuple": lambda x: Pair(NET(x)[:, :5], NET.logits(x)),
    }
    plain = foreign(NET.logits, images, "toy").hasher({"image": images})["image"].logits
    for kind, call in answers.items():
        names = ("0", "1") if kind in ("tuple", "list") else ("logits", "code")
        listed = rf"2 outputs: {names[0]} \(12, 5\), {names[1]} \(12, 16\); .*--output-name {names[1]}"
        with pytest.raises(Broken, match=listed):
            foreign(call, images, "toy")
        with pytest.raises(Broken, match=f"no output 'x'; it answers {names[0]}"):
            foreign(call, images, "toy", reading=AnswerReading(name="x"))
        made = foreign(call, images, "toy", reading=AnswerReading(name=names[1]))
        assert torch.equal(made.hasher({"image": images})["image"].logits, plain), kind
    assert foreign(lambda x: (NET.logits(x),), images, "toy").hasher.bits == K  # one is no choice
    with pytest.raises(Broken, match="answers one Tensor, no output 'code'; leave --output-name out"):
        foreign(NET.logits, images, "toy", reading=AnswerReading(name="code"))


def test_a_scripted_model_of_two_outputs(images):
    class Two(Features):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            rows = adaptive_avg_pool2d(images.mean(1), 4).flatten(1)
            return rows[:, :5], (rows - 0.5) @ self.weight

    scripted = torch.jit.script(Two().eval())
    with pytest.raises(Broken, match="2 outputs"):
        foreign(scripted, images, "toy")
    assert foreign(scripted, images, "toy", reading=AnswerReading(name="1")).hasher.bits == K


# -------------------------------------------------------------------------------------------- memory


def in_place(x: Tensor) -> np.ndarray:
    pixels = x.detach().cpu().numpy()
    pixels -= pixels.min((1, 2, 3), keepdims=True)
    pixels /= pixels.max((1, 2, 3), keepdims=True)
    return pixels.reshape(len(pixels), -1)[:, :K] >= 0.5


def copied(x: Tensor) -> np.ndarray:
    return in_place(x.clone())


def test_what_a_model_writes_into_its_input_stays_with_it(images):
    before = images.clone()
    one, other = (foreign(call, images, "toy").hasher for call in (in_place, copied))
    assert torch.equal(images, before)
    outputs = [hasher({"image": images})["image"].logits for hasher in (one, other)]
    assert torch.equal(*outputs)
    assert torch.equal(images, before)
    packed = Codes(torch.zeros(3, K // 8, dtype=torch.uint8), K, torch.arange(3))
    batch = Batch({"image": images}, None, torch.arange(12))
    answers = [QueryOracle(hasher, packed, 5).codes(batch).packed for hasher in (one, other)]
    assert torch.equal(*answers)
    assert torch.equal(images, before)


def test_an_answer_in_the_same_memory_is_kept(images):
    buffer = np.zeros((12, K), dtype=np.float32)
    numbers = iter(range(1, 100))

    def reused(x: Tensor) -> np.ndarray:
        buffer[: len(x)] = NET.logits(x).detach().numpy() * (-1) ** next(numbers)
        return buffer[: len(x)]

    with pytest.raises(Broken, match="changes its codes"):
        foreign(reused, images, "toy")


class Writing(nn.Module):
    """An encoder, or purifier, that normalises in place."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, encode=None):
        x -= 0.5
        x *= 2
        return (x, {}) if self.inner is None else self.inner(x)


class WritingPurifier(Writing, Purifier):
    pass


def test_encoders_and_purifiers_get_copies(images):
    base = build_hasher(bits=K, seed=1)
    before, clean = images.clone(), base({"image": images * 2 - 1})["image"].logits
    inside = Hasher({"image": Writing(base.encoders["image"])}, dict(base.heads))
    purified = base.with_parts(purifiers={"image": WritingPurifier()})
    for victim in (inside, purified, purified.as_seen_from("identity")):
        leaf = images.clone().requires_grad_(True)
        logits = victim({"image": leaf})["image"].logits
        assert torch.allclose(logits, clean, atol=1e-5)
        (grad,) = torch.autograd.grad(logits.sum(), leaf)
        assert bool((grad != 0).any())
        with torch.no_grad():
            victim({"image": images})
        assert torch.equal(images, before)
