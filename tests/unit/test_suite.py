"""Suites: worst cases per query, restarts and starts, stable queries, kept work, masked and random victims,
curves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Flat, LinearHead, make_data, trained_hasher
from torch import Tensor, nn

import robusthash as rh
from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Mainstay, Own
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.pgd import APGD, MomentumSteps, Polish
from robusthash.attacks.published import guided_apgd
from robusthash.attacks.ranking_losses import guided_targeted_apgd
from robusthash.attacks.threat_model import Threat, edit_threat, image_threat, named_threat, threat_on
from robusthash.core.registry import build, catalogue
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, Inputs
from robusthash.data.splits import stable_subset
from robusthash.evaluation.attack_block import AttackedBlock, finish
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack, RefinedAttack
from robusthash.evaluation.code_measures import as_codes, measure_codes
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.evaluate import score_clean
from robusthash.evaluation.runner import BlockRunner, corner_start, run_attacks
from robusthash.metrics.results import load_results, save_results
from robusthash.models import Hasher
from robusthash.models.purifier import Purifier
from robusthash.robustness.assess import assess, run_shard
from robusthash.robustness.checks.model_checks import model_checks
from robusthash.robustness.checks.suite_checks import suite_checks
from robusthash.robustness.eps_curve import eps_curve
from robusthash.robustness.specs.published_suite import LEGACY, paper_suite, published, with_legacy
from robusthash.robustness.suite import TIERS, Suite, prepare_suite, tier

EPS = 16 / 255


class Memory:
    """A keep in memory; ``stop_after`` blocks it dies, as a kill would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.blocks: dict[tuple[str, int, int], AttackedBlock] = {}
        self.stop_after = stop_after
        self.parts: dict[str, Memory] = {}

    def within(self, name: str) -> Memory:
        return self.parts.setdefault(name, Memory())

    def load(self, spec: AttackSpec, restart: int, block: int) -> AttackedBlock | None:
        return self.blocks.get((spec.name + str(spec.settings()), restart, block))

    def save(self, spec: AttackSpec, restart: int, block: int, attacked: AttackedBlock) -> None:
        if self.stop_after is not None and len(self.blocks) == self.stop_after:
            raise KeyboardInterrupt
        self.blocks[spec.name + str(spec.settings()), restart, block] = attacked


@dataclass(frozen=True)
class Corners:
    """Noise: of some random corners of the ball, the evaluator keeps the one of lowest AP for each query."""

    threat: Threat
    tries: int = 30
    name: str = "corners"
    kind: str = "noise"
    restarts: int = 1
    targeted: bool = False

    def settings(self) -> dict[str, Any]:
        return {"tries": self.tries}

    def fitted(self, context: EvaluationContext) -> Corners:
        return self

    def at(self, threat: Threat) -> Corners:
        return replace(self, threat=threat)

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        batch = context.batch(block)
        best, kept = None, batch.inputs["image"]
        for number in range(self.tries):
            tried = corner_start(self.threat, batch.inputs, batch.ids, Draws(number))["image"]
            with torch.no_grad():
                score = context.select(batch.labels, -1)(
                    context.victim({"image": tried})["image"].logits.sign()
                )
            better = torch.ones(len(batch), dtype=torch.bool) if best is None else score > best
            best = score if best is None else torch.where(better, score, best)
            kept = torch.where(better[:, None, None, None], tried, kept)
        return finish(context, self.threat, batch, [{"image": kept}], 0.0, passes=(self.tries, 0, 0))


def guided(steps: int = 4, eps: float = EPS) -> Attack:
    return guided_apgd(eps, steps)


def polish(eps: float = EPS) -> Attack:
    return replace(guided(eps=eps), search=Polish(4))


