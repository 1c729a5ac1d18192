"""DSARH's objective and outer loss over image and text, and the recipe with learned database codes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import (
    Interrupted,
    MemoryLog,
    facts_of,
    image_batch,
    make_data,
    memory_of,
    output_of,
    small_hasher,
    train_config,
    trained_hasher,
)
from torch import Tensor, nn
from torch.nn.functional import softplus

from robusthash.apps.experiment.config import make_config
from robusthash.attacks.dsarh import dsarh
from robusthash.core.hamming import sign, unpack
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, HashOutput
from robusthash.data import RetrievalData
from robusthash.data.synthetic import synthetic
from robusthash.defenses import AdversarialTraining, OuterLoss, Round
from robusthash.defenses.dsarh_asymmetric import Asymmetric
from robusthash.defenses.outer_losses import DSARHOuter
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import CSQ, DPSH, HashObjective
from robusthash.objectives.adsh import ADSH
from robusthash.objectives.base import quantisation
from robusthash.objectives.cross_modal import DSARHObjective
from robusthash.training import HashingRecipe, Moment, Recipe, fit


def inner(**options: Any) -> Any:
    return dsarh(**{"steps": 2, "step_size": 5.33 / 255, **options})


def losses_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# --- the image-text objective


class Pair:
    """Outputs and memory of both modalities; items 2, 5 and 7 of nine are the batch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.eye(3)[torch.arange(9) % 3]
        self.ids = torch.tensor([2, 5, 7])
        self.logits = {
            n: torch.randn(3, 4, generator=generator).requires_grad_(True) for n in ("image", "text")
        }
        self.bank = {n: torch.tanh(torch.randn(9, 4, generator=generator)) for n in ("image", "text")}
        self.memory = memory_of(self.bank, self.labels)
        self.batch = Batch({}, self.labels[self.ids], self.ids)
        self.outputs = {name: output_of(value) for name, value in self.logits.items()}

    def mean(self, left: str, right: str) -> Tensor:
        """L_ab, item by item, pair by pair."""
        total, count = torch.zeros(()), 0
        for row, item in enumerate(self.ids.tolist()):
            for other in range(9):
                if left == right and other == item:
                    continue
                theta = self.outputs[left].code[row] @ sign(self.bank[right][other]) / 2
                similar = float((self.labels[item] * self.labels[other]).sum() > 0)
                total, count = total + softplus(theta) - similar * theta, count + 1
        return total / count


def test_objective_is_the_sum_of_its_four_parts() -> None:
    pair = Pair()
    objective = DSARHObjective(alpha=0.5, beta=2.0, eta=0.3)
    objective.setup(facts_of(pair.labels, 4))
    terms = objective(pair.outputs, pair.batch, pair.memory)
    expected = pair.mean("image", "text") + 0.5 * pair.mean("image", "image")
    expected = expected + pair.mean("text", "image") + 2.0 * pair.mean("text", "text")
    assert terms["similarity"].item() == pytest.approx(expected.item(), rel=1e-5)
    spread = sum(quantisation(output).mean().item() for output in pair.outputs.values())
    assert terms["regularisation"].item() == pytest.approx(0.3 * spread, rel=1e-5)


def test_text_learns_from_images_and_images_from_text() -> None:
    """Without its intra-modal term, each encoder still gets a gradient."""
    pair = Pair()
    objective = DSARHObjective(alpha=0.0, beta=0.0, eta=0.0)
    objective.setup(facts_of(pair.labels, 4))
    loss = objective(pair.outputs, pair.batch, pair.memory)["similarity"]
    for grad in torch.autograd.grad(loss, list(pair.logits.values())):
        assert bool((grad.abs().sum(1) > 0).all())


def test_quantisation_rests_at_the_signs() -> None:
    code = torch.tensor([[1.0, -1.0], [0.4, -0.3]], requires_grad=True)
    output = HashOutput(torch.zeros(2, 2), code, code)
    (grad,) = torch.autograd.grad(DSARHObjective().regularisation(output).sum(), code)
    assert torch.equal(grad[0], torch.zeros(2))
    assert grad[1, 0] < 0 < grad[1, 1]


# --- the outer loss


@pytest.fixture(scope="module")
def pairs() -> RetrievalData:
    return synthetic(size=12, train=48, query=12, database=36)


def two_sided(data: RetrievalData, seed: int = 0) -> Hasher:
    text = {"name": "mlp", "widths": [16]}
    return build_hasher(
        bits=8,
        image={"name": "small", "width": 4, "grid": 1},
        text=text,
        vocabulary=data.vocabulary,
        seed=seed,
    )


