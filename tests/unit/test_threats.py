"""Threats as objects: by name, as plain data, hashable, alike in every process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from robusthash.attacks import Ball, Edits, Swaps, Threat, image_threat, named_threat
from robusthash.core.registry import catalogue

NAMES = ("img-linf-8", "img-l2", "txt-bow-m", "txt-token-m", "joint", "db-insert", "db-perturb")


def test_the_catalogue_is_that_of_the_protocol() -> None:
    assert {card.name for card in catalogue("threat")} == {*NAMES, "txt-feat-linf"}
    assert named_threat("img-linf-8") == image_threat()
    assert named_threat("img-l2").balls == {"image": Ball("l2", 0.5)}
    assert named_threat("img-l2", pixels=(224, 224)).balls["image"].eps == pytest.approx(3.5)
    assert named_threat("img-l2", pixels=(64, 16)).balls["image"].eps == pytest.approx(0.5)
    assert named_threat("txt-bow-m").balls == {"text": Edits(3)}
    assert named_threat("txt-token-m").balls == {"text": Swaps(2)}
    assert named_threat("joint").name == "img-linf-8+txt-linf-0.05"
    for name in ("db-insert", "db-perturb"):
        made = named_threat(name)
        assert (made.side, made.knowledge, made.balls) == ("database", "W2", image_threat().balls)


def test_the_range_of_text_features_is_that_of_the_training_set() -> None:
    made = named_threat("txt-feat-linf", features=torch.tensor([[-1.5, 0.0], [0.25, 2.0]]))
    assert made.balls == {"text": Ball("linf", 0.05, (-1.5, 2.0))}
    assert made.name == "txt-linf-0.05 in [-1.5, 2]", (
        "another range is another threat, and results go by the name"
    )
    assert named_threat("txt-feat-linf", features=torch.eye(2)).name == "txt-linf-0.05"
    with pytest.raises(ValueError, match="needs features="):
        named_threat("txt-feat-linf")
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        named_threat("txt-feat-linf", features=torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    "name",
    ["img-linf-4", "img-linf-0.5", "img-l2-3.5", "txt-linf-0.05", "txt-bow-5", "txt-token-1", "img-linf-8+txt-linf-0.1",
     "db-insert-img-linf-4", "db-perturb-img-l2-1", *NAMES],
)  # fmt: skip
def test_every_name_that_a_threat_gives_itself_is_read(name: str) -> None:
    made = named_threat(name)
    assert named_threat(made.name) == made
    assert Threat.from_settings(json.loads(json.dumps(made.settings()))) == made
    if name not in NAMES:
        assert made.name == name


def test_equal_content_is_equal_and_hashes_alike() -> None:
    first = Threat({"image": Ball("linf", 8 / 255), "text": Edits(3)})
    second = Threat({"text": Edits(3.0), "image": Ball("linf", 8 / 255, (0, 1))})
    assert first == second
    assert len({first, second}) == 1
    changes = [
        replace(first, knowledge="W2"),
        replace(first, side="database"),
        replace(first, version=2),
        replace(first, name="mine"),
        Threat({"image": Ball("linf", 8 / 255), "text": Edits(4)}, name=first.name),
        Threat({"image": Ball("linf", 8 / 255, (0.1, 1.0)), "text": Edits(3)}),
    ]
    assert len({first.fingerprint(), *(other.fingerprint() for other in changes)}) == 7
    assert len({first, *changes}) == 7


def test_the_fingerprint_is_the_same_elsewhere() -> None:
    program = "from robusthash.attacks import named_threat; print(named_threat('img-linf-8').fingerprint())"
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert said == [named_threat("img-linf-8").fingerprint()] * 2
    assert said[0] == "0a8eeb20b49b31d"  # kept in records: a change of content needs a new version


def test_scaling_keeps_the_side_in_the_name() -> None:
    assert named_threat("db-insert").scaled(0.5) == named_threat("db-insert-img-linf-4")
    assert replace(image_threat(), version=3).scaled(0.5).version == 3


def test_bad_names_and_settings() -> None:
    with pytest.raises(KeyError, match="did you mean 'img-linf-8'"):
        named_threat("img-linff-8")
    with pytest.raises(KeyError, match=r"no threat is called 'txt-bow-2\.5'"):
        named_threat("txt-bow-2.5")
    with pytest.raises(ValueError, match="img-linf-N is in levels of 255, so N is at most 255"):
        named_threat("img-linf-800")
    with pytest.raises(ValueError, match="txt-linf-N is in the range of texts, 0 to 1, so N is at most 1"):
        named_threat("txt-linf-2")
    with pytest.raises(ValueError, match="two budgets for the image"):
        named_threat("img-linf-8+img-l2-1")
    with pytest.raises(ValueError, match="not 'txt-bow-3'"):
        named_threat("db-insert-txt-bow-3")
    with pytest.raises(ValueError, match="'W3'"):
        named_threat("img-linf-8", "W3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the settings of a threat are"):
        Threat.from_settings({"name": "img-linf-8"})
    with pytest.raises(ValueError, match="norm must be"):
        Threat.from_settings(
            {**image_threat().settings(), "balls": {"image": {"norm": "l3", "eps": 1.0, "bounds": [0, 1]}}}
        )