def small(*, restarts: int = 2, targeted: bool = False, refined: bool = False) -> Suite:
    away = Attack("flip", Own(), ScaleFree(), APGD(4), image_threat(EPS, knowledge="W2"), selects=True)
    specs: list[AttackSpec] = [
        GradientAttack("guided", guided(), restarts),
        GradientAttack("flip", away, restarts),
    ]
    if targeted:
        specs.append(GradientAttack("guided-targeted", guided_targeted_apgd(EPS, 4), 2))
    if refined:
        specs += [RefinedAttack("refined once", polish()), RefinedAttack("refined twice", polish())]
    return Suite("small", tuple(specs))


@pytest.fixture(scope="module")
def data() -> rh.data.RetrievalData:
    return make_data(query=20)


@pytest.fixture(scope="module")
def context(data) -> EvaluationContext:
    return make_context(trained_hasher(data), data, batch_size=8)


def same(left: AttackedBlock, right: AttackedBlock) -> None:
    for name, value in left.arrays().items():
        if name != "seconds":
            np.testing.assert_array_equal(value, right.arrays()[name], err_msg=name)


# ---------------------------------------------------------------------------------------------- worst case
# and lines


def test_the_worst_case_is_over_the_clean_input_and_every_restart_of_every_line(context, tmp_path):
    suite, store = small(targeted=True), Memory()
    result = assess(context, suite, store=store)
    clean = score_clean(context).per_query["MAP"]
    ap = {}
    for spec in suite.specs[:2]:
        for restart in range(2):
            parts = [store.load(spec, restart, block) for block in range(context.blocks)]
            codes = as_codes(AttackedBlock.join(parts).signs[:, 0])
            ap[f"{spec.name}/{restart}"] = measure_codes(context, codes, context.query_labels).per_query[
                "MAP"
            ]
    table = torch.stack([clean, *ap.values()])
    assert torch.equal(result.per_query["wMAP"], table.amin(0))
    assert (
        result["wMAP"] == float(table.amin(0).mean()) <= min(float(values.mean()) for values in ap.values())
    )
    assert result["wMAP"] < result["clean"] == result.reference["clean"]
    names = ["clean", *ap]
    assert result.winner == tuple(names[row] for row in table.argmin(0).tolist())
    specs = {name: torch.minimum(ap[f"{name}/0"], ap[f"{name}/1"]) for name in ("guided", "flip")}
    alone = (specs["flip"] < specs["guided"]) & (specs["flip"] < clean)
    assert result.attacks["flip"]["unique wins"] == int(alone.sum())
    assert result.attacks["flip"]["MAP"] == pytest.approx(float(specs["flip"].mean()))
    assert torch.equal(result.per_query["MAP under flip"], specs["flip"])
    assert result.attacks["flip"]["forward"] == 20 * 2 * 4
    assert 0 <= result["HRS"] <= 1
    low, high = result.interval["HRS"]
    assert low <= result["HRS"] <= high
    assert result.reference["least"] <= result.reference["floor"] <= result.reference["clean"]
    assert result.attacks["flip"]["completeness"] > 0
    save_results(tmp_path / "assess.json", [result])
    (again,) = load_results(tmp_path / "assess.json")
    assert again.values == result.values
    assert again.attacks == result.attacks
    assert again.winner == result.winner


def test_targets_are_reported_with_base_rate_gain_collateral_and_resistance(context):
    result = assess(context, small(restarts=1, targeted=True))
    base = result.reference["t-clean"]
    assert result["t-MAP"] >= max(base, result.attacks["guided-targeted"]["t-MAP"])
    assert result["gain"] == pytest.approx(result["t-MAP"] - base)
    assert result["TR"] == pytest.approx(1 - (result["t-MAP"] - base) / (1 - base))
    assert result["t-MAP/max"] >= result["t-MAP"]
    assert 0 < result["collateral MAP"] <= 1
    assert torch.equal(assess(context, small(restarts=1)).per_query["wMAP"], result.per_query["wMAP"])


