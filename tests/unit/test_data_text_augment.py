"""Bags of words, and the augmentation of training images."""

from __future__ import annotations

import pytest
import torch

from robusthash.core.runtime import Draws
from robusthash.data.image_text import Vocabulary, words_of
from robusthash.data.transforms import augment

TEXTS = ["A red disc, a RED square.", "the blue disc's edge", "a disc"]


def test_words_are_lower_case_runs_of_letters_and_digits() -> None:
    assert words_of("A red-hot Disc's 3rd, edge_case!") == [
        "a",
        "red",
        "hot",
        "disc's",
        "3rd",
        "edge",
        "case",
    ]
    assert words_of("cafe\u0301 ÉTÉ") == words_of("caf\u00e9 été")  # accents written in either way
    assert words_of(" ,. ") == []


def test_most_frequent_words_first_then_alphabetical() -> None:
    assert Vocabulary.fit(TEXTS).words == ("a", "disc", "red", "blue", "disc's", "edge", "square", "the")
    assert Vocabulary.fit(TEXTS, 3).words == ("a", "disc", "red")


def test_bags_and_unseen() -> None:
    vocabulary = Vocabulary.fit(TEXTS, 3)
    texts = ["a red red disc", "green disc here", ""]
    assert vocabulary.encode(texts).tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert vocabulary.encode(texts).dtype == torch.float32
    assert vocabulary.encode([]).shape == (0, 3)
    assert vocabulary.unseen(texts) == (2, 7)


def test_vocabulary_errors() -> None:
    with pytest.raises(ValueError, match="at least one word"):
        Vocabulary.fit(["", "..."])
    with pytest.raises(ValueError, match="size of at least 1"):
        Vocabulary.fit(TEXTS, 0)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(64, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def test_augment_is_keyed_by_id_whatever_the_batch(images: torch.Tensor) -> None:
    ids, draws = torch.arange(64), Draws(0).within("epoch", 1)
    once = augment(images, ids, draws)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(images[order], ids[order], draws), once[order])
    assert torch.equal(augment(images[5:6], ids[5:6], draws), once[5:6])
    assert not torch.equal(augment(images, ids, Draws(0).within("epoch", 2)), once)
    assert not torch.equal(augment(images, ids, Draws(1).within("epoch", 1)), once)


def test_augment_leaves_the_global_stream_and_its_input_alone(images: torch.Tensor) -> None:
    before, copy = torch.get_rng_state(), images.clone()
    augment(images, torch.arange(64), Draws(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, copy)


def test_every_result_is_a_crop_of_the_padded_image_or_its_mirror(images: torch.Tensor) -> None:
    pad = 2
    out = augment(images, torch.arange(64), Draws(3), pad=pad)
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1
    padded = torch.nn.functional.pad(images, (pad,) * 4, mode="reflect")
    seen = set()
    for item in range(64):
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                crop = padded[item, :, top : top + 12, left : left + 10]
                for flipped, candidate in ((False, crop), (True, crop.flip(2))):
                    if torch.equal(out[item], candidate):
                        seen.add((item, top, left, flipped))
    assert len(seen) == 64
    assert {top for _, top, _, _ in seen} == set(range(5))
    assert {left for _, _, left, _ in seen} == set(range(5))
    assert 16 < sum(flipped for *_, flipped in seen) < 48


def test_augment_switched_off_is_the_identity(images: torch.Tensor) -> None:
    assert torch.equal(augment(images, torch.arange(64), Draws(0), flip=False, pad=0), images)
    only_flip = augment(images, torch.arange(64), Draws(0), pad=0)
    same = (only_flip == images).flatten(1).all(1)
    mirrored = (only_flip == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_augment_errors(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pad must lie in 0\.\.9 for 12 x 10"):
        augment(images, torch.arange(64), Draws(0), pad=10)
    with pytest.raises(ValueError, match="3 ids for 64 images"):
        augment(images, torch.arange(3), Draws(0))
    with pytest.raises(ValueError, match="float images"):
        augment((images * 255).to(torch.uint8), torch.arange(64), Draws(0))
