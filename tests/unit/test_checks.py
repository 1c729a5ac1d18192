"""The checks F1-F23: every masked toy is caught by the check meant for it, and an honest hardened model
passes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Flat, LinearHead, image_batch, make_data, small_hasher
from torch import Tensor, nn

from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import Agreement
from robusthash.attacks.threat_model import edit_threat, image_threat
from robusthash.data import load_data
from robusthash.data.base import ArraySource
from robusthash.evaluation import make_context
from robusthash.evaluation.attack_block import attack_block
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.results import EvalResult, Flag, load_results, save_results
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import DPSH
from robusthash.robustness.checks.base import CHECKS
from robusthash.robustness.checks.behaviour_checks import (
    f1_repeated,
    f15_f19_inside,
    f16_precision,
    f23_class,
    require_usable,
)
from robusthash.robustness.checks.model_checks import bit_entropy, f21_leakage, model_checks
from robusthash.robustness.checks.suite_checks import MoreEffort, suite_checks
from tests.masked_defenses import (
    ZOO,
    Forgetful,
    Masked,
    WakefulDropout,
    _Joined,
    as_markdown,
    calibrate,
    toy_context,
)

THREAT = image_threat(8 / 255)
MODEL = {f"F{n}" for n in (1, 2, 3, *range(10, 18), *range(19, 24))}
SUITE = {f"F{n}" for n in (4, 5, 6, 7, 8, 9, 18)}


@pytest.fixture(scope="module")
def honest() -> EvaluationContext:
    """A small CSQ model, hardened by SAAT; with fewer epochs F10 depends on how the machine rounds."""
    return toy_context()


@pytest.fixture(scope="module")
def flags(honest: EvaluationContext) -> dict[str, Flag]:
    return {flag.id: flag for flag in model_checks(honest, THREAT, queries=32, steps=60)}


def only(found: tuple[Flag, ...], id: str) -> Flag:
    (flag,) = [flag for flag in found if flag.id == id]
    return flag


# ---------------------------------------------------------------------------------------------- the victim


def test_an_honest_hardened_model_passes_every_red_check(flags: dict[str, Flag]) -> None:
    assert set(flags) == MODEL
    assert not [flag for flag in flags.values() if flag.level == "red"]
    assert all(flag.remedy and "\n" not in flag.remedy for flag in flags.values())


@pytest.mark.parametrize("member", ZOO, ids=lambda member: f"{member.meant}-{member.name}")
def test_every_masked_toy_is_caught_by_the_check_meant_for_it(
    honest: EvaluationContext, member: Masked
) -> None:
    row = calibrate(honest, THREAT, queries=24, steps=21, members=(member,))[0]
    assert (row.name, row.meant) == (member.name, member.meant)
    assert row.caught, row


def test_an_attack_that_forgets_the_ball_is_refused_and_its_result_is_projected(
    honest: EvaluationContext,
) -> None:
    (row,) = calibrate(honest, THREAT, members=())
    assert row.caught
    assert row.value > row.threshold
    assert "beyond" in row.remedy
    assert (
        as_markdown((row,)).splitlines()[-1]
        == f"| {row.name} | verify | {row.value:.4g} | 0.03137 | yes |  |"
    )
    attack = Attack("forgetful", Mainstay(), Agreement(), Forgetful(), image_threat(8 / 255, knowledge="W2"))
    attacked = attack_block(honest, attack, 0)
    assert float(attacked.pixels["linf"].max()) <= 8 / 255 + 1e-6


def test_the_zoo_is_of_images() -> None:
    data = load_data("synthetic", train=32, query=8, database=32)
    victim = build_hasher(bits=8, image=None, text="mlp", vocabulary=data.vocabulary)
    context = make_context(victim, data)
    with pytest.raises(ValueError, match="masks images"):
        calibrate(context, edit_threat())


def test_edit_budgets_say_which_checks_cannot_be_run() -> None:
    data = load_data("synthetic", train=32, query=8, database=32)
    victim = build_hasher(bits=8, image=None, text="mlp", vocabulary=data.vocabulary)
    found = {flag.id: flag for flag in model_checks(make_context(victim, data), edit_threat(), queries=8)}
    assert set(found) == MODEL
    for id in ("F10", "F11", "F12", "F13"):
        assert found[id].level == "amber"
        assert math.isinf(found[id].value)
        assert "not run" in found[id].remedy
    assert found["F2"].level == found["F14"].level == found["F22"].level == "pass"


def test_plain_backgrounds_under_a_pooling_layer_are_no_broken_gradient() -> None:
    """Their pixels tie, and at a tie of the maximum a difference is no gradient."""
    data = make_data(size=12)
    pixels = torch.zeros(len(data.query), 3, 12, 12, dtype=torch.uint8)
    pixels[:, :, 0, 0] = torch.arange(len(pixels))[:, None]
    source = ArraySource({"image": pixels})
    data = replace(data, query=replace(data.query, source=source, hashes=source.hashes()))
    pooled = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), Flat())
    head = LinearHead(torch.randn(8, 6 * 5 * 5, generator=torch.Generator().manual_seed(0)))
    victim = Hasher({"image": pooled}, {"image": head})
    (flag,) = [f for f in model_checks(make_context(victim, data), THREAT, queries=8) if f.id == "F14"]
    assert flag.level == "pass"


def test_few_steps_are_no_proof_of_convergence(honest: EvaluationContext) -> None:
    assert only(model_checks(honest, THREAT, queries=8, steps=20), "F12").level == "amber"


def test_a_training_objective_may_stand_for_the_house_objective(honest: EvaluationContext) -> None:
    found = model_checks(honest, THREAT, DPSH(), queries=8, steps=3)
    assert {flag.id for flag in found} == MODEL
    assert only(found, "F2").level == "pass"


def test_a_threat_that_leaves_the_queries_alone_is_refused(honest: EvaluationContext) -> None:
    with pytest.raises(ValueError, match="nothing to check"):
        model_checks(honest, edit_threat())


@pytest.mark.parametrize(("queries", "steps"), [(0, 10), (8, 1)])
def test_no_queries_or_steps_are_refused(honest: EvaluationContext, queries: int, steps: int) -> None:
    with pytest.raises(ValueError, match="at least 1 query and 2 steps"):
        model_checks(honest, THREAT, queries=queries, steps=steps)


def test_declared_randomness_is_amber_and_matches_its_class() -> None:
    class Dice(LinearHead):
        def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
            logits = torch.randn(len(features), self.bits)
            return logits, torch.tanh(logits), 1.0

    torch.manual_seed(0)
    inputs = image_batch(torch.rand(8, 5)).inputs
    encoders, heads = {"image": Flat()}, {"image": Dice(torch.ones(4, 5))}
    declared = Hasher(encoders, heads, declared="randomised")
    assert f1_repeated(declared, inputs).level == "amber"
    assert f23_class(declared, inputs).level == "pass"
    assert f1_repeated(Hasher(encoders, heads), inputs).level == "red"
    assert "change between calls" in f23_class(Hasher(encoders, heads), inputs).remedy


def test_what_runs_inside_a_forward_pass_is_seen() -> None:
    class Odd(nn.Module):
        def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            flat = torch.nn.functional.dropout(values.flatten(1), 0.5, training=True)
            return torch.nn.functional.batch_norm(flat, None, None, training=True), {}

    inputs = image_batch(torch.rand(8, 5)).inputs
    heads = {"image": LinearHead(torch.randn(4, 5))}
    inner, trained = f15_f19_inside(Hasher({"image": Odd()}, heads), inputs)
    assert (inner.level, trained.level, trained.value) == ("pass", "red", 2)
    assert "batch_norm, dropout" in trained.remedy
    sleeping = Hasher({"image": nn.Sequential(nn.Dropout(0.5), Flat())}, heads)
    assert [flag.level for flag in f15_f19_inside(sleeping, inputs)] == ["pass", "pass"]
    waking = Hasher({"image": nn.Sequential(WakefulDropout(0.5), Flat())}, heads)
    assert f15_f19_inside(waking, inputs)[1].level == "red"


def test_bits_near_zero_are_amber() -> None:
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    weight[0] *= 1e-7
    victim = Hasher({"image": Flat()}, {"image": LinearHead(weight)})
    flag = f16_precision(victim, image_batch(torch.rand(8, 5)).inputs)
    assert (flag.level, flag.value) == ("amber", 0.0)
    assert "12.5%" in flag.remedy


def test_entropy_of_bits() -> None:
    signs = torch.tensor([[1, 1, 1], [1, -1, 1], [1, 1, 1], [1, -1, -1]])
    assert bit_entropy(signs).tolist() == pytest.approx([0.0, 1.0, 0.8112781], abs=1e-6)


def test_leakage_is_found_in_what_the_model_is_fed() -> None:
    data = make_data()
    assert f21_leakage(data).level == "pass"
    query = data.query.take(torch.arange(3))
    both = _Joined(data.train, query)
    hashes = torch.arange(len(both)).numpy().astype("S16")
    labels = torch.cat([data.train.labels, query.labels])
    train = replace(data.train, source=both, rows=torch.arange(len(both)), labels=labels, hashes=hashes)
    flag = f21_leakage(replace(data, train=train))
    assert (flag.level, flag.value) == ("red", 3)


# ---------------------------------------------------------------------------------------------- unusable
# models


def broken(change) -> Hasher:
    """A linear hasher of 4 bits whose logits are changed."""

    class Broken(LinearHead):
        def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
            logits = change(features @ self.weight.T)
            return logits, logits, 1.0

    return Hasher({"image": Flat()}, {"image": Broken(torch.ones(4, 5))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u / 0.0 * 0.0, "12 NaN or infinite values of 12"),
        (lambda u: u[:, :3], "declares 4 bits and gives image logits of shape"),
        (lambda u: torch.cat([u, u], 1), r"it must give \(3, 4\)"),
        (lambda u: u.squeeze(0), "shape"),
        (lambda u: u - u.reshape(3, 4).mean(0), "fails on one alone"),
    ],
    ids=["nan", "narrow", "wide", "squeezed", "dies at batch 1"],
)
def test_an_unusable_model_is_refused_in_words(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_usable(broken(change), image_batch(torch.rand(3, 5)))


def test_a_model_that_fails_anyway_keeps_its_own_error() -> None:
    def fail(logits: Tensor) -> Tensor:
        raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        require_usable(broken(fail), image_batch(torch.rand(3, 5)))


def test_a_usable_model_is_left_as_it_was() -> None:
    victim = small_hasher().train()
    require_usable(victim, make_data().query.batch(torch.arange(4)))
    assert victim.training


# ---------------------------------------------------------------------------------------------- the lines of
# a suite

CLEAN = torch.full((200,), 0.8, dtype=torch.float64)


def lines(white: float, other: float, kind: str, queries: int = 200) -> dict[str, Flag]:
    ap = {"guided": torch.full((2, 200), white), "rival": torch.full((1, 200), white)}
    ap["rival"][0, :queries] = other
    found = suite_checks(ap, {"guided": "white-box", "rival": kind}, CLEAN, {}, 0.1)
    return {flag.id: flag for flag in found}


@pytest.mark.parametrize(("kind", "id"), [("black-box", "F4"), ("noise", "F4"), ("transfer", "F5")])
def test_a_rival_that_beats_the_white_box_is_red(kind: str, id: str) -> None:
    found = lines(0.5, 0.4, kind)
    assert set(found) == SUITE
    assert found[id].level == "red"
    assert found[id].value == pytest.approx(0.1)
    assert "rival" in found[id].remedy
    assert lines(0.5, 0.6, kind)[id].level == "pass"
    assert lines(0.5, 0.497, kind)[id].level == "pass"  # 0.003, under the threshold
    assert lines(0.5, 0.0, kind, queries=3)[id].level == "amber"  # three queries alone may be luck


def test_what_a_suite_did_not_run_is_amber() -> None:
    signs = {"guided": torch.where(torch.rand(1, 200, 16) < 0.5, -1, 1)}
    found = suite_checks({"guided": torch.full((1, 200), 0.5)}, {"guided": "adaptive"}, CLEAN, signs, 0.1)
    assert {flag.id for flag in found if flag.level == "amber" and math.isinf(flag.value)} == SUITE - {"F18"}
    found = suite_checks({"square": torch.full((1, 200), 0.5)}, {"square": "black-box"}, CLEAN, {}, 0.1)
    assert "no white-box attack" in only(found, "F4").remedy
    assert only(found, "F18").level == "amber"


@pytest.mark.parametrize(
    ("options", "id", "level"),
    [
        ({"more": MoreEffort(unbounded=torch.full((200,), 0.3))}, "F6", "red"),
        ({"more": MoreEffort(unbounded=torch.full((200,), 0.11))}, "F6", "pass"),
        (
            {"more": MoreEffort(unbounded=torch.full((200,), 0.3)), "floor": torch.full((200,), 0.29)},
            "F6",
            "pass",
        ),
        ({"curve": {0.1: torch.full((200,), 0.4), 0.0: CLEAN, 0.2: torch.full((200,), 0.41)}}, "F7", "red"),
        ({"curve": {0.1: torch.full((200,), 0.4), 0.0: CLEAN, 0.2: torch.full((200,), 0.4)}}, "F7", "pass"),
        ({"curve": {0.1: CLEAN}}, "F7", "amber"),
        ({"more": MoreEffort(doubled_steps=torch.full((200,), 0.48))}, "F8", "red"),
        ({"more": MoreEffort(doubled_steps=torch.full((200,), 0.6))}, "F8", "pass"),
        ({"more": MoreEffort(doubled_restarts=torch.full((200,), 0.48))}, "F9", "red"),
        ({"more": MoreEffort(doubled_restarts=torch.full((200,), 0.495))}, "F9", "pass"),
    ],
)
def test_effort_and_curves(options, id: str, level: str) -> None:
    ap = {"guided": torch.full((1, 200), 0.5)}
    assert only(suite_checks(ap, {"guided": "white-box"}, CLEAN, {}, 0.1, **options), id).level == level


@pytest.mark.parametrize(("same", "level"), [(60, "amber"), (40, "pass")])
def test_one_code_for_many_queries_is_amber(same: int, level: str) -> None:
    codes = torch.where(torch.rand(2, 200, 32, generator=torch.Generator().manual_seed(0)) < 0.5, -1, 1)
    codes[1, :same] = 1
    ap = {"guided": torch.full((2, 200), 0.5)}
    flag = only(suite_checks(ap, {"guided": "white-box"}, CLEAN, {"guided": codes}, 0.1), "F18")
    assert (flag.level, flag.value) == (level, same / 200)


@pytest.mark.parametrize(
    ("ap", "kind", "signs", "message"),
    [
        (torch.zeros(1, 200), {}, {}, "has no kind"),
        (torch.zeros(200), {"a": "white-box"}, {}, r"it must be \(R, 200\)"),
        (torch.zeros(1, 200) / 0, {"a": "white-box"}, {}, "NaN"),
        (torch.zeros(1, 200), {"a": "white-box"}, {"a": torch.ones(200, 8)}, r"\(R, 200, K\)"),
    ],
)
def test_lines_that_do_not_fit_are_refused(ap, kind, signs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite_checks({"a": ap}, kind, CLEAN, signs, 0.1)


def test_a_rival_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 values for 200 clean queries"):
        suite_checks({}, {}, CLEAN, {}, 0.1, more=MoreEffort(unbounded=torch.zeros(3)))


# ---------------------------------------------------------------------------------------------- flags


def test_flags_survive_a_results_file(
    tmp_path: Path, flags: dict[str, Flag], honest: EvaluationContext
) -> None:
    from robusthash.evaluation import score_clean

    flag = only(suite_checks({}, {}, CLEAN, {}, 0.1), "F4")
    result: EvalResult = replace(score_clean(honest), flags=(flag, flags["F1"]))
    save_results(tmp_path / "r.json", [result])
    (read,) = load_results(tmp_path / "r.json")
    assert read.flags == result.flags
    assert not read.unreliable


def test_the_page_lists_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs" / "checks.md").read_text()
    for id, check in CHECKS.items():
        assert f"| {id} | {check.title}" in page, id
    for member in ZOO:
        assert f"| {member.name} | {member.meant} |" in page, member.name
