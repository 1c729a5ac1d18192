"""Pseudo-labels: who votes, what is never read, what an epoch holds, resuming, and refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import Interrupted, MemoryLog, make_data, output_of, train_config, trained_hasher
from torch.nn.functional import softplus

from robusthash.attacks.published import pgd
from robusthash.core.hamming import unpack
from robusthash.data import RetrievalData
from robusthash.defenses.outer_losses import PlainAT
from robusthash.defenses.pseudo_labels import PseudoLabels
from robusthash.models import Hasher
from robusthash.models.encoding import encode_split
from robusthash.objectives import TrainFacts
from robusthash.objectives.centers import CodeSoftmax
from robusthash.training import fit


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def warm(data: RetrievalData) -> Hasher:
    return trained_hasher(data, epochs=4)


def recipe(hasher: Hasher, **options: float) -> PseudoLabels:
    objective = CodeSoftmax()
    attack = pgd(objective, steps=2, step_size=4 / 255)
    return PseudoLabels(copy.deepcopy(hasher), objective, attack, PlainAT(3.0), **options)


def test_unlabelled_items_get_the_labels_of_most_neighbours(data: RetrievalData, warm: Hasher) -> None:
    enlarged = recipe(warm, neighbours=3).enlarged(data)
    labelled = len(data.train)
    assert torch.equal(enlarged.train.labels[:labelled], data.train.labels)
    trained, database = (
        unpack(encode_split(warm, split)["image"].packed, warm.bits) for split in (data.train, data.database)
    )
    position = {content: row for row, content in enumerate(data.database.hashes)}
    assert len(enlarged.train) > labelled
    for row in range(labelled, len(enlarged.train)):
        code = database[position[enlarged.train.hashes[row]]]
        nearest = (trained.float() @ code.float()).topk(3).values.min()
        voters = (trained.float() @ code.float()) > nearest  # those that no tie can leave out
        certain = data.train.labels[voters].sum(0) > 1.5
        assert (enlarged.train.labels[row][certain] == 1).all()
        assert enlarged.train.labels[row].sum() >= 1


def test_labels_of_the_database_are_never_read(data: RetrievalData, warm: Hasher) -> None:
    wrong = replace(data.database, labels=data.database.labels.roll(1, 1))
    one, other = (recipe(warm).enlarged(d) for d in (data, replace(data, database=wrong)))
    assert torch.equal(one.train.labels, other.train.labels)


def test_items_come_with_their_own_pixels(data: RetrievalData, warm: Hasher) -> None:
    train = recipe(warm).enlarged(data).train
    mixed = torch.tensor([len(train) - 1, 0, len(data.train), 1])
    images = train.batch(mixed).inputs["image"]
    assert torch.equal(images[1], data.train.batch(torch.tensor([0])).inputs["image"][0])
    row = list(data.database.hashes).index(train.hashes[-1])
    assert torch.equal(images[0], data.database.batch(torch.tensor([row])).inputs["image"][0])


def test_an_epoch_holds_every_labelled_item_and_a_share_of_others(data: RetrievalData, warm: Hasher) -> None:
    trained = recipe(warm, share=0.2)
    trained.setup(trained.enlarged(data), 0, 16)
    labelled = len(data.train)
    first, second = trained.pool(0), trained.pool(1)
    assert first is not None
    assert second is not None
    assert set(range(labelled)) <= set(first.tolist())
    assert len(first) == round(labelled / 0.8) == trained.epoch_items(labelled)
    assert first.tolist() != second.tolist()
    assert torch.equal(first, trained.pool(0))


def test_a_resumed_training_is_the_same(data: RetrievalData, warm: Hasher) -> None:
    config = replace(train_config(), epochs=2)
    whole = recipe(warm)
    fit(whole, data, config)
    log = MemoryLog(stop_after=1)
    with pytest.raises(Interrupted):
        fit(recipe(warm), data, config, log)
    again = recipe(warm)
    fit(again, data, config, log)
    for one, other in zip(whole.hasher.parameters(), again.hasher.parameters(), strict=True):
        assert torch.equal(one, other)


def test_data_without_unlabelled_items_are_refused(data: RetrievalData, warm: Hasher) -> None:
    with pytest.raises(ValueError, match="so none is unlabelled; take the recipe 'adversarial'"):
        recipe(warm).enlarged(replace(data, database=replace(data.train, name="database")))
    with pytest.raises(ValueError, match="has no training labels"):
        recipe(warm).enlarged(replace(data, train=replace(data.train, labels=None)))
    for wrong in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="share is one of unlabelled items"):
            recipe(warm, share=wrong)


def test_code_softmax_in_closed_form() -> None:
    objective = CodeSoftmax(quantisation=0.0, scale=6.0, weight=0.5)
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    objective.setup(TrainFacts(3, 8, labels, 0, 0.4))
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = objective.similarity(output_of(logits), labels, torch.empty(0, 8), labels)
    relaxed, centers = torch.tanh(logits), objective.centers
    for row, own in ((0, [0]), (1, [1, 2])):
        scores = torch.stack([6.0 * (relaxed[row] * center).mean() for center in centers])
        cross = -sum(torch.log(scores[c].exp() / scores.exp().sum()) for c in own) / len(own)
        pull = softplus(-2 * objective.targets(labels)[row] * logits[row]).mean()
        assert float(found[row]) == pytest.approx(float(pull + 0.5 * cross), rel=1e-5)
    assert float(found[2]) == 0.0
