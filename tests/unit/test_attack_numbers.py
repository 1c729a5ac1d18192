"""Numbers of attacks: other units and idle values are refused, and steps that fall short are said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robusthash as rh
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.training_stages import train
from robusthash.attacks.base import Attack
from robusthash.attacks.pgd import APGD, PGD, RawGradient
from robusthash.core.registry import build, card
from robusthash.data import load_data
from robusthash.evaluation import evaluate, make_context
from robusthash.models.hasher import Hasher

DATA = {"query": 20, "train": 40, "database": 60, "size": 16, "texts": False, "multilabel": False}


def data() -> Any:
    return load_data("synthetic", **DATA)


def victim() -> Hasher:
    return rh.build_hasher(image={"name": "small", "width": 4}, bits=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mainstay", "step_size": 2}, r"step_size 2 is outside \(0, 1\].* write 2/255, not 2"),
        ({"name": "mainstay", "step_size": -1 / 255}, "step_size must be above 0 and finite, got -0.0039"),
        ({"name": "mainstay", "step_size": 0}, "step_size must be above 0"),
        ({"name": "pgd", "step_size": float("nan")}, "step_size .* must be a finite number or null, got nan"),
        ({"name": "pgd", "steps": 0}, "steps must be at least 1, got 0"),
        ({"name": "pgd", "steps": -3}, "steps .* must not be below 0, got -3"),
        ({"name": "hag", "lr": 0}, "lr must be above 0 and at most 1e30, got 0"),
        ({"name": "cmla", "lr": 1e38}, "lr must be above 0 and at most 1e30, got 1e.38"),
        ({"name": "sdha", "lr": -0.1}, "lr must be above 0"),
        ({"name": "mainstay", "eps": 8}, r"eps 8 is outside \[0, 1\].* write 8/255, not 8"),
        (
            {"name": "mainstay", "eps": float("inf"), "norm": "l2"},
            "eps .* must be a finite number or null, got inf",
        ),
        ({"name": "guided-apgd", "steps": 1}, "APGD needs at least 2 steps"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("attack", settings, objective=rh.objectives.CSQ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": "2"}, "steps must be a whole number, got '2'"),
        ({"eps": "8/255"}, "eps must be a finite number, got '8/255'"),
    ],
)
@pytest.mark.parametrize("name", ["mainstay", "guided-apgd", "hag"])
def test_numbers_of_another_type_are_refused_in_python(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        card("attack", name).make(**options)


def test_parts_of_a_search_are_checked() -> None:
    for wrong in (
        lambda: PGD(momentum=-1),
        lambda: PGD(select_every=0),
        lambda: APGD(rho=2),
        lambda: APGD(select_every=0),
        lambda: RawGradient(momentum=1.0),
        lambda: RawGradient(lr=float("inf")),
    ):
        with pytest.raises(ValueError, match=", got"):
            wrong()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 128, "norm": "l2", "step_size": 16}, "eps 128 is beyond the longest change of 3 x 16 x 16"),
        (
            {"eps": 2, "norm": "l2", "step_size": 40},
            "step_size 40 is beyond the longest change .* in l2, 27.71",
        ),
        ({"eps": 3000, "norm": "l1"}, "eps 3000 is beyond the longest change .* in l1, 768"),
    ],
)
def test_lengths_in_levels_of_255_are_refused_at_the_first_image(
    options: dict[str, Any], message: str
) -> None:
    attack = rh.attacks.mainstay(steps=2, **options)
    with pytest.raises(ValueError, match=message):
        evaluate(victim(), data(), attack=attack)
    scaled = {key: value / 255 if isinstance(value, int) else value for key, value in options.items()}
    assert evaluate(victim(), data(), attack=rh.attacks.mainstay(steps=2, **scaled))["MAP"] > 0


@pytest.mark.parametrize(
    ("steps", "step_size", "norm", "short"),
    [
        (5, None, "linf", True),
        (8, None, "linf", False),
        (4, 2 / 255, "linf", False),
        (4, None, "l2", True),
        (8, None, "l2", False),
    ],
)
def test_steps_that_do_not_reach_the_edge_are_said(
    steps: int, step_size: float | None, norm: Any, short: bool
) -> None:
    attack = rh.attacks.mainstay(eps=8 / 255, steps=steps, step_size=step_size, norm=norm)
    notes = evaluate(victim(), data(), attack=attack).notes
    said = [note for note in notes if "reach" in note]
    assert bool(said) == short
    if short:
        assert "take at least 8 steps, or a longer step_size" in said[0]
        assert rh.attacks.mainstay(eps=8 / 255, steps=8, norm=norm).falls_short == ""


class Cut(nn.Module):
    """An encoder that no gradient passes, or none but zero."""

    def __init__(self, inner: Any, how: str) -> None:
        super().__init__()
        self.inner, self.how, self.width = inner, how, inner.width

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "round":
            return self.inner((x * 255).round() / 255)
        if self.how == "numpy":
            return self.inner(torch.from_numpy(x.detach().numpy().copy()))
        return self.inner(x.detach())


def attacks() -> list[Attack]:
    named = [rh.attacks.mainstay(steps=2), rh.attacks.guided_apgd(steps=2)]
    return [*named, build("attack", {"name": "hag", "steps": 2}, objective=rh.objectives.CSQ())]


@pytest.mark.parametrize("how", ["detach", "numpy"])
def test_a_victim_without_gradient_is_one_line_under_every_attack(how: str) -> None:
    whole = victim()
    cut = Hasher({"image": Cut(whole.encoders["image"], how)}, {"image": whole.heads["image"]})
    for attack in attacks():
        with pytest.raises(ValueError, match=r"no gradient reaches the image of this victim.*use assess"):
            evaluate(cut, data(), attack=attack)


def test_a_gradient_of_zero_is_said() -> None:
    whole = victim()
    flat = Hasher({"image": Cut(whole.encoders["image"], "round")}, {"image": whole.heads["image"]})
    result = evaluate(flat, data(), attack=rh.attacks.guided_apgd(steps=3))
    assert result["MAP"] == result.reference["clean"]
    assert any("changed no query: the gradient" in note for note in result.notes)
    idle = evaluate(whole, data(), attack=rh.attacks.guided_apgd(eps=0.0, steps=3))
    assert not any("changed no query" in note for note in idle.notes)


def test_the_evaluation_is_checked_with_the_data_before_the_training(tmp_path: Any) -> None:
    for change, message in (
        ({"relevance": ["own", "foo"]}, r"evaluation.relevance holds 'foo', and synthetic has \['own'\]"),
        ({"attacks": [{"name": "mainstay", "norm": "l2", "eps": 128}]}, "eps 128 is beyond the longest"),
    ):
        recipe = {"name": "early", "data": {"name": "synthetic", **DATA}, "evaluation": change}
        with pytest.raises(ValueError, match=message):
            train(make_config(recipe), tmp_path)
        assert not list(tmp_path.rglob("*.safetensors"))


def test_queries_that_the_protocol_skips_are_not_attacked() -> None:
    whole = data()
    labels = whole.query.labels.clone()
    labels[:5] = 0
    some = replace(whole, query=replace(whole.query, labels=labels))
    zero, skip = (
        evaluate(victim(), some, {"name": "house", "empty": empty}, attack=rh.attacks.mainstay(steps=2))
        for empty in ("zero", "skip")
    )
    assert (zero.empty, skip.empty) == (5, 5)
    assert len(zero.per_query["MAP"]) == 20
    assert len(skip.per_query["MAP"]) == 15
    clean = evaluate(victim(), some, {"name": "house", "empty": "skip"})
    assert skip.reference["clean"] == clean["MAP"] == pytest.approx(zero.reference["clean"] * 20 / 15)
    context = make_context(victim(), some, {"name": "house", "empty": "skip"})
    assert context.chosen == "all, 5 without a relevant item left out"
    nothing = replace(whole, query=replace(whole.query, labels=torch.zeros_like(labels)))
    with pytest.raises(ValueError, match="none of the 20 queries has a relevant item"):
        make_context(victim(), nothing, {"name": "house", "empty": "skip"})