def test_a_targeted_line_without_targets_is_left_out_and_said(context):
    data = context.data
    everything = replace(data.database, labels=torch.ones_like(data.database.labels))
    crowded = replace(
        context, data=rh.data.RetrievalData("all", data.train, data.query, everything, ("a", "b", "c"))
    )
    result = assess(crowded, small(restarts=1, targeted=True))
    assert "t-MAP" not in result.values
    assert "no targeted attack" in result.notes[0]


def test_restarts_begin_clean_uniform_and_in_a_corner(context):
    seen: list[Tensor] = []

    class Noted(APGD):
        def __call__(self, score, batch, threat, draws, select, start):
            seen.append((batch.inputs["image"] if start is None else start["image"]) - batch.inputs["image"])
            return super().__call__(score, batch, threat, draws, select, start)

    attack = replace(guided(), search=Noted(2))
    run_attacks(replace(context, batch_size=20), [GradientAttack("guided", attack, 5)])
    sizes = [(change.abs() > 0.999 * EPS).float().mean().item() for change in seen]
    assert float(seen[0].abs().max()) == 0
    assert sizes[1] < 0.1 < 0.6 < sizes[2]  # what the range of pixels cuts is no corner
    assert not torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[2], seen[4])


def test_corners_of_other_threats(context):
    batch = context.batch(0)
    ball = image_threat(0.5, "l2")
    moved = corner_start(ball, {"image": torch.full_like(batch.inputs["image"], 0.5)}, batch.ids, Draws(0))[
        "image"
    ]
    torch.testing.assert_close((moved - 0.5).flatten(1).norm(dim=1), torch.full((len(batch),), 0.5))
    bags = {"text": torch.zeros(3, 9)}
    edited = corner_start(edit_threat(2), bags, torch.arange(3), Draws(0))["text"]
    assert edited.sum(1).tolist() == [2, 2, 2]


def test_tiers_hold_the_lines_that_they_promise():
    assert [spec.name for spec in tier("smoke").specs] == ["guided"]
    assert [spec.name for spec in tier("fast").specs] == ["guided", "soft-ap"]
    standard, full = tier("standard"), tier("full")
    words = ["guided", "wrong", "pursuit", "flip", "soft-ap", "margin-pn", "guided-targeted"]
    names = ["guided", "sharp", *words[1:]]
    refined = ["refined soft-ap", "refined margin-pn", "refined guided"]
    assert [spec.name for spec in standard.specs] == names + refined
    assert [spec.restarts for spec in standard.specs] == [2] * 7 + [1] * 4
    assert [spec.restarts for spec in full.specs] == [5] * 7 + [1] * 4
    assert {spec.attack.search for spec in full.specs} == {APGD(300), MomentumSteps(300), Polish(300)}
    assert [spec.name for spec in tier("standard", edit_threat(2)).specs] == [
        *words,
        "exact",
        "refined exact",
    ]
    assert [spec.name for spec in tier("standard", named_threat("txt-token-2")).specs] == words
    assert [spec.name for spec in tier("standard", threat_on("both")).specs] == names
    assert [TIERS[name].queries for name in TIERS] == [64, 500, 1000, None]
    assert tier("smoke", image_threat(4 / 255)).specs[0].threat.name == "img-linf-4"
    assert tier("smoke", threat_on("both")).specs[0].threat.name == "img-linf-8+txt-linf-0.05"
    assert tier("fast", edit_threat(2)).specs[1].threat.name == "txt-bow-2"
    extra = Corners(image_threat())
    assert tier("smoke", extra_attacks=[extra]).specs[-1] is extra
    assert [spec.name for spec in tier("standard", extra_attacks=[extra]).specs] == [
        *names,
        "corners",
        *refined,
    ]
    assert tier("smoke", queries=7).queries == 7
    with pytest.raises(KeyError, match="did you mean 'standard'"):
        tier("standart")


