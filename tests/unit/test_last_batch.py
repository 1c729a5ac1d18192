"""A last batch of one item, which batch normalisation cannot train on: it joins the one before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robusthash as rh
from robusthash.data import batches, load_data
from robusthash.models.hasher import Hasher
from robusthash.training.least_batch import least_batch


def data(train: int) -> Any:
    return load_data("synthetic", query=20, train=train, database=40, size=16, texts=False, multilabel=False)


class Pixel(nn.Module):
    """An encoder whose last map is one pixel, normalised over the batch alone, as resnet18 at 32 px."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 16), nn.BatchNorm2d(width), nn.Flatten(), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.layers(x), {}


SMALL = {"name": "small", "width": 4}


def hasher_of(name: str) -> Hasher:
    plain = rh.build_hasher(image=SMALL, bits=8)
    if name == "head":
        return rh.build_hasher(image=SMALL, bits=8, head="batchnorm")
    if name == "cpah":
        return rh.build_hasher(image={"name": "cpah", "inner": SMALL}, bits=8)
    if name == "pixel":
        return Hasher({"image": Pixel(plain.encoders["image"].width)}, {"image": plain.heads["image"]})
    return plain


def least(hasher: Hasher, train: int) -> int:
    recipe, some = rh.HashingRecipe(hasher, rh.objectives.CSQ()), data(train)
    recipe.setup(some, 0, 8)
    return least_batch(recipe, some, 8)


def fit(name: str, train: int, size: int) -> Any:
    recipe = rh.HashingRecipe(hasher_of(name), rh.objectives.CSQ())
    return rh.fit(recipe, data(train), rh.TrainConfig(epochs=2, batch_size=size, device="cpu"))


@pytest.mark.parametrize("name", ["head", "pixel", "cpah", "plain"])
@pytest.mark.parametrize("train", [9, 17])
def test_a_last_batch_of_one_is_trained_on(name: str, train: int) -> None:
    assert len(fit(name, train, 8)) == 2


def test_only_models_that_need_it_have_other_batches() -> None:
    needs = {name: least(hasher_of(name), 9) for name in ("head", "cpah", "pixel", "plain")}
    assert needs == {"head": 2, "cpah": 2, "pixel": 2, "plain": 1}  # a map of several pixels is enough
    assert least(hasher_of("head"), 10) == 1
    frozen = hasher_of("head")
    frozen.freeze(list(frozen.parameters()))
    assert least(frozen, 9) == 1, "frozen layers keep their statistics"


def test_the_question_uses_up_no_random_numbers() -> None:
    hasher = hasher_of("pixel")
    before = {name: value.clone() for name, value in hasher.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert least(hasher, 9) == 2
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in hasher.state_dict().items())


def test_batches_of_one_are_refused_before_the_training() -> None:
    with pytest.raises(
        ValueError, match=r"batches of one item \(batch_size .*take a batch_size of at least 2"
    ):
        fit("head", 5, 1)
    assert len(fit("plain", 5, 1)) == 2


def test_batches_join() -> None:
    split = data(9).train
    assert [len(batch) for batch in batches(split, 4)] == [4, 4, 1]
    assert [len(batch) for batch in batches(split, 4, least=2)] == [4, 5]
    assert [len(batch) for batch in batches(split, 3, least=2)] == [3, 3, 3]
    joined = torch.cat([batch.ids for batch in batches(split, 4, start=1, least=2)])
    assert joined.tolist() == [4, 5, 6, 7, 8]
