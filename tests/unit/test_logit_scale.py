"""The size of a victim's logits is no defense, and results say where it is out of the ordinary."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import robusthash as rh
from robusthash.attacks.base import Probe
from robusthash.attacks.losses import soft_bits
from robusthash.core.types import Batch, Goal, HashOutput
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.robustness.suite import Suite

DATA = rh.load_data("synthetic", query=16, multilabel=False, train=64, database=64, size=16)
BY_BIT = torch.logspace(-8, 0, 16)


class Scaled(nn.Module):
    """A linear net whose logits are multiplied."""

    def __init__(self, by):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.by = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 16)), by

    def forward(self, images):
        return self.net(images) * self.by


def context_of(by):
    return rh.make_context(rh.wrap(Scaled(by), bits=16), DATA)


def assessed(by, tier):
    return rh.assess(context_of(by), tier, queries=16)


@pytest.fixture(scope="module")
def plain():
    return assessed(1.0, "fast")


@pytest.mark.parametrize("by", [BY_BIT, BY_BIT.flip(0), 1e-15, 1e-30, 1e12], ids=str)
def test_scale_of_logits_does_not_hide_a_victim(by, plain):
    result = assessed(by, "fast")
    assert result["wMAP"] == pytest.approx(plain["wMAP"], abs=0.01)
    assert any("sizes from" in note for note in result.notes)
    (f2,) = [flag for flag in result.flags if flag.id == "F2"]
    assert f2.level == "amber"
    assert "rescale" in f2.remedy
    attack = rh.attacks.guided_apgd(eps=8 / 255, steps=3)
    attacked, ordinary = (rh.evaluate(rh.wrap(Scaled(s), bits=16), DATA, attack=attack) for s in (by, 1.0))
    assert attacked["MAP"] <= ordinary["MAP"] + 0.01
    assert any("sizes from" in note for note in attacked.notes)


def test_ordinary_victims_are_attacked_as_they_are(plain):
    for by in (1.0, 1e-3, 1e3):
        context = context_of(by)
        assert context.differentiated is context.victim
    assert not any("sizes from" in note for note in plain.notes)


def test_rescaled_victim_has_the_same_codes_and_leaves_the_victim_alone():
    context = context_of(BY_BIT)
    images = DATA.query.batch(torch.arange(16)).only(["image"]).inputs
    before = context.victim(images)["image"].logits
    seen = context.differentiated(images)["image"].logits.detach()
    assert torch.equal(seen >= 0, before >= 0)
    assert 0.5 < float(seen.abs().mean(0).min()) <= float(seen.abs().mean(0).max()) < 2
    assert torch.equal(context.victim(images)["image"].logits, before)
    assert context.differentiated.as_seen_from("white-box") is context.differentiated


def test_bits_that_are_always_zero_stay_zero():
    by = BY_BIT.clone()
    by[3] = 0
    images = DATA.query.batch(torch.arange(4)).only(["image"]).inputs
    assert (context_of(by).differentiated(images)["image"].logits[:, 3] == 0).all()


def test_soft_bits_know_no_scale():
    logits = torch.randn(4, 16)
    bits = []
    for by in (1.0, 1e-30):
        outputs = {"image": HashOutput(logits * by, logits, logits)}
        batch = Batch({"image": logits}, None, torch.arange(4))
        bits.append(soft_bits(Probe(outputs, batch.inputs, batch, Goal(None, -1), 1.0, None)))
    torch.testing.assert_close(bits[0], bits[1])


def test_attack_that_moves_no_code_is_said():
    context = context_of(1.0)
    attack = rh.attacks.mainstay(eps=1e-4, steps=2, step_size=1e-4)
    notes = rh.evaluate(context.victim, DATA, attack=attack).notes
    assert [note for note in notes if note.startswith("the attack moved no code: take more steps")]
    notes = rh.assess(context, Suite("own", (GradientAttack("weak", attack),))).notes
    assert [note for note in notes if note.startswith("the attack weak moved no code")]
    moved = rh.evaluate(context.victim, DATA, attack=rh.attacks.guided_apgd(eps=8 / 255, steps=3))
    assert not [note for note in moved.notes if "moved no code" in note]


def test_embedding_has_no_codes_to_encode_or_to_train():
    net = rh.wrap(Scaled(1.0), bits=16, output="float")
    images = DATA.query.batch(torch.arange(2)).inputs["image"]
    with pytest.raises(ValueError, match=r"cosine distance of its numbers.*output='logits'"):
        rh.SearchModel.of(net, DATA).encode(images)
    recipe = rh.HashingRecipe(net, rh.objectives.CSQ())
    with pytest.raises(ValueError, match=r"cosine distance of its numbers.*output='logits'"):
        rh.fit(recipe, DATA, rh.TrainConfig(epochs=1))


def test_data_and_results_print_in_a_few_lines(plain):
    clean = rh.evaluate(rh.wrap(Scaled(1.0), bits=16), DATA)
    for shown in map(repr, (DATA, clean, plain)):
        assert 3 <= len(shown.splitlines()) <= 6
        assert "tensor" not in shown
        assert max(map(len, shown.splitlines())) < 200
    assert "query 16" in repr(DATA)
    assert "no values" in repr(replace(clean, values={}))
    assert f"MAP {clean['MAP']:.4f} (95 % interval " in repr(clean)
    assert f"wMAP {plain['wMAP']:.4f}" in repr(plain)
    assert f"chance {plain.reference['chance']:.4f}" in repr(plain)
    assert "img-linf-8; guided, soft-ap" in repr(plain)