def test_what_is_no_context_or_threat_is_told_how_to_make_one(context):
    with pytest.raises(ValueError, match=r"takes make_context\(victim, data\), got a Hasher"):
        assess(context.victim, context.data)
    for threat in ("img-linf-8", 8 / 255):
        with pytest.raises(ValueError, match=rf"image_threat\(8 / 255\) .* got {threat!r}"):
            assess(context, "smoke", threat)


def test_what_cannot_be_assessed_is_refused_before_any_attack(context):
    with pytest.raises(ValueError, match="names of their own"):
        Suite("twice", (GradientAttack("guided", guided()), GradientAttack("guided", guided())))
    with pytest.raises(ValueError, match="no untargeted attack"):
        assess(context, Suite("towards", (GradientAttack("t", guided_targeted_apgd(EPS, 4)),)))
    with pytest.raises(ValueError, match="the queries are images"):
        assess(context, "smoke", edit_threat(2))
    for name in ("db-insert", "db-perturb-img-linf-4"):
        with pytest.raises(ValueError, match=rf"{name}.* changes the database.*robusthash poison RUN"):
            assess(context, "smoke", named_threat(name))
    with pytest.raises(ValueError, match="no shard 2 of 2"):
        run_attacks(context, small().specs, Memory(), shard=(2, 2))
    with pytest.raises(ValueError, match="needs a store"):
        run_attacks(context, small().specs, shard=(0, 2))


# ---------------------------------------------------------------------------------------------- queries


def test_the_subset_is_the_same_items_in_the_same_order_however_the_split_is_ordered():
    split = make_data(query=60, multi=True).query
    chosen = stable_subset(split, 21)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = split.take(order)
    assert split.take(chosen).fingerprint() == shuffled.take(stable_subset(shuffled, 21)).fingerprint()
    assert len(set(chosen.tolist())) == 21
    first = split.labels.argmax(1)
    shares = torch.bincount(first[chosen], minlength=3) / 21 - torch.bincount(first, minlength=3) / 60
    assert float(shares.abs().max()) < 1 / 21
    assert not torch.equal(chosen.sort().values, torch.arange(21))
    assert torch.equal(stable_subset(split, 99), torch.arange(60))
    unlabelled = replace(split, labels=None)
    assert len(stable_subset(unlabelled, 10)) == 10
    with pytest.raises(ValueError, match="at least one query"):
        stable_subset(split, 0)


def test_a_suite_is_run_on_its_own_queries(context):
    suite, asked, _ = prepare_suite(context, replace(small(restarts=1), queries=9))
    assert len(asked.queries) == len(asked.query) == 9
    whole = context.query.packed[stable_subset(context.queries, 9)]
    assert torch.equal(asked.query.packed, whole)
    result = assess(context, replace(small(restarts=1), queries=9))
    assert len(result.per_query["wMAP"]) == 9
    assert result.setting.queries.endswith("query[9]")
    assert suite.specs == small(restarts=1).specs


# ---------------------------------------------------------------------------------------------- kept work


def test_an_interrupted_suite_ends_like_one_that_was_not(context):
    whole, part = Memory(), Memory(stop_after=7)
    suite = small(refined=True)
    expected = assess(context, suite, store=whole)
    with pytest.raises(KeyboardInterrupt):
        assess(context, suite, store=part)
    assert len(part.blocks) == 7
    part.stop_after = None
    result = assess(context, suite, store=part)
    assert part.blocks.keys() == whole.blocks.keys()
    for key, block in whole.blocks.items():
        same(block, part.blocks[key])
    assert result.values == expected.values
    assert result.winner == expected.winner


def test_two_shards_do_what_one_process_does(context):
    whole, shared = Memory(), Memory()
    suite = small(refined=True)
    expected = assess(context, suite, store=whole)
    run_shard(context, suite, (1, 2), store=shared)
    assert {block for _, _, block in shared.blocks} == {1}
    run_shard(context, suite, (0, 2), store=shared)
    for key, block in whole.blocks.items():
        same(block, shared.blocks[key])
    shared.stop_after = len(shared.blocks)  # nothing is left to run
    assert assess(context, suite, store=shared).values == expected.values


