"""CRDAT, FPAD, RoCMR and TPAP: formulas in closed form, what moves in training, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    Flat,
    Interrupted,
    LinearHead,
    MemoryLog,
    make_data,
    train_config,
    trained_hasher,
)

from robusthash.apps.experiment.config import ConfigError, make_config
from robusthash.attacks import mainstay
from robusthash.attacks.fpad import FuzzyPrototype, fpad, memberships
from robusthash.attacks.published import dhta, pgd
from robusthash.attacks.rocmr import info_nce
from robusthash.core.hamming import sign
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Reference
from robusthash.data import RetrievalData
from robusthash.data.base import Split
from robusthash.defenses.adversarial_training import AdversarialTraining
from robusthash.defenses.crdat import CRDAT, code_distance, feature_distance
from robusthash.defenses.fpad import FPADOuter
from robusthash.defenses.rocmr import RoCMROuter, contrast
from robusthash.defenses.tpap import TPAP
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher, build_hasher, frozen, purified
from robusthash.models.tpap import ImageStepAway
from robusthash.objectives import DPSH
from robusthash.objectives.base import TrainFacts
from robusthash.training import HashingRecipe, OptimConfig, fit
from robusthash.training.recipe import Moment


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def warm(data: RetrievalData) -> Hasher:
    return trained_hasher(data, epochs=4)


@pytest.fixture(scope="module")
def paired() -> tuple[RetrievalData, Hasher]:
    """Images with texts, and a hasher of both that has learned a little."""
    data = build("data", {"name": "synthetic", "train": 48, "query": 8, "database": 32})
    image, text = {"name": "small", "width": 4, "grid": 1}, {"name": "mlp", "widths": [16]}
    hasher = build_hasher(bits=8, image=image, text=text, vocabulary=data.vocabulary)
    fit(HashingRecipe(hasher, DPSH()), data, train_config(3))
    return data, hasher


def inner(**options: Any) -> Any:
    return mainstay(**{"steps": 2, "step_size": 4 / 255, "slope": "one", **options})


def linear(weights: torch.Tensor) -> Hasher:
    """A hasher of (B, 3, 1, 1) images whose logits are W x."""
    head = LinearHead(weights)
    return Hasher({"image": Flat()}, {"image": head})


# ----------------------------------------------------------------------------------------------- CRDAT


def unlabelled(data: RetrievalData) -> RetrievalData:
    def without(split: Split) -> Split:
        return replace(split, labels=None)

    return replace(data, train=without(data.train))


def test_a_student_that_is_its_teacher_has_only_the_gap_of_relaxed_codes(
    warm: Hasher, data: RetrievalData
) -> None:
    with frozen(warm), torch.no_grad():
        output = warm(data.train.batch(torch.arange(8)).inputs)["image"]
    assert feature_distance(output, output).abs().max() < 1e-6
    gap = 1 - output.relaxed().abs().mean(1)
    assert torch.allclose(code_distance(output, output), gap, atol=1e-6)


def test_distillation_needs_no_labels_moves_the_student_alone_and_its_loss_falls(
    warm: Hasher, data: RetrievalData
) -> None:
    made = CRDAT(copy.deepcopy(warm), DPSH(), inner())
    before = copy.deepcopy(made.teacher.state_dict())
    lines = fit(made, unlabelled(data), train_config(5, lr=0.02))
    assert sum(lines[-1][name] for name in ("codes", "features")) < sum(
        lines[0][name] for name in ("codes", "features")
    )
    for name, value in made.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(v, before[n]) for n, v in made.hasher.state_dict().items())
    assert made.hasher.declared == "adversarial"


def test_an_interrupted_distillation_is_the_same_training(warm: Hasher, data: RetrievalData) -> None:
    def fresh() -> CRDAT:
        return CRDAT(copy.deepcopy(warm), DPSH(), inner())

    straight = fresh()
    fit(straight, data, train_config(3), MemoryLog())
    stopped = MemoryLog(1)
    with pytest.raises(Interrupted):
        fit(fresh(), data, train_config(3), stopped)
    stopped.stop_after = None
    resumed = fresh()
    fit(resumed, data, train_config(3), stopped)
    for name, value in straight.hasher.state_dict().items():
        assert torch.equal(value, resumed.hasher.state_dict()[name]), name


def test_nets_that_are_not_attacked_stay_the_teacher_s(paired: tuple[RetrievalData, Hasher]) -> None:
    data, hasher = paired
    made = CRDAT(copy.deepcopy(hasher), DPSH(), inner())
    text = copy.deepcopy(made.hasher.encoders["text"].state_dict())
    fit(made, data, train_config(1))
    for name, value in made.hasher.encoders["text"].state_dict().items():
        assert torch.equal(value, text[name]), name
    assert set(made.parameter_groups()) == {"hasher"}


def test_distillation_refuses_targets_and_a_new_net(warm: Hasher) -> None:
    with pytest.raises(ValueError, match="untargeted"):
        CRDAT(warm, DPSH(), dhta(steps=2))
    with pytest.raises(ValueError, match=r"attacks the hashing objective.*take 'mainstay' or 'hag'"):
        CRDAT(warm, DPSH(), build("attack", {"name": "pgd", "steps": 2}, objective=DPSH()))
    section = {"recipe": "crdat", "attack": "mainstay"}
    with pytest.raises(ConfigError, match="init_from"):
        make_config({"name": "new", "training": section})
    assert make_config({"name": "new", "training": {**section, "init_from": "base.yaml"}})


# ------------------------------------------------------------------------------------------------ FPAD


def test_memberships_are_shares_and_one_label_gives_its_class_code() -> None:
    codes = torch.tensor([[1.0, 1, 1, 1], [-1, -1, 1, 1]])
    classes = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
    found = memberships(codes, classes, 0.5)
    assert torch.allclose(found.sum(1), torch.ones(2))
    assert found[0, 0].item() == pytest.approx(1 / (1 + math.exp(-4)))
    assert found[1].tolist() == pytest.approx([0.5, 0.5])
    guide = FuzzyPrototype(hidden=16)
    guide.setup(TrainFacts(4, 6, torch.eye(3), 0, 0.0))
    own = guide.class_codes(3, torch.device("cpu"))
    assert torch.allclose(guide.mixed(torch.eye(3), torch.rand(3, 3)), own, atol=1e-5)
    both = guide.mixed(torch.tensor([[1.0, 1, 0]]), torch.tensor([[0.75, 0.25, 9.0]]))
    assert torch.allclose(both, (0.75 * own[0] + 0.25 * own[1])[None], atol=1e-4)


def test_the_net_learns_the_codes_of_opposite_classes() -> None:
    code = torch.where(torch.rand(16, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    labels = torch.eye(2).repeat(10, 1)
    codes = torch.where(labels[:, :1] > 0, code, -code)
    victim = type("Victim", (), {"bits": 16, "device": torch.device("cpu")})()
    made = FuzzyPrototype(steps=600).fitted(victim, None, Reference({"image": codes}, labels), Draws(0))
    assert isinstance(made, FuzzyPrototype)
    assert torch.equal(sign(made.prototypes(torch.eye(2))), torch.stack([code, -code]))


def test_both_modalities_are_attacked_and_the_prototypes_trained_along(
    paired: tuple[RetrievalData, Hasher],
) -> None:
    data, hasher = paired
    attack = fpad(steps=2, step_size=0.02, modality="both")
    made = AdversarialTraining(copy.deepcopy(hasher), DPSH(), attack, FPADOuter())
    config = train_config(4)
    optim = {**config.optim, "guide": OptimConfig("adam", 1e-2, momentum=0.9, weight_decay=0.0)}
    lines = fit(made, data, replace(config, optim=optim))
    assert lines[-1]["prototype"] < lines[0]["prototype"]
    assert lines[0]["rectification"] >= 0.0
    assert {"clean/similarity", "robust/similarity", "adversarial"} <= set(lines[0])


# ----------------------------------------------------------------------------------------------- RoCMR


def test_contrast_of_equal_scores_is_the_logarithm_of_the_batch_and_shared_labels_are_no_negatives() -> None:
    same = torch.ones(5, 8)
    others = ~torch.eye(5, dtype=torch.bool)
    assert contrast(same, same, others).item() == pytest.approx(math.log(5), rel=1e-5)
    none = torch.zeros(5, 5, dtype=torch.bool)
    assert contrast(same, -same, none).item() == pytest.approx(0.0, abs=1e-6)
    scores = torch.tensor([[2.0, 0.0, 1.0]])
    positive, negative = torch.tensor([[True, True, False]]), torch.tensor([[False, False, True]])
    near = (math.exp(2) + 1) / 2
    assert info_nce(scores, positive, negative).item() == pytest.approx(
        -math.log(near / (near + math.e)), rel=1e-6
    )


def test_the_views_are_the_four_of_two_modalities(paired: tuple[RetrievalData, Hasher]) -> None:
    data, hasher = paired
    batch = data.train.batch(torch.arange(6)).only(hasher.modalities)
    with frozen(hasher), torch.no_grad():
        clean = hasher(batch.inputs)
    turn = type("Turn", (), {"clean": clean, "robust": clean})()
    views = RoCMROuter._views(turn)
    assert len(views) == 4
    turn = type("Turn", (), {"clean": clean, "robust": {"image": clean["image"]}})()
    assert len(RoCMROuter._views(turn)) == 2
    alone = {"image": clean["image"]}
    assert len(RoCMROuter._views(type("Turn", (), {"clean": alone, "robust": alone})())) == 1


@pytest.mark.parametrize("kind", ["fpad", "rocmr"])
def test_negative_weights_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="-1"):
        build("outer", {"name": kind, {"fpad": "adversarial", "rocmr": "contrast"}[kind]: -1.0})


# ------------------------------------------------------------------------------------------------ TPAP


def test_on_a_linear_hash_the_step_costs_eps_times_the_slope() -> None:
    """In the middle of the cube, logits fall by eps |sum_k (1 - tanh^2) b W|_1 along the step."""
    weights = torch.tensor([[0.4, -0.2, 0.3], [0.1, 0.5, -0.3]])
    hasher = linear(weights)
    x = torch.tensor([[0.52, 0.46, 0.55]]).reshape(1, 3, 1, 1)
    purifier = ImageStepAway(eps=0.01)
    with torch.inference_mode():
        moved, _ = purifier(x, lambda v: hasher._hash("image", v))
    logits = hasher({"image": x})["image"].logits
    slope = ((1 - torch.tanh(logits) ** 2) * sign(logits)) @ weights / 2
    assert torch.allclose((x - moved).flatten(), 0.01 * slope.flatten().sign(), atol=1e-6)


def test_attackers_get_a_gradient_that_is_not_the_identity_s(warm: Hasher, data: RetrievalData) -> None:
    whole = purified(copy.deepcopy(warm), {"image": "tpap-image"}, "query")
    x = data.query.batch(torch.arange(4)).inputs["image"]
    grads = []
    for victim in (whole, whole.as_seen_from("identity")):
        with frozen(victim):
            leaf = x.clone().requires_grad_(True)
            output = victim({"image": leaf})["image"]
            grads.append(torch.autograd.grad(output.logits.abs().sum(), leaf)[0])
            assert torch.equal(output.logits.sign().to(torch.int8), encode_signs(whole, "image", x))
    assert torch.isfinite(grads[0]).all()
    assert not torch.allclose(grads[0], grads[1], rtol=0.01)


def test_training_reaches_the_bare_hasher_and_the_result_steps_away(
    warm: Hasher, data: RetrievalData
) -> None:
    whole = purified(copy.deepcopy(warm), {"image": "tpap-image"}, "query")
    attack = pgd(DPSH(), eps=2 / 255, steps=1, step_size=2 / 255, random_start=False)
    made = TPAP(whole, DPSH(), attack)
    before = copy.deepcopy(whole.state_dict())
    lines = fit(made, data, train_config(4))
    assert set(lines[0]) >= {"robust/similarity"}
    assert "clean/similarity" not in lines[0]
    assert lines[-1]["robust/similarity"] < lines[0]["robust/similarity"]
    assert any(not torch.equal(v, before[n]) for n, v in whole.state_dict().items())
    assert whole.declared == "purifier"
    x = data.query.batch(torch.arange(4)).inputs
    with frozen(whole), torch.no_grad():
        assert (whole(x)["image"].aux["pure"] - x["image"]).abs().max() > 0.03


def test_the_inner_attack_of_tpap_does_not_see_the_purifier(warm: Hasher, data: RetrievalData) -> None:
    whole = purified(copy.deepcopy(warm), {"image": "tpap-image"}, "query")
    made = TPAP(whole, DPSH(), pgd(DPSH(), steps=1, step_size=8 / 255, random_start=False))
    made.setup(data, 0, 16)
    bare = HashingRecipe(copy.deepcopy(warm), DPSH())
    bare.setup(data, 0, 16)
    assert torch.equal(made.plain.memory.codes["image"], bare.memory.codes["image"])
    groups = dict(made.step(data.train.batch(torch.arange(16)), Moment(0, 0.0, Draws(0))))
    assert set(groups) == {"hasher"}


def test_another_purifier_or_none_is_refused(warm: Hasher) -> None:
    attack = pgd(DPSH(), steps=1)
    with pytest.raises(ValueError, match="tpap-image"):
        TPAP(copy.deepcopy(warm), DPSH(), attack)
    other = purified(copy.deepcopy(warm), {"image": {"name": "drfgd-image", "width": 4}}, "query")
    with pytest.raises(ValueError, match="image purifier is another"):
        TPAP(other, DPSH(), attack)
    for eps in (8.0, 0.0):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            ImageStepAway(eps=eps)
