"""Recipes: their own loss falls, an interrupted run is the same run, and each outer loss is what its paper
adds."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
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
from torch import Tensor

from robusthash.apps.experiment.config import ConfigError, load_config
from robusthash.attacks import mainstay
from robusthash.attacks.published import dhta
from robusthash.core.hamming import sign
from robusthash.core.registry import build, catalogue
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, Guidance
from robusthash.data import RetrievalData
from robusthash.defenses import AdversarialTraining, CgATOuter, OuterLoss, PlainAT, Round, SAATOuter
from robusthash.models import Hasher, build_hasher
from robusthash.models.image_encoders import ImageEncoder
from robusthash.objectives import DPSH, CodeMemory, HashNet, HashObjective
from robusthash.training import HashingRecipe, Moment, OptimConfig, Recipe, TrainConfig, fit

OUTERS = [card.name for card in catalogue("outer")]
KINDS = ["plain", *OUTERS]
PURIFIERS = {"saah": {"image": {"name": "spectral-gate", "block": 4}}}
"""What an outer loss expects before the encoder."""
SMALL = {"name": "small", "width": 4, "grid": 1}
GFNET = {"name": "gfnet", "size": 12, "patch": 4, "dim": 8, "depth": 1}
IMAGES = {"sfcl": {"name": "sfcl", "spatial": SMALL, "frequency": GFNET, "width": 16, "hidden": 8}}
"""Outer losses that need an encoder of their own."""
OPTIONS = {"sfcl": {"warmup": 0.0}, "rocmr": {"contrast": 0.1}}
"""A loss whose weights grow does not fall at first; contrast at a temperature of 0.1 is ten times as steep."""


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def warm(data: RetrievalData) -> Hasher:
    """Where adversarial training starts from; copy it."""
    return trained_hasher(data, epochs=4)


def inner(**options: Any) -> Any:
    return mainstay(**{"steps": 2, "step_size": 4 / 255, "slope": "one", **options})


def make_recipe(kind: str, hasher: Hasher, objective: HashObjective | None = None) -> Recipe:
    objective = DPSH() if objective is None else objective
    if kind == "plain":
        return HashingRecipe(hasher, objective)
    return AdversarialTraining(
        hasher, objective, inner(), build("outer", {"name": kind, **OPTIONS.get(kind, {})})
    )


def summed(line: dict[str, Any]) -> float:
    return sum(value for name, value in line.items() if name not in ("epoch", "lr", "seconds", "figures"))


def terms_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_equal_states(left: torch.nn.Module, right: torch.nn.Module) -> None:
    states = left.state_dict(), right.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_own_loss_falls(kind: str, data: RetrievalData) -> None:
    hasher = build_hasher(bits=8, image=IMAGES.get(kind, SMALL), purifiers=PURIFIERS.get(kind))
    lines = fit(make_recipe(kind, hasher), data, train_config(8, lr=0.03))
    assert len(lines) == 8
    assert summed(lines[-1]) < summed(lines[0])
    assert all(line["seconds"] >= 0 and line["lr"] == 0.03 for line in lines)


@pytest.mark.parametrize("stop_after", [1, (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(
    kind: str, stop_after: int | tuple[int, int], data: RetrievalData
) -> None:
    """Stopped after the first of three epochs, or after two batches of the second, and taken up by fresh
    objects: the same bits, memory included."""
    config = replace(train_config(3, augment="flip-crop"), checkpoint_minutes=1e-9)

    def fresh() -> Recipe:
        image, gates = IMAGES.get(kind, SMALL), PURIFIERS.get(kind)
        hasher = build_hasher(bits=8, image=image, head="batchnorm", seed=3, purifiers=gates)
        encoder = next(part for part in hasher.modules() if isinstance(part, ImageEncoder))
        encoder.trunk.append(torch.nn.Dropout(0.2))  # so that the global stream matters
        return make_recipe(kind, hasher, HashNet(every=2, gamma=0.1))

    straight, log = fresh(), MemoryLog()
    lines = fit(straight, data, config, log)
    broken, stopped = fresh(), MemoryLog(stop_after)
    with pytest.raises(Interrupted):
        fit(broken, data, config, stopped)
    stopped.stop_after = None
    torch.rand(11)  # whatever happened in between
    resumed = fresh()
    again = fit(resumed, data, config, stopped)
    assert terms_of(again) == terms_of(lines)
    assert terms_of(stopped.lines) == terms_of(log.lines) == terms_of(lines)
    for name, module in straight.modules().items():
        assert_equal_states(module, resumed.modules()[name])
    memories = [recipe.modules()["memory"] for recipe in (straight, resumed)]
    assert all(isinstance(memory, CodeMemory) for memory in memories)
    assert torch.equal(memories[0].codes["image"], memories[1].codes["image"])
    assert not torch.equal(memories[0].codes["image"], broken.modules()["memory"].codes["image"])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_trains_to_nearly_the_same_losses(kind: str, data: RetrievalData) -> None:
    """Under autocast nothing breaks, and the terms of the first epochs stay near those in float32."""
    lines = {}
    for precision in ("float32", "bf16"):
        hasher = build_hasher(bits=8, image=IMAGES.get(kind, SMALL), purifiers=PURIFIERS.get(kind))
        lines[precision] = fit(make_recipe(kind, hasher), data, train_config(2, lr=0.01, precision=precision))
    assert summed(lines["bf16"][-1]) == pytest.approx(summed(lines["float32"][-1]), rel=0.1, abs=0.05)


def test_same_seed_same_run_other_seed_another(data: RetrievalData) -> None:
    runs = [fit(make_recipe("saat", small_hasher()), data, train_config(1, seed=seed)) for seed in (0, 0, 1)]
    assert terms_of(runs[0]) == terms_of(runs[1])
    assert terms_of(runs[0]) != terms_of(runs[2])


def test_memory_is_filled_before_the_first_step_and_follows_training(data: RetrievalData) -> None:
    hasher = small_hasher()
    recipe = HashingRecipe(hasher, DPSH())
    recipe.setup(data, 0, 10)
    with torch.no_grad():
        expected = (
            copy.deepcopy(hasher).eval()(data.train.batch(torch.arange(len(data.train))).inputs)["image"].code
        )
    torch.testing.assert_close(recipe.memory.codes["image"].data, expected)
    assert hasher.training  # the pass restored the mode that it found
    batch = data.train.batch(torch.tensor([5, 1, 8]))
    ((group, _),) = recipe.step(batch, Moment(0, 0.0, Draws(0)))
    assert group == "hasher"
    changed = (recipe.memory.codes["image"].data - expected).abs().sum(1) > 1e-3  # train-mode codes differ
    assert torch.nonzero(changed).flatten().tolist() == [1, 5, 8]


def test_declared_becomes_adversarial(warm: Hasher) -> None:
    hasher = copy.deepcopy(warm)
    assert hasher.declared == hasher.spec["declared"] == "plain"
    make_recipe("saat", hasher)
    assert hasher.declared == hasher.spec["declared"] == "adversarial"


def test_targeted_inner_attacks_aim_at_foreign_labels(warm: Hasher, data: RetrievalData) -> None:
    """Each item gets a target of the training set that shares no label with it, another one each epoch."""
    recipe = AdversarialTraining(copy.deepcopy(warm), DPSH(), dhta(steps=1), PlainAT())
    recipe.setup(data, 0, 16)
    batch = data.train.batch(torch.arange(16))
    seen = []
    for epoch in range(4):
        ((_, terms),) = list(recipe.step(batch, Moment(epoch, 0.0, Draws(0).within(epoch))))
        assert all(bool(torch.isfinite(term)) for term in terms.values())
        goal = recipe._goal(batch, recipe.plain.memory, Draws(0).within(epoch))
        assert goal.sign == 1
        assert bool(((goal.labels * batch.labels).sum(1) == 0).all())
        seen.append(goal.labels)
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_warmup_grows_the_budget(warm: Hasher, data: RetrievalData) -> None:
    sizes = []

    class Watch(OuterLoss):
        def __call__(self, turn: Round) -> dict[str, Tensor]:
            sizes.append(float((turn.attacked.inputs["image"] - turn.batch.inputs["image"]).abs().max()))
            return PlainAT()(turn)

    recipe = AdversarialTraining(copy.deepcopy(warm), DPSH(), inner(), Watch(), warmup=0.5)
    recipe.setup(data, 0, 16)
    for progress in (0.0, 0.25, 0.5, 0.9):
        list(recipe.step(data.train.batch(torch.arange(16)), Moment(0, progress, Draws(0))))
    assert sizes == pytest.approx([0.0, 4 / 255, 8 / 255, 8 / 255], abs=1e-6)


# --- what each outer loss adds


def outer_run(
    warm: Hasher, data: RetrievalData, outer: Any, **options: Any
) -> tuple[list[dict[str, Any]], Hasher]:
    hasher = copy.deepcopy(warm)
    recipe = AdversarialTraining(hasher, DPSH(), inner(weights="cgat", **options), outer)
    return fit(recipe, data, train_config(2)), hasher


def test_saat_without_quantisation_and_with_cgat_weights_is_cgat(warm: Hasher, data: RetrievalData) -> None:
    saat, left = outer_run(warm, data, SAATOuter(quantisation=0.0))
    cgat, right = outer_run(warm, data, CgATOuter())
    for line in saat:
        assert line.pop("quantisation") == 0.0
    assert terms_of(saat) == terms_of(cgat)  # bit for bit
    assert_equal_states(left, right)


def test_saat_with_zero_weights_is_plain_fine_tuning(warm: Hasher, data: RetrievalData) -> None:
    saat, left = outer_run(warm, data, SAATOuter(adversarial=0.0, quantisation=0.0))
    right = copy.deepcopy(warm)
    plain = fit(HashingRecipe(right, DPSH()), data, train_config(2))
    for ours, theirs in zip(saat, plain, strict=True):
        assert ours["clean/similarity"] == theirs["similarity"]
        assert ours["clean/regularisation"] == theirs["regularisation"]
        assert ours["adversarial"] == ours["quantisation"] == 0.0
    for (name, ours), (_, theirs) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_without_a_budget_the_adversarial_term_is_the_clean_agreement(
    warm: Hasher, data: RetrievalData
) -> None:
    seen: list[Round] = []

    class Watch(SAATOuter):
        def __call__(self, turn: Round) -> dict[str, Tensor]:
            seen.append(turn)
            return super().__call__(turn)

    hasher = copy.deepcopy(warm)
    recipe = AdversarialTraining(hasher, DPSH(), inner(eps=0.0), Watch())
    recipe.setup(data, 0, 16)
    batch = data.train.batch(torch.arange(16))
    ((group, terms),) = recipe.step(batch, Moment(0, 0.0, Draws(0)))
    assert group == "hasher"
    (turn,) = seen
    assert torch.equal(turn.attacked.inputs["image"], batch.inputs["image"])
    code = torch.tanh(turn.clean["image"].logits)
    expected = -(code * turn.guidance.codes).sum(1).div(hasher.bits).mean()
    assert terms["adversarial"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_order_of_a_step(warm: Hasher, data: RetrievalData) -> None:
    """Attack in eval mode against the memory as it stood; train-mode outputs; memory and guidance after the
    update."""
    hasher, looks = copy.deepcopy(warm), []

    class Watch(CgATOuter):
        def __call__(self, turn: Round) -> dict[str, Tensor]:
            looks.append(("outer", hasher.training, turn))
            return super().__call__(turn)

    recipe = AdversarialTraining(hasher, DPSH(), inner(), Watch())
    recipe.setup(data, 0, 16)
    memory = recipe.modules()["memory"]
    before = memory.reference()
    hasher.register_forward_hook(lambda module, x, out: looks.append(("forward", module.training, out)))
    batch = data.train.batch(torch.arange(16))
    list(recipe.step(batch, Moment(0, 0.0, Draws(0))))
    assert [look[:2] for look in looks] == [("forward", False)] * 2 + [("forward", True)] * 2 + [
        ("outer", True)
    ]
    turn = looks[-1][2]
    assert turn.goal.sign == -1
    assert not turn.attacked.inputs["image"].requires_grad
    recipe.attack.threat.verify(turn.attacked.inputs, batch.inputs)
    rows = memory.codes["image"][batch.ids]
    assert torch.equal(rows, turn.clean["image"].code.detach())
    after = recipe.attack.guide(hasher, batch, turn.goal, memory.reference(), Draws(0)).codes
    assert torch.equal(turn.guidance.codes, after)
    assert not torch.equal(before.codes["image"], memory.reference().codes["image"])
    assert all(parameter.grad is None for parameter in hasher.parameters()), "the inner attack left gradients"


def make_round(robust: Tensor, clean: Tensor, codes: Tensor) -> Round:
    labels = torch.eye(2)[torch.arange(len(clean)) % 2]
    batch = image_batch(torch.zeros(len(clean), 2), labels)
    objective = DPSH()
    objective.setup(facts_of(labels, clean.shape[1]))
    memory = memory_of({"image": torch.tanh(clean.detach())}, labels)
    outputs = {"image": output_of(clean)}, {"image": output_of(robust)}
    return Round(batch, batch, Goal(labels, -1), *outputs, Guidance(codes), memory, objective, 0.0)


def test_outer_losses_against_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    robust, clean = torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)
    codes = sign(torch.randn(6, 8, generator=generator))
    turn = make_round(robust, clean, codes)
    own = turn.objective(turn.clean, turn.batch, turn.memory)
    h = torch.tanh(robust)
    agreement = float((h * codes).sum(1).mean()) / 8
    spread = float((h - sign(h)).square().mean())
    saat, cgat, plain = SAATOuter(2.0, 0.5)(turn), CgATOuter(3.0)(turn), PlainAT(0.25)(turn)
    for terms in (saat, cgat, plain):
        assert terms["clean/similarity"] == own["similarity"]
        assert terms["clean/regularisation"] == own["regularisation"]
    assert set(saat) == {"clean/similarity", "clean/regularisation", "adversarial", "quantisation"}
    assert set(cgat) == {"clean/similarity", "clean/regularisation", "adversarial"}
    assert saat["adversarial"].item() == pytest.approx(-2 * agreement, rel=1e-5)
    assert saat["quantisation"].item() == pytest.approx(0.5 * spread, rel=1e-5)
    assert cgat["adversarial"].item() == pytest.approx(-3 * agreement, rel=1e-5)
    attacked = turn.objective(turn.robust, turn.batch, turn.memory)
    assert plain["robust/similarity"].item() == pytest.approx(0.25 * attacked["similarity"].item(), rel=1e-6)


def test_quantisation_has_no_gradient_at_the_signs() -> None:
    """At |h| = 1 the term and its slope vanish; elsewhere it pulls towards the nearer sign."""
    code = torch.tensor([[1.0, -1.0], [0.4, -0.3]], requires_grad=True)
    turn = make_round(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2))
    output = type(output_of(code))(torch.zeros(2, 2), code, code)
    turn = Round(**{**vars(turn), "robust": {"image": output}})
    term = SAATOuter(adversarial=0.0, quantisation=1.0)(turn)["quantisation"]
    (grad,) = torch.autograd.grad(term, code)
    assert torch.equal(grad[0], torch.zeros(2))
    assert grad[1, 0] < 0 < grad[1, 1]


# --- the loop


def test_a_loss_that_is_not_finite_names_its_epoch(data: RetrievalData) -> None:
    for objective in (DPSH(), HashNet(every=1, gamma=1e30)):
        hasher = small_hasher()
        with pytest.raises(
            FloatingPointError, match=r"'hasher' is not finite at epoch \d+, step \d+.*learning rate"
        ):
            fit(HashingRecipe(hasher, objective), data, train_config(3, lr=1e30))


def test_a_missing_optimiser_group_is_named(data: RetrievalData) -> None:
    config = TrainConfig(epochs=1, optim={"critic": OptimConfig()}, device="cpu")
    with pytest.raises(KeyError, match=r"training\.optim\.hasher"):
        fit(make_recipe("plain", small_hasher()), data, config)


class TwoGroups(HashingRecipe):
    """A recipe that steps its head and its encoder in turn, to see who moves when."""

    def parameter_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return {
            "hasher": list(self.hasher.encoders.parameters()),
            "critic": list(self.hasher.heads.parameters()),
        }

    def pool(self, epoch: int) -> Tensor:
        return torch.arange(20)

    def step(self, batch: Any, moment: Moment) -> Any:
        self.hasher.train()
        self.ids = [*getattr(self, "ids", []), *batch.ids.tolist()]
        yield "critic", self.objective(self.hasher(batch.inputs), batch, self.memory)


def test_only_the_yielded_group_moves_and_only_the_pool_is_seen(data: RetrievalData) -> None:
    hasher = small_hasher()
    before = copy.deepcopy(hasher.state_dict())
    optim = {name: OptimConfig(lr=0.1) for name in ("hasher", "critic")}
    config = TrainConfig(epochs=1, batch_size=8, optim=optim, device="cpu")
    recipe, log = TwoGroups(hasher, DPSH()), MemoryLog()
    fit(recipe, data, config, log)
    for name, parameter in hasher.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoders."), name
    assert sorted(recipe.ids) == list(range(20))
    assert log.shares == [(1, 3), (2, 3), (3, 3)]
    assert not hasher.training  # ready to be used


def test_clipping_bounds_the_step(data: RetrievalData) -> None:
    moved = []
    for clip in (0.0, 1e-3):
        hasher = small_hasher()
        before = torch.cat([p.detach().flatten().clone() for p in hasher.parameters()])
        config = TrainConfig(
            1, 64, {"hasher": OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0)}, clip=clip, device="cpu"
        )
        fit(HashingRecipe(hasher, DPSH()), data, config)
        moved.append(float((torch.cat([p.detach().flatten() for p in hasher.parameters()]) - before).norm()))
    assert moved[0] > 0.01
    assert moved[1] <= 1e-3 * 1.01


def test_unlabelled_training_of_a_supervised_objective_is_refused(data: RetrievalData) -> None:
    bare = replace(data, train=replace(data.train, labels=None))
    with pytest.raises(ValueError, match="learns from labels, and none of the"):
        fit(make_recipe("plain", small_hasher()), bare, train_config(1))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.recipe.inner=thru",
            "inner of recipe 'regenerate' must be 'published' or 'through', got 'thru'",
        ),
        ("training.attack.modality=images", "modality of attack 'drfgd' must be .*'both', got 'images'"),
        (
            "hasher.purifiers.image.output=straight",
            "output of purifier 'drfgd-image' must be .*, got 'straight'",
        ),
        ("evaluation.attacks.1.norm=l3", "norm of attack 'mainstay' must be 'linf', 'l2' or 'l1', got 'l3'"),
    ],
)
def test_a_wrong_word_is_refused_when_the_recipe_is_read(override: str, said: str) -> None:
    """Not after the run that it starts from was trained."""
    with pytest.raises(ConfigError, match=said):
        load_config("recipes/fashion-drfgd.yaml", [override])
