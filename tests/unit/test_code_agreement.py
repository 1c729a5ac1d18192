"""Agreement of a query's code with its harmless changes, and the attack that includes them."""

from __future__ import annotations

import pytest
import torch
from helpers import make_data, trained_hasher

from robusthash.attacks import hag
from robusthash.data.transforms import crop, eight_bits, jpeg
from robusthash.defenses.query_detection import Agreeing, CodeAgreement, against_agreement
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.models.encoding import encode_signs


@pytest.fixture(scope="module")
def context() -> EvaluationContext:
    data = make_data()
    return make_context(trained_hasher(data), data, batch_size=12)


def test_disagreement_is_the_most_over_the_changes(context) -> None:
    images, victim = context.batch(0).inputs["image"], context.victim
    own = encode_signs(victim, "image", images)
    saved = (own != encode_signs(victim, "image", jpeg(images, 90))).sum(1)
    cut = (own != encode_signs(victim, "image", eight_bits(crop(images, 0.05)))).sum(1)
    found = CodeAgreement().disagreement(victim, images)
    assert torch.equal(found, torch.maximum(saved, cut))
    assert int(CodeAgreement(quality=5).disagreement(victim, images).sum()) > int(found.sum())


def test_the_view_has_the_victims_values_and_gradients_of_all_changes(context) -> None:
    images = context.batch(0).inputs["image"].clone().requires_grad_()
    view = Agreeing()(context.victim)
    output, plain = view({"image": images})["image"], context.victim({"image": images})["image"]
    assert torch.equal(output.logits, plain.logits)
    saved = context.victim({"image": jpeg(images, 90)})["image"].logits
    assert torch.allclose(output.aux["draws"][1], saved)
    for draw in output.aux["draws"]:
        (slope,) = torch.autograd.grad(draw.sum(), images, retain_graph=True)
        assert float(slope.abs().sum()) > 0


def test_the_attack_with_the_changes_is_within_budget_and_moves_all_codes(context) -> None:
    plain = hag(eps=16 / 255, steps=20)
    aware = against_agreement(plain)
    assert aware.name == "hag with the changes"
    spec = GradientAttack(aware.name, aware, view=Agreeing(), view_name="agreeing")
    clean = context.batch(0).inputs["image"]
    found = [each.run(context, 0, 0).inputs for each in (GradientAttack("hag", plain), spec)]
    assert float((found[1] - clean).abs().max()) <= 16 / 255 + 1e-6
    own = encode_signs(context.victim, "image", clean)
    moved = [
        (own != encode_signs(context.victim, "image", change)).sum()
        for change in (found[1], *CodeAgreement().changed(found[1]))
    ]
    assert all(int(bits) > 0 for bits in moved)


@pytest.mark.parametrize(("options", "message"), [({"quality": 0}, "1..100"), ({"cut": 0.6}, "0.6")])
def test_impossible_changes_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        CodeAgreement(**options)
