"""ATRDH: its term is DPH's on the attacked codes; the prototype net trains along, and a resumed run is the
same run."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Interrupted, MemoryLog, make_data, small_hasher, train_config, trained_hasher
from torch import Tensor

from robusthash.attacks import Attack
from robusthash.attacks.tha import tha
from robusthash.core.runtime import Draws
from robusthash.data import RetrievalData, load_data
from robusthash.defenses import AdversarialTraining, Round
from robusthash.defenses.outer_losses import ATRDHOuter
from robusthash.evaluation import make_context, score_attack
from robusthash.evaluation.evaluate import attack_all
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import DPH, DPSH
from robusthash.training import HashingRecipe, Moment, OptimConfig, TrainConfig, fit


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def warm(data: RetrievalData) -> Hasher:
    return trained_hasher(data, epochs=4)


def inner(**options: object) -> Attack:
    given = {
        "steps": 2,
        "step_size": 4 / 255,
        "random_start": True,
        "hidden": 32,
        "fit_steps": 100,
        **options,
    }
    return tha(**given)  # type: ignore[arg-type]


def config(epochs: int) -> TrainConfig:
    plain = train_config(epochs)
    guide = OptimConfig("adam", 1e-3, momentum=0.5, weight_decay=0.0)
    return TrainConfig(epochs, 16, {**plain.optim, "guide": guide}, plain.schedule, device="cpu")


class Watch(ATRDHOuter):
    """Keeps the rounds that it saw."""

    seen: list[Round]

    def __call__(self, turn: Round) -> dict[str, Tensor]:
        self.seen.append(turn)
        return super().__call__(turn)


def watched(
    hasher: Hasher, objective: DPH, attack: Attack, data: RetrievalData
) -> tuple[dict[str, dict], Round]:
    """The terms by group of one step, and its round."""
    outer = Watch()
    object.__setattr__(outer, "seen", [])
    recipe = AdversarialTraining(hasher, objective, attack, outer)
    recipe.setup(data, 0, 16)
    batch = data.train.batch(torch.arange(16))
    return dict(recipe.step(batch, Moment(0, 0.0, Draws(0)))), outer.seen[0]


def test_without_a_budget_the_term_is_dphs_against_the_memory(warm: Hasher, data: RetrievalData) -> None:
    objective = DPH()
    terms, turn = watched(copy.deepcopy(warm), objective, inner(eps=0.0), data)
    assert list(terms) == ["guide", "hasher"]
    expected = objective.similarity(
        turn.clean["image"], turn.batch.labels, turn.memory.codes["image"], data.train.labels
    )
    assert terms["hasher"]["adversarial"].item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert ATRDHOuter(2.0)(turn)["adversarial"].item() == pytest.approx(
        2 * terms["hasher"]["adversarial"].item()
    )


def test_over_image_and_text_the_memory_of_both_is_kept_and_text_gets_no_adversarial_gradient() -> None:
    data = load_data("synthetic", train=48, query=8, database=16)
    hasher = build_hasher(
        bits=8,
        image={"name": "small", "width": 4, "grid": 1},
        text={"name": "mlp", "widths": [16]},
        vocabulary=data.vocabulary,
    )
    terms, turn = watched(hasher, DPH(), inner(), data)
    assert set(turn.robust) == {"image"}
    assert set(turn.clean) == {"image", "text"}
    signed = 2.0 * (turn.batch.labels @ data.train.labels.T > 0).float() - 1.0
    code = turn.robust["image"].code
    each = [((code @ turn.memory.codes[m].T / 8) - signed).square().mean() for m in ("image", "text")]
    assert terms["hasher"]["adversarial"].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    named = dict(hasher.named_parameters())
    term = ATRDHOuter()(turn)["adversarial"]
    grads = torch.autograd.grad(term, list(named.values()), allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        assert (grad is None) == (".text." in name), name


def test_weight_zero_trains_as_plain(warm: Hasher, data: RetrievalData) -> None:
    left, right = copy.deepcopy(warm), copy.deepcopy(warm)
    fit(AdversarialTraining(left, DPSH(), inner(), ATRDHOuter(0.0)), data, config(1))
    fit(HashingRecipe(right, DPSH()), data, train_config(1))
    for (name, ours), (_, theirs) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_prototype_net_learns_and_the_model_step_leaves_it_alone(
    warm: Hasher, data: RetrievalData
) -> None:
    attack = inner()
    recipe = AdversarialTraining(copy.deepcopy(warm), DPSH(), attack, ATRDHOuter())
    lines = fit(recipe, data, config(3))
    assert lines[-1]["prototype"] < lines[0]["prototype"]
    groups = recipe.parameter_groups()
    assert {id(p) for p in groups["guide"]} == {id(p) for p in attack.guide.parameters()}
    assert not {id(p) for p in groups["guide"]} & {id(p) for p in groups["hasher"]}
    steps = recipe.step(data.train.batch(torch.arange(16)), Moment(0, 0.0, Draws(0)))
    assert next(steps)[0] == "guide"
    group, terms = next(steps)
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), groups["guide"], allow_unused=True)
    assert group == "hasher"
    assert all(grad is None for grad in grads)


def test_resumed_equals_uninterrupted(data: RetrievalData) -> None:
    def fresh() -> AdversarialTraining:
        return AdversarialTraining(small_hasher(seed=3), DPSH(), inner(), ATRDHOuter())

    straight, stopped = fresh(), MemoryLog(stop_after=1)
    fit(straight, data, config(2), MemoryLog())
    with pytest.raises(Interrupted):
        fit(fresh(), data, config(2), stopped)
    stopped.stop_after = None
    resumed = fresh()
    fit(resumed, data, config(2), stopped)
    assert "guide" in straight.modules()
    for name, module in straight.modules().items():
        theirs = resumed.modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, theirs[key]), f"{name}.{key}"


def test_tha_is_fitted_once_for_a_bench_and_always_the_same(warm: Hasher, data: RetrievalData) -> None:
    context = make_context(warm, data, batch_size=5)
    found = [attack_all(context, inner(random_start=False, steps=5)) for _ in range(2)]
    assert torch.equal(found[0].inputs, found[1].inputs)
    fitted = context.fitted(inner())
    assert all(not parameter.requires_grad for parameter in fitted.guide.parameters())
    result = score_attack(context, inner(), found[0])
    assert result["t-MAP"] > result.reference["clean"]
    assert context.fitted(unlearned := build_plain()) is unlearned


def build_plain() -> Attack:
    from robusthash.attacks import mainstay

    return mainstay()


def test_fitting_needs_labels(warm: Hasher, data: RetrievalData) -> None:
    with pytest.raises(ValueError, match="labelled"):
        inner().fit(warm, data, None, draws=Draws(0))