# ---------------------------------------------------------------------------------------------- refining


def test_what_refines_starts_at_the_worst_point_of_each_query_and_never_ends_above_it(context, monkeypatch):
    starts: list[Tensor] = []
    usual = RefinedAttack.run

    def run(
        self: RefinedAttack, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        assert start is not None
        starts.append(start["image"].clone())
        return usual(self, context, block, restart, start)

    monkeypatch.setattr(RefinedAttack, "run", run)
    store = Memory()
    without, result = assess(context, small(), store=store), assess(context, small(refined=True), store=store)
    asked = context.batch(0)
    found = {
        f"{spec}/{restart}": held.inputs
        for (spec, restart, block), held in _named(store).items()
        if block == 0
    }
    for row, winner in enumerate(without.winner[: len(asked)]):
        expected = asked.inputs["image"][row] if winner == "clean" else found[winner][row]
        torch.testing.assert_close(starts[0][row], expected, rtol=0, atol=0)
    once, twice = (result.per_query[f"MAP under refined {name}"] for name in ("once", "twice"))
    assert bool((once <= without.per_query["wMAP"]).all())
    assert bool((twice <= once).all())
    assert torch.equal(result.per_query["wMAP"], twice)
    for name, spec in without.attacks.items():  # unique wins are counted as if nothing refined
        assert result.attacks[name]["unique wins"] == spec["unique wins"]
    assert result.attacks["refined once"]["unique wins"] == int(
        (once < without.per_query["wMAP"] - 1e-9).sum()
    )


def _named(store: Memory) -> dict[tuple[str, int, int], AttackedBlock]:
    return {
        (key.partition("{")[0], restart, block): held for (key, restart, block), held in store.blocks.items()
    }


def test_what_refines_goes_on_from_what_noise_found(context):
    noise = Corners(image_threat(EPS), tries=2)
    alone = assess(context, Suite("noise", (noise,)))
    assert (
        assess(context, Suite("noise", (noise, RefinedAttack("refined", polish()))))["wMAP"]
        < alone["wMAP"] - 0.01
    )


def test_what_refines_is_not_taken_from_other_lines(context):
    store = Memory()
    assess(context, small(refined=True), store=store)
    kept = dict(store.blocks)
    other = replace(small(refined=True), specs=small(refined=True).specs[1:])
    assess(context, other, store=store)
    anew = store.blocks.keys() - kept.keys()
    assert {key.partition("{")[0] for key, _, _ in anew} == {"refined once", "refined twice"}


def test_a_polish_stays_near_where_it_starts(context):
    batch = context.batch(0)
    start = guided().threat.random_start(batch.inputs, batch.ids, Draws(3))
    moved = {}
    for search in (APGD(2), Polish(2)):
        attack = replace(guided(), search=search, selects=False)
        out = attack(
            context.victim, batch, Goal(batch.labels, -1), context.known(attack), draws=Draws(0), start=start
        )
        moved[type(search).__name__] = float((out.inputs["image"] - start["image"]).abs().max())
    assert moved["Polish"] <= EPS / 10 + 1e-6 < moved["APGD"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("out of memory")]
)
def test_a_batch_that_does_not_fit_is_halved_and_said(context, error):
    victim = context.victim

    class Hungry(Hasher):
        def forward(self, inputs):
            if len(inputs["image"]) > 4:
                raise error
            return super().forward(inputs)

    hungry = Hungry(dict(victim.encoders), dict(victim.heads), victim.spec)
    narrow = replace(context, victim=hungry)
    result = assess(narrow, small(restarts=1))
    assert any("4 were attacked at a time" in note for note in result.notes)
    expected = assess(context, small(restarts=1))
    torch.testing.assert_close(result.per_query["wMAP"], expected.per_query["wMAP"])
    assert result.setting == expected.setting

    class Broken(Hungry):
        def forward(self, inputs):
            raise RuntimeError("shapes cannot be multiplied")

    broken = Broken(dict(victim.encoders), dict(victim.heads), victim.spec)
    with pytest.raises(RuntimeError, match="shapes"):
        run_attacks(replace(context, victim=broken), small(restarts=1).specs)