def seen_rounds(data: RetrievalData, outer: DSARHOuter) -> tuple[Round, dict[str, Tensor]]:
    rounds: list[Round] = []

    class Watch(OuterLoss):
        def __call__(self, turn: Round) -> dict[str, Tensor]:
            rounds.append(turn)
            return outer(turn)

    recipe = AdversarialTraining(two_sided(data), DSARHObjective(), inner(), Watch())
    recipe.setup(data, 0, 16)
    ((group, terms),) = recipe.step(data.train.batch(torch.arange(16)), Moment(0, 0.0, Draws(0)))
    assert group == "hasher"
    return rounds[0], terms


def test_convex_and_additive_mixtures(pairs: RetrievalData) -> None:
    turn, convex = seen_rounds(pairs, DSARHOuter(0.3))
    assert set(turn.robust) == {"image"}
    clean = turn.objective(turn.clean, turn.batch, turn.memory)
    mixed = turn.objective(
        {"image": turn.robust["image"], "text": turn.clean["text"]}, turn.batch, turn.memory
    )
    assert convex["clean/similarity"].item() == pytest.approx(0.7 * clean["similarity"].item(), rel=1e-6)
    assert convex["robust/similarity"].item() == pytest.approx(0.3 * mixed["similarity"].item(), rel=1e-6)
    assert torch.equal(convex["clean/regularisation"], clean["regularisation"])
    assert set(convex) == {"clean/similarity", "clean/regularisation", "robust/similarity"}
    additive = DSARHOuter(2.0, "additive")(turn)
    alone = turn.objective(turn.robust, turn.batch, turn.memory)
    assert torch.equal(additive["clean/similarity"], clean["similarity"])
    assert additive["robust/similarity"].item() == pytest.approx(2 * alone["similarity"].item(), rel=1e-6)
    assert alone["similarity"] < mixed["similarity"], "the attacked image alone, without the text's own terms"


def test_text_keeps_its_full_weight_in_the_convex_form(pairs: RetrievalData) -> None:
    """Only images are attacked, so the text's gradient is that of plain training whatever lam is."""
    turn, _ = seen_rounds(pairs, DSARHOuter(0.0))
    code = turn.clean["text"].code

    def pulled(lam: float) -> Tensor:
        loss = torch.stack(list(DSARHOuter(lam)(turn).values())).sum()
        return torch.autograd.grad(loss, code, retain_graph=True)[0]

    torch.testing.assert_close(pulled(0.5), pulled(0.0))
    torch.testing.assert_close(pulled(1.0), pulled(0.0))
    assert float(pulled(0.5).abs().max()) > 0


@pytest.mark.parametrize("outer", [DSARHOuter(0.5), DSARHOuter(1.0), DSARHOuter(1.0, "additive")])
def test_text_parameters_learn_nothing_from_attacked_images(pairs: RetrievalData, outer: DSARHOuter) -> None:
    """As in the paper: attacked images meet the text codes as constants, and texts meet the codes of clean
    images. The gradient of the text net is that of plain training, the gradient of the image net is
    another."""
    gradients = []
    for used in (DSARHOuter(0.0), outer):
        hasher = two_sided(pairs)
        recipe = AdversarialTraining(hasher, DSARHObjective(), inner(eps=0.1, step_size=0.1), used)
        recipe.setup(pairs, 0, 16)
        ((_, terms),) = recipe.step(pairs.train.batch(torch.arange(16)), Moment(0, 0.0, Draws(0)))
        torch.stack(list(terms.values())).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in hasher.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None
        grad = gradients[1][name]
        if ".text." in name:
            torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-7, msg=name)
        else:
            assert float((grad - plain).abs().max()) > 1e-4 * float(plain.abs().max()), name


def test_lam_zero_is_plain_training(pairs: RetrievalData) -> None:
    left, right = two_sided(pairs), two_sided(pairs)
    robust = fit(
        AdversarialTraining(left, DSARHObjective(), inner(), DSARHOuter(0.0)), pairs, train_config(2)
    )
    plain = fit(HashingRecipe(right, DSARHObjective()), pairs, train_config(2))
    for ours, theirs in zip(robust, plain, strict=True):
        assert ours["clean/similarity"] == theirs["similarity"]
        assert ours["clean/regularisation"] == theirs["regularisation"]
        assert ours["robust/similarity"] == 0.0
    for (name, ours), (_, theirs) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_attack_raises_the_loss_it_is_trained_on(pairs: RetrievalData) -> None:
    hasher, objective, batch = two_sided(pairs), DSARHObjective(), pairs.train.batch(torch.arange(48))
    recipe = HashingRecipe(hasher, objective)
    fit(recipe, pairs, train_config(8))
    hasher.eval()
    found = inner(eps=0.1, step_size=0.067).perturb(
        hasher, batch, Goal(batch.labels, -1), recipe.memory.reference(), draws=Draws(0)
    )
    with torch.no_grad():
        clean, attacked = (hasher({"image": x["image"]}) for x in (batch.inputs, found.inputs))
        values = [
            objective(outputs, batch, recipe.memory)["similarity"].item() for outputs in (clean, attacked)
        ]
    assert values[1] > values[0] + 0.1


