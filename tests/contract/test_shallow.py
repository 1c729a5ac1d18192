"""Every registered shallow method: projections by seed alone, better than chance, and one line on what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from robusthash.core.registry import Card, build, catalogue
from robusthash.core.runtime import Draws
from robusthash.data.label_cells import read_labels
from robusthash.objectives.shallow.base import ShallowMethod, solve
from robusthash.training.shallow_recipe import shallow_hasher

CARDS = catalogue("shallow")
IDS = [card.name for card in CARDS]
BITS, ANCHORS = 8, 40
LABELS = np.eye(4)[np.arange(80) % 4]


def features(modalities: int, items: int = 80, seed: int = 0) -> dict[str, np.ndarray]:
    """Vectors of four classes under noise; most of their variance has nothing to do with the class."""
    draw, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    made = {}
    for name, width in [("image", 24), ("text", 16)][:modalities]:
        centres, nuisance = fixed.normal(0, 1.5, (4, width)), fixed.normal(0, 1, (10, width))
        values = LABELS[:items] @ centres + draw.normal(0, 1.5, (items, 10)) @ nuisance
        made[name] = values + draw.normal(0, 0.5, (items, width))
    return made


def modalities_of(name: str) -> int:
    method: ShallowMethod = build("shallow", name)
    return method.modalities


def codes_of(hasher: object, values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = hasher({name: torch.tensor(rows).float() for name, rows in values.items()})  # type: ignore[operator]
    return {name: torch.where(o.logits >= 0, 1.0, -1.0) for name, o in outputs.items()}


def agreement(queries: Tensor, database: Tensor) -> float:
    """Mean average precision of the classes of ``LABELS``."""
    similar = torch.tensor(LABELS @ LABELS.T).bool()
    order = (-queries @ database.T).argsort(dim=1, stable=True)
    hits = similar.gather(1, order).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    return float(((precision * hits).sum(1) / hits.sum(1)).mean())


def test_nine_methods_are_registered() -> None:
    assert {"itq", "sdh", "cosdish", "lfh", "cvh", "cmfh", "scm", "seph", "dlfh"} <= set(IDS)
    for card in CARDS:
        method = build("shallow", card.name)
        assert card.summary
        assert card.supervised == method.supervised
        assert (card.modality == "image+text") == (method.modalities == 2)


@pytest.mark.parametrize("card", CARDS, ids=IDS)
def test_codes_depend_on_the_seed_alone_and_not_on_the_batch(card: Card) -> None:
    given = features(modalities_of(card.name))
    made = []
    for noise in (1, 5):
        torch.rand(noise)  # the global stream plays no part
        made.append(shallow_hasher(card.name, given, LABELS, BITS, ANCHORS, seed=3))
    first, second = (codes_of(hasher, given) for hasher in made)
    for name, codes in first.items():
        assert codes.shape == (80, BITS)
        assert torch.equal(codes, second[name])
        alone = codes_of(made[0], {name: given[name][5:6]})[name]
        assert torch.equal(alone, codes[5:6])


@pytest.mark.parametrize("card", CARDS, ids=IDS)
def test_new_items_are_found_better_than_by_chance_and_supervised_ones_better_than_by_itq(card: Card) -> None:
    count = modalities_of(card.name)
    given, others = features(count), features(count, seed=1)
    hasher = shallow_hasher(card.name, given, LABELS, BITS, ANCHORS)
    for modality, rows in given.items():
        base = shallow_hasher("itq", {modality: rows}, None, BITS, ANCHORS)
        found, least = (
            agreement(
                codes_of(h, {modality: others[modality]})[modality], codes_of(h, {modality: rows})[modality]
            )
            for h in (hasher, base)
        )
        assert found > 0.27  # chance is 1 / 4
        if card.supervised:
            assert found > least + 0.03, (modality, found, least)


REFUSED = ("labels", "same", "few", "nan", "modality", "constant")


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("card", CARDS, ids=IDS)
def test_what_it_cannot_solve_is_said_in_a_line(card: Card, case: str) -> None:
    count = modalities_of(card.name)
    given, labels, bits = features(count), LABELS, BITS
    if case in ("labels", "same") and not card.supervised:
        assert shallow_hasher(card.name, given, None, bits, ANCHORS).bits == bits  # needs none
        return
    if case == "labels":
        labels, said = None, "is supervised, and the training items have no labels"
    elif case == "same":
        labels, said = np.ones((80, 2)), "all training items have the same"
    elif case == "few":
        given, labels, bits = {n: v[:7] for n, v in given.items()}, LABELS[:7], 8
        said = "8 bits need at least 8 training items, and there are 7; take fewer bits"
    elif case == "nan":
        given["image"][[4, 9], 3] = np.nan
        said = "image features hold NaN or infinite values in 2 of 80 training items, the first at 4"
    elif case == "constant":
        given, said = {n: np.ones_like(v) for n, v in given.items()}, "have the same image features"
    elif count == 2:
        given, said = {"image": given["image"]}, "hashes images and texts together, and only image features"
    else:
        given, said = features(2), "hashes one modality, and here are image and text"
    anchors = 0 if case == "few" else ANCHORS
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is looked at below
        shallow_hasher(card.name, given, labels, bits, anchors)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [card.name for card in CARDS if build("shallow", card.name).pairwise])
def test_labels_without_negatives_are_refused(name: str) -> None:
    labels = np.hstack([np.ones((80, 1)), LABELS])
    with pytest.raises(ValueError, match="every two here share a label"):
        shallow_hasher(name, features(modalities_of(name)), labels, BITS, ANCHORS)


@pytest.mark.parametrize("bits", [0, -4])
def test_codes_without_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be a whole number from 1, got {bits}"):
        shallow_hasher("itq", {"image": np.eye(8)}, bits=bits)


@pytest.mark.parametrize("options", [{"bits": True}, {"anchors": 2.5}, {"anchors": "5"}, {"anchors": True}])
def test_numbers_of_another_type_are_refused(options: dict[str, object]) -> None:
    (name, value), least = next(iter(options.items())), int("bits" in options)
    with pytest.raises(ValueError, match=f"^{name} must be a whole number from {least}, got {value!r}$"):
        shallow_hasher("itq", features(1), **{"bits": BITS, **options})  # type: ignore[arg-type]


CLASSES = np.arange(80) % 4


@pytest.mark.parametrize(
    "labels", [CLASSES, CLASSES.tolist(), [[number] for number in CLASSES], ["dcba"[n] for n in CLASSES]]
)
def test_labels_of_every_form_of_from_arrays_are_taken(labels: object) -> None:
    given = features(1)
    hashers = [shallow_hasher("sdh", given, form, BITS) for form in (labels, read_labels(labels, 80)[0])]  # type: ignore[arg-type]
    first, second = (codes_of(hasher, given)["image"] for hasher in hashers)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (CLASSES[:, None], r"use labels\[:, 0\] where one column holds the classes"),
        (LABELS.astype(int).astype(str), "multi-hot labels are 0 and 1, got '1'"),
        (CLASSES + 0.5, "item 0 has the label 0.5"),
        (np.where(LABELS, np.nan, 0), "multi-hot labels are 0 and 1, got nan"),
        (LABELS[:50], "50 labels for 80 items"),
    ],
)
def test_labels_that_from_arrays_refuses_are_refused(labels: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        shallow_hasher("sdh", features(1), labels, BITS)


def test_features_that_are_no_rows_of_numbers_are_refused() -> None:
    both = features(2)
    for labels in (None, LABELS, LABELS[:50]):
        with pytest.raises(ValueError, match="there are features 80 of image and 50 of text; give each item"):
            shallow_hasher("cvh", {**both, "text": both["text"][:50]}, labels, BITS)
    with pytest.raises(ValueError, match="image features are numbers, got an array of <U"):
        shallow_hasher("itq", {"image": np.eye(8).astype(str)}, bits=4)
    with pytest.raises(ValueError, match=r"image features are \(N, D\), an item a row, got \(8,\)"):
        shallow_hasher("itq", {"image": np.ones(8)}, bits=4)
    with pytest.raises(ValueError, match=r"features are \(N, D\) arrays by modality, got ndarray; give"):
        shallow_hasher("itq", np.eye(8), bits=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("anchors", [0, ANCHORS])
def test_the_hasher_takes_floats_of_any_size_and_refuses_what_has_no_code(anchors: int) -> None:
    rows = features(1)["image"]
    hasher = shallow_hasher("itq", {"image": rows}, None, BITS, anchors)
    expected = hasher({"image": torch.from_numpy(rows).float()})["image"].logits
    assert torch.equal(hasher({"image": torch.from_numpy(rows)})["image"].logits, expected)
    with pytest.raises(
        ValueError, match=r"items in rows, \(N, 24\), got \(24,\); of one item give values\[None\]"
    ):
        hasher({"image": torch.from_numpy(rows[0])})
    rows[[4, 9], 3] = np.nan, np.inf
    with pytest.raises(ValueError, match="NaN or infinite in 2 of 80 items, the first at 4; leave"):
        hasher({"image": torch.from_numpy(rows)})


@pytest.mark.parametrize("name", ["sdh", "cosdish", "lfh"])
def test_labels_that_are_no_numbers_are_refused(name: str) -> None:
    labels = np.eye(4)[np.arange(60) % 4]
    labels[3] = np.nan
    vectors, draws = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), Draws(0, ("labels",))
    with pytest.raises(ValueError, match="labels hold NaN or infinite values in 1 of 60 training items"):
        solve(build("shallow", name), {"image": vectors}, torch.from_numpy(labels), 8, draws)


def test_one_code_for_all_items_is_refused() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8))
    with pytest.raises(ValueError, match="gives all 60 training items one image code of 8 bits"):
        shallow_hasher("cosdish", {"image": vectors}, np.eye(60), bits=8)
    with pytest.raises(ValueError, match="features holds nothing"):
        shallow_hasher("itq", {})


def test_more_anchors_than_items_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"90 anchors .* there are 80; set hasher\.head\.anchors to at most 80"
    ):
        shallow_hasher("sdh", features(1), LABELS, BITS, 90)


def test_more_bits_than_features_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="24 features, 30 bits"):
        shallow_hasher("itq", features(1), None, 30)
    with pytest.raises(ValueError, match=r"16 here, not 20; .*kernel"):
        shallow_hasher("cvh", features(2), None, 20)
    assert shallow_hasher("cvh", features(2), None, 20, anchors=40).bits == 20