def test_starts_are_cut_with_the_batch(context):
    """A corner start is that of its query, whatever part of the block it is attacked in."""
    attacker = BlockRunner(context)
    spec = GradientAttack("guided", guided(), 3)
    expected = attacker.block(spec, 2, 0)
    attacker.narrow = replace(context, batch_size=2)
    found = attacker.block(spec, 2, 0)
    assert torch.equal(found.signs, expected.signs)
    torch.testing.assert_close(found.inputs, expected.inputs)


# ---------------------------------------------------------------------------------------------- masked and
# random


class Rounding(Purifier):
    """Inputs to multiples of 1/32: no gradient passes."""

    def forward(self, x, encode):
        return (x * 32).round() / 32, {}


class Blur(nn.Module):
    """Codes that are drawn anew at every call: a head of pure noise."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, features):
        logits = torch.randn(len(features), self.bits) + self.nothing + 0.1 * features.mean(1, keepdim=True)
        return logits, torch.tanh(logits), 1.0


def test_t14_a_rounding_layer_hides_the_gradient_and_not_the_weakness(data, context):
    """T14: plain APGD finds nothing, random corners do, and the identity in place of the rounding does far
    better."""
    victim = context.victim
    masked = Hasher(dict(victim.encoders), dict(victim.heads), victim.spec, "purifier", {"image": Rounding()})
    threat = image_threat(EPS)
    specs = (
        GradientAttack("guided", guided(6)),
        GradientAttack(
            "identity",
            guided(6),
            kind="adaptive",
            view=lambda v: v.as_seen_from("identity"),
            view_name="identity",
        ),
        Corners(threat),
    )
    result = assess(make_context(masked, data, batch_size=20), Suite("masked", specs))
    assert result.attacks["guided"]["MAP"] == result["clean"]
    assert result.attacks["guided"]["unique wins"] == 0
    assert result.attacks["corners"]["MAP"] < result["clean"]
    assert result.attacks["identity"]["MAP"] < result.attacks["corners"]["MAP"]
    assert "identity/0" in result.winner
    assert result.setting.attacks == ("guided", "corners"), (
        "an adaptive line goes with the defense, not the setting"
    )
    masked_bench = make_context(masked, data, batch_size=20)
    seen = {flag.id: flag.level for flag in model_checks(masked_bench, threat, queries=20, steps=10)}
    assert seen["F2"] == "red"
    clean = result.per_query["clean"]
    ap = {name: result.per_query[f"MAP under {name}"][None] for name in ("guided", "corners")}
    kinds = {"guided": "white-box", "corners": "noise"}
    for specs, cut in (
        (ap, False),
        ({"corners": ap["corners"]}, True),
    ):  # beaten, or left out for want of a gradient
        flags = suite_checks(specs, {name: kinds[name] for name in specs}, clean, {}, 0.1, cut=cut)
        assert next(flag.level for flag in flags if flag.id == "F4") == "red"


def random_victim(bits: int) -> Hasher:
    return Hasher({"image": Flat()}, {"image": Blur(bits)}, declared="randomised")


def test_t19_a_victim_of_random_codes_keeps_its_clean_map():
    """T19: chosen on some draws, scored on others. The lowest of as many looks would be far lower."""
    context = make_context(random_victim(8), make_data(query=40), batch_size=40)
    suite = Suite(
        "noise", (GradientAttack("guided", guided(2), 3), GradientAttack("flip", small().specs[1].attack, 2))
    )
    store = Memory()
    result = assess(context, suite, store=store)
    low, high = result.interval["clean"]
    assert low <= result["wMAP"] <= high
    codes = torch.stack([a.signs[:, 0] for a in _whole(context, suite, store)])
    looks = [
        measure_codes(context, as_codes(signs), context.query_labels).per_query["MAP"] for signs in codes
    ]
    assert float(torch.stack(looks).amin(0).mean()) < low
    assert any("20 fresh draws" in note for note in result.notes)
    inputs = context.batch(0).inputs["image"]
    once, again = (context.noise_codes("guided", 0, 0, inputs) for _ in range(2))
    assert torch.equal(once, again), "the noise is keyed"
    assert not torch.equal(once[0], once[1]), "what chooses is not what scores"
    with pytest.raises(ValueError, match="randomised"):
        eps_curve(context, suite.specs, image_threat(EPS))


def _whole(context: EvaluationContext, suite: Suite, store: Memory) -> list[AttackedBlock]:
    return [
        AttackedBlock.join([store.load(spec, restart, block) for block in range(context.blocks)])
        for spec in suite.specs
        for restart in range(spec.restarts)
    ]


# ---------------------------------------------------------------------------------------------- curves


def test_a_curve_falls_for_every_query_and_starts_from_the_solution_before(context):
    store = Memory()
    curve = eps_curve(
        context,
        [GradientAttack("guided", guided(3))],
        image_threat(EPS),
        [0, EPS / 4, EPS, 1.5 * EPS],
        store=store,
    )
    assert torch.equal(curve.worst[0], score_clean(context).per_query["MAP"])
    assert bool((curve.worst.diff(dim=0) <= 0).all())
    assert float(curve.means[-1]) < float(curve.means[0])
    expected = torch.trapezoid(curve.means, torch.tensor(curve.eps, dtype=torch.float64)) / curve.eps[-1]
    assert curve.score == pytest.approx(float(expected))
    again = eps_curve(
        context,
        [GradientAttack("guided", guided(3))],
        image_threat(EPS),
        [0, EPS / 4, EPS, 1.5 * EPS],
        store=store,
    )
    assert torch.equal(again.worst, curve.worst)
    result = curve.onto(assess(context, small(restarts=1)))
    assert result["curve score"] == curve.score
    assert result.curves["wMAP/eps"]["wMAP"].tolist() == curve.means.tolist()


def test_the_second_budget_starts_where_the_first_ended(context):
    """An attack that does nothing but return its start keeps what the smaller budget found."""

    @dataclass(frozen=True)
    class Lazy(Corners):
        seen: list = field(default_factory=list)

        def run(self, context, block, restart, start=None):
            self.seen.append((restart, self.threat.balls["image"].eps, start))
            return super().run(context, block, restart, start)

        def at(self, threat):
            return replace(self, threat=threat)

    spec = Lazy(image_threat(EPS), tries=5)
    one = replace(context, batch_size=20)
    eps_curve(one, [spec], image_threat(EPS), [0, EPS / 2, EPS])
    assert [(restart, eps) for restart, eps, _ in spec.seen] == [(0, EPS / 2), (0, EPS), (1, EPS)]
    start = spec.seen[2][2]["image"]
    clean = one.batch(0).inputs["image"]
    assert 0 < float((start - clean).abs().max()) <= EPS / 2 + 1e-6


@pytest.mark.parametrize("budgets", [[0], [0.1, 0.2], [0, 0.2, 0.1]])
def test_budgets_that_do_not_rise_from_zero_are_refused(context, budgets):
    with pytest.raises(ValueError, match="start at 0 and rise"):
        eps_curve(context, small().specs, image_threat(EPS), budgets)


def test_default_budgets_are_those_of_the_usual_curve():
    from robusthash.robustness.eps_curve import SHARES

    assert [share * 8 for share in SHARES] == [0, 1, 2, 4, 8, 12, 16]


def test_a_full_step_is_a_full_step_in_eight_bits(context):
    """8/255 in floats is a hair below eight steps; rounding towards zero must not make it seven."""
    head = LinearHead(torch.ones(8, 432) / 432)
    victim = Hasher({"image": Flat()}, {"image": head})
    context = replace(context, victim=victim, batch_size=20)
    batch = context.batch(0)
    inside = {"image": batch.inputs["image"].clamp(0.1, 0.9)}
    threat = image_threat(8 / 255)
    seen: list[Tensor] = []
    victim.register_forward_pre_hook(lambda module, given: seen.append(given[0]["image"]))
    moved = {"image": inside["image"] + 8 / 255}
    finish(context, threat, replace(batch, inputs=inside), [moved], 0.0)
    torch.testing.assert_close(seen[1], moved["image"], rtol=0, atol=1e-6)


def test_mainstay_is_the_guide_of_the_headline_line():
    assert tier("smoke").specs[0].attack.guide == Mainstay()


def test_the_paper_tier_holds_every_published_attack_with_its_own_steps():
    suite = paper_suite(build("objective", "csq"), image_threat(4 / 255))
    with_paper = {card.name for card in catalogue("attack") if card.evidence.startswith("paper")}
    of_pairs = {"ta-dch", "cmla"}
    reconstructed = {"aach"}  # by its registered published counts; dacm, of pairs, stays out
    assert {spec.name for spec in suite.specs} == (with_paper - of_pairs) | reconstructed | {"pgd-20"}
    by_name = {spec.name: spec.attack for spec in suite.specs}
    assert by_name["pgd-20"].search.steps == 20
    assert by_name["pgd"].search.steps == 100
    counts = {"hag": 2000, "sdha": 1500, "p2p": 2000, "dhta": 2000, "mainstay": 100, "mainstay-targeted": 100}
    assert {name: by_name[name].search.steps for name in counts} == counts
    assert by_name["tha"].guide.MOST == 30_000
    assert {attack.threat.balls["image"].eps for attack in by_name.values()} == {4 / 255}
    assert by_name["hag"].threat.knowledge == "W0", "what an attack knows is its own"
    assert by_name["mainstay"].slope == "published"
    assert not any(attack.selects for attack in by_name.values()), "published attacks return their last point"
    texts = paper_suite(build("objective", "csq"), threat_on("text"))
    assert {name for spec in texts.specs for name in spec.threat.balls} == {"text"}
    with pytest.raises(ValueError, match="no attack was published under txt-bow-2"):
        paper_suite(build("objective", "csq"), edit_threat(2))


def test_a_shortened_paper_tier_says_so_and_takes_no_more_steps():
    objective = build("objective", "csq")
    suite, whole = paper_suite(objective, steps=50), paper_suite(objective)
    assert {spec.name: spec.attack.search.steps for spec in suite.specs} == {
        spec.name: min(50, spec.attack.search.steps) for spec in whole.specs
    }
    assert suite.name == "paper at most 50 steps"
    assert published(suite.name)
    assert published(whole.name)
    assert not published("standard")
    assert suite.digest() != whole.digest()


def test_the_paper_tier_under_another_norm_keeps_the_share_of_the_budget_that_a_step_has():
    objective = build("objective", "csq")
    for threat in (image_threat(12, "l1"), image_threat(0.5, "l2")):
        by_name = {spec.name: spec.attack for spec in paper_suite(objective, threat).specs}
        assert by_name["mainstay"].search.step_size == pytest.approx(threat.balls["image"].eps / 8)
        assert by_name["pgd-20"].search.step_size == pytest.approx(threat.balls["image"].eps / 4)
        assert by_name["hag"].threat.balls == threat.balls


def test_the_order_of_rows_is_measured_beside_the_expected_one(context):
    legacy = replace(context, protocol=with_legacy(context.protocol))
    result = assess(legacy, small())
    spec = result.attacks["guided"]
    assert spec[LEGACY] != spec["MAP"]
    assert abs(spec[LEGACY] - spec["MAP"]) < 0.2
    assert LEGACY not in assess(context, small()).attacks["guided"]