@pytest.mark.parametrize(
    ("lam", "mode"), [(-0.1, "convex"), (1.1, "convex"), (-1.0, "additive"), (0.5, "mean")]
)
def test_bad_mixtures_are_refused(lam: float, mode: Any) -> None:
    with pytest.raises(ValueError, match="lam"):
        DSARHOuter(lam, mode)


# --- the recipe with learned database codes


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


def asymmetric(hasher: Hasher, attacked: bool = False, **options: Any) -> Asymmetric:
    options = {"items": 24, "inner_epochs": 2, **options}
    if attacked:
        options = {"attack": inner(), "outer": DSARHOuter(0.5), **options}
    return Asymmetric(hasher, ADSH(), **options)


def test_an_outer_iteration_samples_trains_and_solves(data: RetrievalData) -> None:
    recipe = asymmetric(small_hasher())
    recipe.setup(data, 0, 16)
    v = recipe.memory.codes["image"].clone()
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert 0.4 < float((v > 0).float().mean()) < 0.6
    pool = recipe.pool(3)
    assert len(pool) == 48
    assert len(pool.unique()) == 24
    assert torch.equal(pool, recipe.pool(3))
    assert not torch.equal(pool, recipe.pool(4))
    ids = pool[:24]
    for chunk in ids.split(12):
        list(recipe.step(data.train.batch(chunk), Moment(3, 0.0, Draws(0))))
    assert torch.equal(recipe.memory.codes["image"], v), "V is fixed while the network learns"
    assert torch.nonzero(recipe.memory.seen).flatten().tolist() == sorted(ids.tolist())
    recipe.end_epoch(3)
    assert not torch.equal(recipe.memory.codes["image"], v)
    whole = asymmetric(small_hasher(), items=2000, inner_epochs=1)
    whole.setup(data, 0, 16)
    assert sorted(whole.pool(0).tolist()) == list(range(48))


def test_start_from_the_networks_own_signs(data: RetrievalData) -> None:
    hasher = trained_hasher(data, epochs=3)
    recipe = asymmetric(hasher, start="network")
    recipe.setup(data, 0, 16)
    with torch.no_grad():
        logits = copy.deepcopy(hasher).eval()(data.train.batch(torch.arange(48)).inputs)["image"].logits
    assert torch.equal(recipe.memory.codes["image"], sign(logits))


def test_adsh_learns(data: RetrievalData) -> None:
    """Learned codes end equal within a class and apart between classes, and the network agrees with them."""
    recipe = asymmetric(small_hasher(bits=8), items=48)
    lines = fit(recipe, data, train_config(12, lr=0.02))
    assert lines[-1]["similarity"] < 0.5 * lines[0]["similarity"]
    v, labels = recipe.memory.codes["image"].data, data.train.labels
    agreement, same = v @ v.T / 8, labels @ labels.T > 0
    assert float(agreement[same].mean()) > 0.8
    assert float(agreement[~same].mean()) < 0.2
    with torch.no_grad():
        logits = recipe.hasher(data.query.batch(torch.arange(12)).inputs)["image"].logits
    near = sign(logits) @ v.T / 8
    relevant = data.query.labels @ labels.T > 0
    assert float(near[relevant].mean()) > float(near[~relevant].mean()) + 0.5


def test_the_attack_sees_the_learned_codes(data: RetrievalData) -> None:
    seen = []

    class Watch(OuterLoss):
        def __call__(self, turn: Round) -> dict[str, Tensor]:
            seen.append(turn)
            return DSARHOuter(0.5)(turn)

    recipe = asymmetric(small_hasher(), attacked=True, outer=Watch())
    recipe.setup(data, 0, 16)
    batch = data.train.batch(torch.arange(16))
    list(recipe.step(batch, Moment(0, 0.0, Draws(0))))
    (turn,) = seen
    v, labels = recipe.memory.codes["image"].data, data.train.labels
    same = (batch.labels @ labels.T > 0).float()
    expected = (same @ v / same.sum(1, keepdim=True) - (1 - same) @ v / (1 - same).sum(1, keepdim=True)) / 2
    torch.testing.assert_close(turn.guidance.codes, expected)
    assert recipe.hasher.declared == "adversarial"
    assert asymmetric(small_hasher()).hasher.declared == "plain"


