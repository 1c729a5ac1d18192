"""Detection of query attacks: near duplicates, their counts, its memory; attackers and ordinary traffic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import make_data, trained_hasher
from PIL import Image

from robusthash.attacks.query_search import Square
from robusthash.attacks.threat_model import image_threat
from robusthash.data.photos import photos
from robusthash.data.transforms import to_pixels
from robusthash.defenses.query_detection import DetectionLimits, Fingerprints, QueryDetector
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.robustness.detected_queries import Evasion, detected_search
from robusthash.robustness.ordinary_traffic import TRAFFIC, ordinary_refusals
from robusthash.robustness.specs.oracle_attacks import OracleAttack

SALT = b"a salt of sixteen bytes"
LIMITS = DetectionLimits(own=4, everyone=10, seconds=100, memory=50)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """(20, 48, 48, 3) uint8, of different photographs."""
    split = photos(size=48, train=20, query=20, database=20).database
    return to_pixels(split.batch(torch.arange(20)).inputs["image"])


def moved(pixels: np.ndarray, seed: int, most: int = 8) -> np.ndarray:
    """The image with every value moved by up to ``most``, as a query attack does."""
    steps = np.random.default_rng(seed).integers(-most, most + 1, pixels.shape)
    return np.clip(pixels.astype(int) + steps, 0, 255).astype(np.uint8)


def shared(fingerprint: Fingerprints, one: np.ndarray, other: np.ndarray) -> int:
    return len(set(fingerprint(one)) & set(fingerprint(other)))


def test_perturbed_copies_share_hashes_and_other_photographs_do_not(pictures) -> None:
    fingerprint = Fingerprints(DetectionLimits(), SALT)
    near = [shared(fingerprint, each, moved(each, 1)) for each in pictures]
    lit = [shared(fingerprint, each, (each * 0.8).astype(np.uint8)) for each in pictures]
    mirrored = [shared(fingerprint, each, np.ascontiguousarray(each[:, ::-1])) for each in pictures]
    others = [shared(fingerprint, one, other) for row, one in enumerate(pictures) for other in pictures[:row]]
    least = DetectionLimits().shared
    assert np.mean(np.array(near) >= least) > 0.9
    assert np.mean(np.array(lit) >= least) > 0.9
    assert min(mirrored) >= least
    assert np.mean(np.array(others) >= least) < 0.02


def test_a_fingerprint_needs_the_salt(pictures) -> None:
    one, same, other = (
        Fingerprints(DetectionLimits(), salt)(pictures[0]) for salt in (SALT, SALT, SALT + b"!")
    )
    assert one == same
    assert not set(one) & set(other)
    assert len(one) == 50
    with pytest.raises(ValueError, match="at least 16 bytes"):
        Fingerprints(DetectionLimits(), b"short")


def test_near_duplicates_slow_and_then_refuse_a_client(pictures) -> None:
    detector = QueryDetector(LIMITS, SALT)
    seen = [detector.see(moved(pictures[0], seed), "one", seed) for seed in range(6)]
    assert [each.verdict for each in seen] == ["answer", "answer", "slow", "slow", "refuse", "refuse"]
    assert [each.own for each in seen] == [0, 1, 2, 3, 4, 4], "what is refused is not remembered"
    assert seen[4].retry_after == 96, "the first of them is forgotten after 100 seconds"
    assert seen[5].retry_after == 95
    assert detector.see(pictures[1], "one", 6).verdict == "answer", "another photograph"
    assert detector.see(moved(pictures[0], 9), "two", 6).verdict == "answer", "another client"
    assert detector.see(moved(pictures[0], 10), "one", 99.9).verdict == "refuse"
    assert detector.see(moved(pictures[0], 11), "one", 100).verdict != "refuse"


def test_clients_are_counted_together_too(pictures) -> None:
    detector = QueryDetector(LIMITS, SALT)
    seen = [detector.see(moved(pictures[0], seed), str(seed), 0) for seed in range(12)]
    assert [each.verdict for each in seen] == ["answer"] * 5 + ["slow"] * 5 + ["refuse"] * 2
    assert {each.own for each in seen} == {0}


def test_equal_pixels_do_not_count(pictures) -> None:
    detector = QueryDetector(LIMITS, SALT)
    assert {detector.see(pictures[0], "one", 0).verdict for _ in range(30)} == {"answer"}
    assert len(detector) == 1


def test_memory_is_bounded_and_forgets_the_oldest(pictures) -> None:
    detector = QueryDetector(DetectionLimits(own=4, everyone=10, memory=8), SALT)
    for seed in range(4):
        detector.see(moved(pictures[0], seed), "one", 0)
    assert detector.see(moved(pictures[0], 4), "one", 0).verdict == "refuse"
    for number in range(1, 9):
        detector.see(pictures[number], "one", 0)
        assert len(detector) <= 8
    assert detector.see(moved(pictures[0], 4), "one", 0).own == 0
    noise = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    for image in noise:
        detector.see(image, "one", 0)
    assert sum(map(len, detector._by_hash.values())) <= 8 * 50


@pytest.mark.parametrize(
    ("value", "message"),
    [({"own": 0}, "own"), ({"shared": 51}, "51"), ({"seconds": 0}, "seconds"), ({"slow": 1.5}, "1.5")],
)
def test_impossible_limits_are_refused(value, message) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionLimits(**value)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        QueryDetector().see(np.zeros((8, 8, 3), np.float32), "one", 0)


# --- attackers


@pytest.fixture(scope="module")
def context() -> EvaluationContext:
    data = make_data()
    return make_context(trained_hasher(data), data, batch_size=12)


def test_attackers_are_refused_and_reach_less(context) -> None:
    spec = OracleAttack("square", Square(), image_threat(24 / 255), "codes", "ap", 60)
    free = detected_search(context, spec, None, marks=(5, 60))
    seen = detected_search(context, spec, DetectionLimits(own=4, everyone=1000), marks=(5, 60))
    assert free.answered.tolist() == [60] * 12
    assert not free.refused.any()
    assert float((seen.refused > 0).double().mean()) > 0.8
    assert float(seen.answered.double().mean()) < 40
    assert float(seen.ap[:, 1].mean()) > float(free.ap[:, 1].mean())
    assert bool((seen.ap[:, 1] <= seen.ap[:, 0]).all())
    again = detected_search(context, spec, DetectionLimits(own=4, everyone=1000), marks=(5, 60))
    assert torch.equal(again.ap, seen.ap)


def test_several_clients_meet_the_count_over_all(context) -> None:
    spec = OracleAttack("square", Square(), image_threat(8 / 255), "codes", "ap", 30)
    limits, many = DetectionLimits(own=4, everyone=15), Evasion("ten", clients=10)
    seen = detected_search(context, spec, limits, many, marks=(30,))
    first = seen.refused[seen.refused > 0]
    assert len(first) > 6
    assert int(first.min()) > 15
    decoys = detected_search(context, spec, limits, Evasion("decoys", decoys=3), marks=(30,))
    assert int(decoys.refused[decoys.refused > 0].min()) >= 5
    with pytest.raises(ValueError, match="marks"):
        detected_search(context, spec, limits, marks=(31,))


def test_ordinary_traffic_is_counted_by_kind(pictures) -> None:
    images = [Image.fromarray(each) for each in pictures[:4]]
    found = ordinary_refusals(images, 48)
    assert [kind.kind for kind in found] == [*TRAFFIC, "all of it"]
    assert found[-1].queries == sum(kind.queries for kind in found[:-1])
    assert found[0].queries == 4 * 13
    assert sum(kind.refused for kind in found[:4]) == 0
    strict = ordinary_refusals(images, 48, DetectionLimits(own=2, everyone=2))
    assert sum(kind.refused for kind in strict) > 0
    assert strict == ordinary_refusals(images, 48, DetectionLimits(own=2, everyone=2))
    with pytest.raises(ValueError, match="at least 2"):
        ordinary_refusals(images[:1], 48)
