"""Every registered objective keeps what objectives promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import facts_of, image_batch, memory_of, output_of

from contract.checks import BITS, LABELS, OBJECTIVE_CHECKS, check_state
from robusthash.core.registry import Card, build, catalogue
from robusthash.objectives import CSQ, DPSH, HashNet, HashObjective, TrainFacts

CARDS = catalogue("objective")
IDS = [card.name for card in CARDS]


@pytest.mark.parametrize("check", OBJECTIVE_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("card", CARDS, ids=IDS)
def test_registered(card: Card, check: Callable[[HashObjective], None]) -> None:
    check(build("objective", card.name))


@pytest.mark.parametrize("card", CARDS, ids=IDS)
def test_state_comes_back(card: Card) -> None:
    check_state(build("objective", card.name), build("objective", card.name))


def test_cards_say_what_the_objectives_are() -> None:
    assert {"dph", "dpsh", "hashnet", "csq"} <= set(IDS)
    for card in CARDS:
        assert card.supervised == build("objective", card.name).supervised
        assert card.summary


@pytest.mark.parametrize("name", ["dpsh", "hashnet"])
@pytest.mark.parametrize(
    "labels", [torch.ones(6, 2), torch.eye(6)[:, :0]], ids=["all-similar", "none-similar"]
)
def test_one_sided_pairs_are_refused(name: str, labels: torch.Tensor) -> None:
    objective = DPSH(balance=True) if name == "dpsh" else HashNet()
    with pytest.raises(
        ValueError, match=f"^{name} learns from labels, and (all|none of the) 6 training items"
    ):
        objective.setup(facts_of(labels, BITS))


def test_an_objective_that_needs_labels_says_so_at_setup() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        CSQ().setup(TrainFacts(6, BITS, None, 0, 0.0))


def test_centers_depend_on_the_seed_alone() -> None:
    made = []
    for seed in (0, 0, 1):
        objective = CSQ()
        torch.rand(seed + 1)  # the global stream plays no part
        objective.setup(facts_of(torch.eye(5), 12, seed))
        made.append((objective.centers.clone(), objective.filler.clone()))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    assert not torch.equal(made[0][0], made[2][0])


def test_memory_rows_follow_the_ids() -> None:
    memory = memory_of({"image": torch.zeros(12, BITS)}, LABELS)
    batch = image_batch(torch.zeros(3, 2), LABELS[:3])
    batch = type(batch)(batch.inputs, batch.labels, torch.tensor([7, 2, 9]))
    logits = torch.randn(3, BITS, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    memory.update({"image": output_of(logits)}, batch)
    assert torch.equal(memory.codes["image"][torch.tensor([7, 2, 9])], torch.tanh(logits))
    assert int((memory.codes["image"].abs().sum(1) > 0).sum()) == 3
    known = memory.reference()
    assert set(known.codes["image"].unique().tolist()) == {-1.0, 1.0}  # also where a row is still zero
    assert not known.codes["image"].requires_grad
    assert torch.equal(known.labels, LABELS)
