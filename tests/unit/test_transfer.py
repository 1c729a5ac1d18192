"""Steps that carry over, ensembles of surrogates with their own codes, and the matrix of every model on every
other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract.checks import ATTACK_CHECKS, World, make_attack, make_world
from helpers import (
    assert_same_state,
    counted,
    make_data,
    reference_of,
    small_hasher,
    state_of,
    trained_hasher,
)
from torch import Tensor

from robusthash.attacks.pgd import PGD
from robusthash.attacks.published import mainstay
from robusthash.attacks.threat_model import Threat, edit_threat, image_threat, threat_on
from robusthash.attacks.transfer_search import (
    Surrogate,
    TransferSteps,
    _blurred,
    customary_smoothing,
    transfer,
)
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, Inputs
from robusthash.data import RetrievalData, load_data
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.models import Hasher, build_hasher
from robusthash.models.encoding import weights_digest
from robusthash.robustness.specs.transfer_attacks import (
    ENSEMBLE,
    Transfer,
    make_surrogate,
    transfer_attack,
    transfer_attacks,
    transfer_matrix,
)

EPS = 16 / 255
KNOWN = image_threat(EPS, knowledge="T")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def models(data: RetrievalData) -> dict[str, Hasher]:
    """Three models of one data set that differ in width, code length and training."""
    return {
        "narrow": trained_hasher(data),
        "wide": trained_hasher(data, bits=12, width=6),
        "short": trained_hasher(data, bits=6, epochs=8),
    }


@pytest.fixture(scope="module")
def contexts(data: RetrievalData, models: dict[str, Hasher]) -> dict[str, EvaluationContext]:
    return {name: make_context(model, data, batch_size=6) for name, model in models.items()}


def surrogates(contexts: dict[str, EvaluationContext]) -> list[Surrogate]:
    return [make_surrogate(name, context.victim, context.data) for name, context in contexts.items()]


# ------------------------------------------------------------------------------------------------ the steps

STEPS = {
    "momentum": TransferSteps(3),
    "diversity": TransferSteps(3, diversity=0.7),
    "nesterov": TransferSteps(3, nesterov=True),
    "scales": TransferSteps(3, scales=3),
    "variance": TransferSteps(3, variance=2),
    "smoothing": TransferSteps(3, smoothing=3),
    "all": TransferSteps(2, diversity=0.5, nesterov=True, scales=2, variance=1, smoothing=3),
}


# a diverse search looks at shrunk copies, so its first look tells neither its start nor its first score
PROMISES = [
    pytest.param(name, check, id=f"{name}-{check.__name__.removeprefix('check_')}")
    for name, steps in STEPS.items()
    for check in ATTACK_CHECKS
    if not (steps.diversity and check.__name__ in ("check_start", "check_progress"))
    if name in ("diversity", "all") or check.__name__ in ("check_batching", "check_start", "check_progress")
]


@pytest.mark.parametrize(("name", "check"), PROMISES)
def test_steps_keep_what_searches_promise(name: str, check: Callable[..., None], world: World) -> None:
    check(replace(make_attack("mainstay", world.objective, slope="one"), search=STEPS[name]), world)


@pytest.mark.parametrize("name", STEPS)
def test_passes_are_counted(name: str, world: World) -> None:
    attack = replace(make_attack("mainstay", world.objective, slope="one"), search=STEPS[name])
    goal, draws = Goal(world.batch.labels, -1), Draws(0)
    with counted(world.victim) as passes:
        found, _ = attack.perturb(world.victim, world.batch, goal, world.reference, draws=draws)
    assert (found.forward, found.backward) == (passes.forward, passes.backward)
    assert found.forward >= STEPS[name].steps


def linear(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
    """A score whose gradient is the same everywhere: a ramp."""
    image = inputs["image"]
    weight = torch.linspace(-1, 1, image[0].numel(), dtype=image.dtype).view_as(image[0])
    return (image * weight).flatten(1).sum(1), image.flatten(1)[:, :4]


def test_plain_momentum_is_that_of_pgd(world: World) -> None:
    threat, batch = image_threat(EPS), world.batch
    ours = TransferSteps(4, step_size=0.25)(linear, batch, threat, Draws(0), None, None)
    theirs = PGD(4, EPS / 4, momentum=1.0, random_start=False)(linear, batch, threat, Draws(0), None, None)
    assert torch.allclose(ours.inputs["image"], theirs.inputs["image"], atol=1e-7)


@pytest.mark.parametrize("name", ["diversity", "nesterov", "scales", "variance", "smoothing"])
def test_every_option_changes_what_is_found(name: str, world: World) -> None:
    attack = replace(make_attack("mainstay", world.objective, slope="one", eps=EPS), search=TransferSteps(3))
    goal = Goal(world.batch.labels, -1)

    def found(search: TransferSteps) -> Tensor:
        return (
            replace(attack, search=search)
            .perturb(world.victim, world.batch, goal, world.reference, draws=Draws(0))[0]
            .inputs["image"]
        )

    assert not torch.equal(found(STEPS[name]), found(TransferSteps(3)))


def test_diverse_images_are_shrunk_copies_on_black() -> None:
    ids, white = torch.arange(64), torch.ones(64, 1, 20, 20, dtype=torch.float64)
    seen = TransferSteps(diversity=0.5, shrink=0.5)._transform(white, ids, Draws(0))
    area = seen.flatten(1).mean(1)
    whole = area == 1.0
    assert 16 < int(whole.sum()) < 48, "about half are left alone"
    assert float(area[~whole].min()) > 0.2
    assert float(area[~whole].max()) < 1.0
    corners = seen[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert bool((corners[~whole] == 0).any(0).all()), (
        "it is put anywhere, so every corner is padding for some image"
    )
    assert torch.equal(
        TransferSteps(diversity=1.0, shrink=1.0)._transform(white, ids, Draws(0)).round(), white
    )


def test_the_blur_is_a_gaussian() -> None:
    point = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    point[0, 1, 4, 4] = 1.0
    blurred = _blurred(point, 5)
    assert float(blurred[0, 0].abs().max()) == 0.0, "channels do not mix"
    assert float(blurred[0, 1].sum()) == pytest.approx(1.0)
    line = torch.exp(-0.5 * torch.linspace(-3, 3, 5, dtype=torch.float64).square())
    assert torch.allclose(blurred[0, 1, 2:7, 2:7], torch.outer(line, line) / line.sum() ** 2)
    assert _blurred(point[:, 0, 0], 5) is not None
    assert [customary_smoothing(torch.zeros(1, 3, size, size)) for size in (32, 48, 224, 299)] == [
        3,
        3,
        11,
        15,
    ]
    assert customary_smoothing(torch.zeros(1, 40)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"scales": 0}, "scales must be at least 1, got 0"),
        ({"variance": -1}, "variance must be at least 0"),
        ({"diversity": 1.5}, "diversity lies in"),
        ({"shrink": 0.0}, "shrink in"),
        ({"smoothing": 4}, "smoothing is an odd width, got 4"),
        ({"step_size": 0.0}, "shares of eps above 0"),
    ],
)
def test_steps_refuse_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferSteps(**options)


def test_options_of_images_need_images(world: World) -> None:
    batch = replace(world.batch, inputs={"text": torch.rand(8, 5)})
    with pytest.raises(ValueError, match="need images"):
        TransferSteps(2, diversity=0.5)(linear, batch, threat_on("text"), Draws(0), None, None)


# ------------------------------------------------------------------------------------------------ ensembles


def test_an_ensemble_ascends_the_mean_of_its_members(contexts: dict[str, EvaluationContext]) -> None:
    first = next(iter(contexts.values()))
    batch, held = first.batch(0), surrogates(contexts)
    goal, attack = Goal(batch.labels, -1), transfer_attack(KNOWN, TransferSteps(3))
    found = transfer(attack, held, batch, goal, draws=Draws(0))
    alone = {s.name: transfer(attack, [s], batch, goal, draws=Draws(0)) for s in held}
    assert (found.forward, found.backward) == (9, 9)
    assert float(found.trace[0]) == pytest.approx(
        sum(float(one.trace[0]) for one in alone.values()) / 3, abs=1e-6
    )

    def mean_score(inputs: Inputs) -> float:
        scores = [attack.aim(s.hasher, batch, goal, s.reference, Draws(0))[0] for s in held]
        with torch.no_grad():
            return float(torch.stack([score(inputs, 1.0)[0].mean() for score in scores]).mean())

    assert mean_score(found.inputs) > max(mean_score(one.inputs) for one in alone.values())
    attack.threat.verify(found.inputs, batch.inputs)


def test_every_surrogate_steers_by_its_own_codes(contexts: dict[str, EvaluationContext]) -> None:
    batch, held = contexts["narrow"].batch(0), surrogates(contexts)
    goal, attack = Goal(batch.labels, -1), transfer_attack(KNOWN, TransferSteps(2))
    usual = transfer(attack, held, batch, goal, draws=Draws(0)).inputs["image"]
    swapped = replace(
        held[1], reference=replace(held[1].reference, codes={"image": -held[1].reference.codes["image"]})
    )
    other = transfer(attack, [held[0], swapped, held[2]], batch, goal, draws=Draws(0)).inputs["image"]
    assert not torch.equal(usual, other)
    assert {s.reference.codes["image"].shape[1] for s in held} == {6, 8, 12}


def test_transfer_refuses_what_it_must_not_know(contexts: dict[str, EvaluationContext]) -> None:
    batch, held = contexts["narrow"].batch(0), surrogates(contexts)
    goal, attack = Goal(batch.labels, -1), transfer_attack(KNOWN, TransferSteps(2))
    with pytest.raises(ValueError, match="at least one surrogate"):
        transfer(attack, [], batch, goal, draws=Draws(0))
    with pytest.raises(ValueError, match=r"knows surrogates alone \(T\), not W1"):
        transfer(mainstay(), held, batch, goal, draws=Draws(0))

    class Learns:
        fitted = None

    with pytest.raises(ValueError, match="Learns learns on one model"):
        transfer(replace(attack, guide=Learns()), held, batch, goal, draws=Draws(0))


# ------------------------------------------------------------------------------------------------ lines


def test_lines_attack_a_victim_they_never_ask(contexts: dict[str, EvaluationContext]) -> None:
    victim = contexts["short"]
    held = [s for s in surrogates(contexts) if s.name != "short"]
    lines = transfer_attacks(victim, held, image_threat(EPS), steps=4)
    assert [line.name for line in lines] == [
        "transfer narrow",
        "transfer wide",
        "transfer ensemble",
        "transfer ensemble, scales",
        "transfer ensemble, variance",
    ]
    ap = victim.select(victim.query_labels[:6], 1)
    clean = float(ap(victim.query.signs()[:6]).mean())
    reached = {}
    for line in lines:
        before = state_of(victim.victim)
        with counted(victim.victim) as passes:
            attacked = line.fitted(victim).run(victim, 0, 0)
        assert (passes.forward, passes.backward) == (2, 0), (
            "the victim encodes the result, and its 8-bit copy"
        )
        assert_same_state(before, state_of(victim.victim))
        assert int(attacked.passes[0, 1]) >= 4 * len(line.surrogates)
        reached[line.name] = float(ap(attacked.signs[:, 0]).mean())
    assert min(reached.values()) < clean - 0.05, (clean, reached)


def test_restarts_begin_elsewhere_and_starts_are_used(contexts: dict[str, EvaluationContext]) -> None:
    victim = contexts["short"]
    line = Transfer(
        "t", transfer_attack(KNOWN, TransferSteps(2)), tuple(surrogates(contexts)[:1]), restarts=2
    )
    first, again = line.run(victim, 0, 0), line.run(victim, 0, 1)
    assert torch.equal(line.run(victim, 0, 0).inputs, first.inputs)
    assert not torch.equal(first.inputs, again.inputs)
    started = line.run(victim, 0, 0, {"image": again.inputs})
    assert not torch.equal(started.inputs, first.inputs)
    bigger = line.at(image_threat(2 * EPS))
    assert bigger.threat.knowledge == "T"
    assert float(bigger.run(victim, 0, 1).pixels["linf"].max()) > EPS


def test_settings_identify_the_surrogates(
    contexts: dict[str, EvaluationContext], data: RetrievalData
) -> None:
    held = surrogates(contexts)
    line = Transfer("t", transfer_attack(KNOWN, TransferSteps(2)), (held[0],))
    model = small_hasher()
    same = make_surrogate("renamed", contexts["narrow"].victim, data)
    assert same.digest == held[0].digest
    before, plain = weights_digest(model), make_surrogate("m", model, data).digest
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    assert weights_digest(model) != before
    assert make_surrogate("m", model, data).digest != plain
    different = [
        replace(line, surrogates=(held[1],)),
        replace(line, surrogates=tuple(held)),
        line.at(image_threat(1 / 255)),
        replace(line, attack=transfer_attack(KNOWN, TransferSteps(3))),
    ]
    assert len({str(one.settings()) for one in [line, *different]}) == 5


def test_lines_refuse_surrogates_that_do_not_fit(
    contexts: dict[str, EvaluationContext], data: RetrievalData
) -> None:
    attack, (narrow, *_) = transfer_attack(KNOWN, TransferSteps(2)), surrogates(contexts)
    with pytest.raises(ValueError, match="give its threat the knowledge 'T'"):
        Transfer("t", mainstay(), (narrow,))
    with pytest.raises(ValueError, match="at least one surrogate"):
        Transfer("t", attack, ())
    with pytest.raises(ValueError, match="give its attack 1"):
        Transfer("t", replace(attack, restarts=2), (narrow,))
    with pytest.raises(ValueError, match="different names"):
        transfer_attacks(contexts["wide"], [narrow, narrow], KNOWN)
    with pytest.raises(ValueError, match="different names, got"):
        transfer_attacks(contexts["wide"], [], KNOWN)
    few = replace(
        narrow, reference=replace(reference_of(narrow.hasher, data.train), labels=torch.ones(48, 7))
    )
    with pytest.raises(ValueError, match="'narrow' knows 7 labels and the queries have 3"):
        Transfer("t", attack, (few,)).fitted(contexts["wide"])
    with pytest.raises(ValueError, match="'narrow' does not encode 'text'"):
        Transfer("t", attack, (narrow,)).at(threat_on("text")).fitted(contexts["wide"])
    with pytest.raises(ValueError, match="the queries are 'text'"):
        make_surrogate("m", narrow.hasher, data, ("text", "image"))


def test_words_transfer_by_greedy_flips() -> None:
    data = load_data("synthetic", train=48, query=10, database=40)
    made: list[Hasher] = []
    for seed in (0, 1):
        text = {"name": "mlp", "widths": [16]}
        made.append(build_hasher(bits=8 + seed, image=None, text=text, vocabulary=data.vocabulary, seed=seed))
    context = make_context(made[0], data, batch_size=10)
    (line,) = transfer_attacks(context, [make_surrogate("b", made[1], data)], edit_threat(2))
    attacked = line.fitted(context).run(context, 0, 0)
    assert float((attacked.inputs - context.batch(0).inputs["text"]).abs().sum(1).max()) <= 2
    (vector,) = transfer_attacks(context, [make_surrogate("b", made[1], data)], threat_on("text"))
    assert vector.run(context, 0, 0).signs.shape == (10, 1, 8)


# ------------------------------------------------------------------------------------------------ the matrix


def test_the_matrix_holds_what_the_lines_find(contexts: dict[str, EvaluationContext]) -> None:
    threat: Threat = image_threat(EPS)
    matrix = transfer_matrix(contexts, threat, steps=3)
    assert matrix.surrogates == ("narrow", "wide", "short", ENSEMBLE)
    assert matrix.victims == ("narrow", "wide", "short")
    assert matrix.attacked.shape == matrix.worst.shape == (4, 3)
    assert bool((matrix.worst <= matrix.attacked + 1e-12).all())
    assert bool((matrix.worst <= matrix.clean + 1e-12).all())
    held = surrogates(contexts)
    line = transfer_attacks(contexts["short"], held, threat, steps=3)[1]  # found on "wide"
    signs = torch.cat([line.run(contexts["short"], block, 0).signs[:, 0] for block in range(2)])
    ap = contexts["short"].select(contexts["short"].query_labels, 1)(signs)
    assert torch.allclose(matrix.per_query[1, 2], ap)
    others = transfer_attacks(contexts["short"], held[:2], threat, steps=3)[2]
    signs = torch.cat([others.run(contexts["short"], block, 0).signs[:, 0] for block in range(2)])
    ap = contexts["short"].select(contexts["short"].query_labels, 1)(signs)
    assert torch.allclose(matrix.per_query[3, 2], ap), "the victim is left out of its own ensemble"


def test_two_models_have_no_ensemble_of_others(contexts: dict[str, EvaluationContext]) -> None:
    two = {name: contexts[name] for name in ("narrow", "wide")}
    assert transfer_matrix(two, KNOWN, steps=1).surrogates == ("narrow", "wide")


def test_the_matrix_refuses_benches_that_differ(contexts: dict[str, EvaluationContext]) -> None:
    with pytest.raises(ValueError, match="at least two models, got \\['narrow'\\]"):
        transfer_matrix({"narrow": contexts["narrow"]}, KNOWN)
    for field, changed in (
        ("seed", replace(contexts["wide"], seed=3)),
        ("batch size", replace(contexts["wide"], batch_size=7)),
        ("queries", make_context(contexts["wide"].victim, contexts["wide"].data, queries=5, batch_size=6)),
        ("protocol", make_context(contexts["wide"].victim, contexts["wide"].data, "saat", batch_size=6)),
    ):
        with pytest.raises(ValueError, match=f"wide and narrow differ in {field}"):
            transfer_matrix({"narrow": contexts["narrow"], "wide": changed}, KNOWN)
    with pytest.raises(ValueError, match="no model can be called"):
        transfer_matrix({"narrow": contexts["narrow"], ENSEMBLE: contexts["wide"]}, KNOWN)