def test_lam_zero_is_adsh(data: RetrievalData) -> None:
    robust, plain = (
        asymmetric(small_hasher(), attacked=True, outer=DSARHOuter(0.0)),
        asymmetric(small_hasher()),
    )
    first, second = (fit(recipe, data, train_config(3, lr=0.02)) for recipe in (robust, plain))
    assert [line["clean/similarity"] for line in first] == [line["similarity"] for line in second]
    for (name, ours), (_, theirs) in zip(
        robust.hasher.named_parameters(), plain.hasher.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert torch.equal(robust.memory.codes["image"], plain.memory.codes["image"])


@pytest.mark.parametrize("attacked", [False, True])
def test_resumed_equals_uninterrupted(data: RetrievalData, attacked: bool) -> None:
    config = train_config(3, lr=0.02, augment="flip-crop")

    def fresh() -> Recipe:
        hasher = small_hasher(seed=3)
        hasher.encoders["image"].trunk.append(nn.Dropout(0.2))  # so that the global stream matters
        return asymmetric(hasher, attacked)

    straight, stopped = fresh(), MemoryLog(stop_after=1)
    lines = fit(straight, data, config, MemoryLog())
    with pytest.raises(Interrupted):
        fit(fresh(), data, config, stopped)
    stopped.stop_after = None
    torch.rand(11)  # whatever happened in between
    resumed = fresh()
    assert losses_of(fit(resumed, data, config, stopped)) == losses_of(lines)
    for name, module in straight.modules().items():
        theirs = resumed.modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, theirs[key]), f"{name}.{key}"


def test_learned_codes_are_for_the_items_they_were_learned_on(data: RetrievalData) -> None:
    itself = replace(data, database=replace(data.train, name="database"))
    for where, database, given in (
        (itself, "learned", True),
        (itself, "network", False),
        (data, "learned", False),
    ):
        recipe = asymmetric(small_hasher(), database=database)
        recipe.setup(where, 0, 16)
        codes = recipe.database_codes()
        assert (codes is not None) == given
        if codes is not None:
            assert torch.equal(unpack(codes.packed, codes.bits).float(), recipe.memory.codes["image"])
            assert codes.ids.tolist() == list(range(48))
    turned = replace(data, database=data.train.take(torch.arange(48).flip(0)[:40], "database"))
    recipe = asymmetric(small_hasher())
    recipe.setup(turned, 0, 16)
    codes = recipe.database_codes()
    assert codes is not None
    assert torch.equal(codes.signs().float(), recipe.memory.codes["image"].flip(0)[:40]), (
        "codes follow their items"
    )
    other = replace(itself.database, labels=data.train.labels.roll(1, 1))
    recipe.setup(replace(data, database=other), 0, 16)
    assert recipe.database_codes() is None, "the same pixels under other labels are other items"


def test_unfit_parts_are_refused(pairs: RetrievalData) -> None:
    hasher = small_hasher()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"objective": CSQ()}, "objective 'adsh'"),
        ({"objective": DPSH()}, "objective 'adsh'"),
        ({"hasher": two_sided(pairs)}, "one modality"),
        ({"outer": DSARHOuter()}, "needs an attack"),
        ({"items": 0}, "items must be at least 1"),
        ({"inner_epochs": 0}, "inner_epochs must be at least 1"),
        ({"start": "zeros"}, "'zeros'"),
        ({"database": "both"}, "'both'"),
    ]
    for options, said in cases:
        with pytest.raises(ValueError, match=said):
            Asymmetric(**{"hasher": hasher, "objective": ADSH(), **options})


def test_registered_names_make_what_they_say(data: RetrievalData) -> None:
    objective: HashObjective = build("objective", {"name": "adsh", "gamma": 100.0})
    recipe = build(
        "recipe",
        {"name": "asymmetric", "items": 10, "start": "network"},
        hasher=small_hasher(),
        objective=objective,
        attack=build("attack", {"name": "dsarh", "steps": 1}, objective=objective),
        outer=None,
    )
    recipe.setup(data, 0, 16)
    ((group, terms),) = recipe.step(data.train.batch(torch.arange(8)), Moment(0, 0.0, Draws(0)))
    assert group == "hasher"
    assert set(terms) == {"clean/similarity", "clean/regularisation", "robust/similarity"}
    batch = image_batch(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="labels"):
        DSARHObjective()({"image": output_of(torch.zeros(2, 8))}, batch, recipe.memory)


def test_the_recipe_in_the_documents_can_be_read() -> None:
    """The paper's training: its nets, two learning rates, and frozen convolutions."""
    page = Path(__file__).parents[2] / "docs" / "methods" / "dsarh.md"
    _, block = page.read_text().split("```yaml\n")
    raw = {"name": "paper", "data": "ucmerced", **yaml.safe_load(block.split("```")[0])}
    optim = make_config(raw).training.optim
    assert (optim["hasher"].lr, optim["text"].lr) == (1e-3, 1e-2)
    assert optim["text"].weight_decay == 5e-4
    frozen = make_config(raw, ["training.optim.conv.lr=0"]).training.optim
    assert (frozen["conv"].lr, frozen["conv"].momentum) == (0.0, 0.9)
