"""Attacks by generators, substitutes and pairs: losses by independent formulas, effect, files, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from contract.checks import World, make_attack, make_pair_world, make_world, run
from helpers import Interrupted, counted, make_split, output_of, trained_hasher

from robusthash.attacks import Attack
from robusthash.attacks import eqb2a as eqb2a_module
from robusthash.attacks.aach import near_and_far, triplet_loss
from robusthash.attacks.base import Probe
from robusthash.attacks.classifier_attack import classification
from robusthash.attacks.cmla import CMLALoss
from robusthash.attacks.dacm import shared_basis
from robusthash.attacks.eqb2a import Knockoff, listed, ranking_loss, relaxed_distance
from robusthash.attacks.generator import Prototyped, judged, target_loss
from robusthash.attacks.generator_file import GeneratorFile, read
from robusthash.attacks.losses import SDHATargetedLoss
from robusthash.attacks.nag import NoiseInduced
from robusthash.core.hamming import sign
from robusthash.core.identity import identity
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.data import RetrievalData
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.evaluate import attack_all, score_attack
from robusthash.metrics.results import EvalResult
from robusthash.robustness.specs.published_suite import paper_suite


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def pairs() -> World:
    return make_pair_world()


def test_target_loss_by_the_formula():
    draw = torch.Generator().manual_seed(0)
    code, codes = torch.tanh(torch.randn(3, 4, generator=draw)), sign(torch.randn(5, 4, generator=draw))
    labels, known = torch.eye(3)[:, :2] + 0.0, torch.eye(2)[[0, 1, 0, 1, 1]]
    told = Prototyped(code, code, torch.rand(3, 2, generator=draw))
    pairs = 0.0
    for i in range(3):
        for j in range(5):
            t = float(code[i] @ codes[j]) / 2
            pairs += math.log1p(math.exp(t)) - float(labels[i] @ known[j] > 0) * t
    spread = float((sign(code) - code).square().sum()) / 3
    mse = float((told.labels - labels).square().mean())
    value = float(target_loss(told, labels, codes, known, 5.0, 1e-3))
    assert value == pytest.approx(mse + 5 * pairs / 15 + 1e-3 * spread, rel=1e-5)


def test_the_discriminator_is_judged_by_labels_and_flag():
    answers, labels = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert float(judged(answers, labels, attacked=False)) == 0
    assert float(judged(answers, labels, attacked=True)) == pytest.approx(1 / 3)


def test_sdha_towards_its_targets_by_the_double_sum():
    q, codes = torch.tensor([[0.5, -0.2, 0.9]]), torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    logits = torch.atanh(q)
    x = {"image": torch.full((1, 3, 2, 2), 0.5)}
    probe = Probe({"image": output_of(logits)}, x, Batch(x, None, torch.arange(1)), Goal(None, 1), 1.0, None)
    value = 0.0
    for r in codes.tolist():
        far = max(0.5, sum(np.sign(a) != b for a, b in zip(q[0].tolist(), r, strict=True)))
        d = sum(0.5 * abs(a - b) / (1 + math.exp(10 * a * b)) for a, b in zip(q[0].tolist(), r, strict=True))
        value -= 25 / 3 * 0.5 * far**0.3 * d
    found = SDHATargetedLoss()(probe, Guidance(codes, torch.tensor([[0.5, 0.5]])))
    assert float(found) == pytest.approx(value, rel=1e-5)


def test_cmla_by_the_formula_and_its_need_of_pairs():
    h, own, other = torch.tensor([[0.3, -0.6]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])
    x, clean = {"image": torch.full((1, 3, 2, 2), 0.51)}, {"image": torch.full((1, 3, 2, 2), 0.5)}
    reference = Reference({"image": own, "text": other}, torch.ones(1, 1))
    outputs = {"image": output_of(torch.atanh(h))}
    probe = Probe(outputs, x, Batch(clean, None, torch.arange(1)), Goal(torch.ones(1, 1), -1), 1.0, reference)
    a, c = float(h @ other.T), float(h @ own.T)
    wanted = math.log1p(math.exp(a)) + (math.log1p(math.exp(c)) - c) + 0.01 * 255
    assert float(CMLALoss()(probe, Guidance(torch.empty(0, 2)))) == pytest.approx(wanted, rel=1e-5)
    alone = replace(probe, reference=Reference({"image": own}, torch.ones(1, 1)))
    with pytest.raises(ValueError, match=r"no codes of text are known.*take mainstay"):
        CMLALoss()(alone, Guidance(torch.empty(0, 2)))


def test_losses_of_the_substitutes():
    assert float(triplet_loss(torch.ones(1, 4), torch.ones(1, 4), -torch.ones(1, 4))) == 0
    assert float(triplet_loss(torch.ones(1, 4), -torch.ones(1, 4), torch.ones(1, 4))) == 1.25
    near, far = near_and_far(torch.ones(1, 4), sign(torch.tensor([[1.0] * 4, [-1.0] * 4, [1, 1, 1, -1]])))
    assert near.tolist() == [[True, False, False]]
    assert bool(far[0, 1])
    assert float(relaxed_distance(torch.ones(4), -torch.ones(4))) == 1
    assert float(ranking_loss(torch.tensor([0.1]), torch.tensor([0.5]), torch.tensor([4.0]))) == 0
    assert float(ranking_loss(torch.tensor([0.1]), torch.tensor([0.3]), torch.tensor([4.0]))) > 0
    assert listed(30).tolist() == [0, 1, 2, 3, 4, 5, 11, 17, 23, 29]
    two = classification(torch.zeros(1, 2), torch.ones(1, 2), exclusive=False)
    assert float(two) == pytest.approx(math.log(2))
    one = classification(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), exclusive=True)
    assert float(one) == pytest.approx(math.log(1 + math.e))


def test_what_features_share_and_what_they_do_not():
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(50, 6, generator=draw), torch.randn(50, 5, generator=draw)
    basis = shared_basis(own, other, 2)
    shared = own.double() @ basis @ basis.T
    assert torch.allclose(basis.T @ basis, torch.eye(2).double())
    assert torch.allclose((own - shared) @ basis, torch.zeros(50, 2).double(), atol=1e-9)


def test_nag_without_noise_is_plain_steps(world):
    nag = make_attack("nag", world.objective)
    still = replace(nag, search=NoiseInduced(3, radius=0.0))
    plain = replace(nag, search=NoiseInduced(3, weight=0.0))
    assert torch.equal(run(still, world).inputs["image"], run(plain, world).inputs["image"])
    assert not torch.equal(run(nag, world).inputs["image"], run(plain, world).inputs["image"])


@pytest.fixture(scope="module")
def context():
    sizes = {"train": 96, "query": 24, "database": 72}
    splits = {n: make_split(n, count, seed, classes=8) for seed, (n, count) in enumerate(sizes.items())}
    data = RetrievalData("eight", **splits, label_names=tuple("abcdefgh"))
    return make_context(trained_hasher(data, bits=16, epochs=30, width=8), data)


def evaluate(context: EvaluationContext, attack: Attack) -> EvalResult:
    return score_attack(context, attack, attack_all(context, attack))


@pytest.mark.parametrize("name", ["pros-gan", "nag", "sdha-targeted"])
def test_targeted_attacks_beat_chance(context, name):
    options = {
        "pros-gan": {"epochs": 30, "fit_steps": 400, "hidden": 1024, "width": 8},
        "nag": {"steps": 32},
    }
    attack = make_attack(name, None, eps=0.3, **options.get(name, {"steps": 60}))
    reached = evaluate(context, attack)
    assert reached["t-MAP"] > 3 / 8, "three times the chance of eight classes"


@pytest.mark.parametrize("name", ["aach", "classifier"])
def test_attacks_on_a_substitute_lower_map_and_say_what_they_used(context, name):
    attack = make_attack(name, None, eps=0.3, steps=20, epochs=15, step_size=0.05)
    clean = evaluate(context, replace(attack, threat=attack.threat.scaled(0.0)))["MAP"]
    result = evaluate(context, attack)
    assert result["MAP"] < clean
    assert any("training items" in note for note in result.notes)
    assert any("oracle queries" in note for note in result.notes) == (name == "aach")


def test_the_victim_meets_counted_queries_alone(world):
    for name in ("aach", "eqb2a"):
        with counted(world.victim) as calls:
            fitted = world.fitted(make_attack(name, world.objective, questions=20))
        assert fitted.fit_uses[0] == 20
        assert calls.backward == 0, "a gradient reached the victim"


def test_listed_items_are_encoded_in_parts(world, monkeypatch):
    model, sizes = world.victim.eval(), []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]["image"])))
    rows = torch.arange(len(world.data.train)).repeat(2, 1).T
    with torch.no_grad():
        whole = Knockoff._codes(model, world.data, rows, "image")
        monkeypatch.setattr(eqb2a_module, "_AT_ONCE", 10)
        parts = Knockoff._codes(model, world.data, rows, "image")
    handle.remove()
    assert sizes[0] == len(rows)
    assert sum(sizes[1:]) == len(rows)
    assert max(sizes[1:]) == 10
    assert torch.allclose(whole, parts, atol=1e-5)


def test_a_generator_goes_on_where_it_was_stopped(world, tmp_path, monkeypatch):
    kept = make_attack("pros-gan", world.objective, epochs=4, generator=str(tmp_path / "a"))
    write = GeneratorFile.write

    def killed(self: GeneratorFile, parts: dict[str, Any], epoch: int) -> None:
        write(self, parts, epoch)
        if epoch == 2:
            raise Interrupted

    monkeypatch.setattr(GeneratorFile, "write", killed)
    with pytest.raises(Interrupted):
        world.fitted(kept)
    monkeypatch.setattr(GeneratorFile, "write", write)
    assert read(tmp_path / "a")["epoch"] == 2
    whole = world.fitted(make_attack("pros-gan", world.objective, epochs=4))
    for _ in range(2):  # gone on with, and then only read
        assert torch.equal(run(whole, world).inputs["image"], run(world.fitted(kept), world).inputs["image"])
    assert read(tmp_path / "a")["epoch"] == 4


def test_a_generator_of_another_victim_is_refused_or_transferred(world, tmp_path):
    path = str(tmp_path / "generator.pt")
    own = make_attack("pros-gan", world.objective, generator=path)
    world.fitted(own)
    other = replace(world, victim=trained_hasher(world.data, epochs=2))
    with pytest.raises(ValueError, match=r"was trained for another victim .*say transfer: true"):
        other.fitted(own)
    carried = make_attack("pros-gan", world.objective, generator=path, transfer=True)
    assert carried.name.startswith("pros-gan from ")
    assert carried.threat.knowledge == "T"
    run(other.fitted(carried), other)
    with pytest.raises(ValueError, match="this very victim; leave out transfer"):
        world.fitted(carried)
    smaller = make_attack("pros-gan", world.objective, generator=path, eps=0.01)
    with pytest.raises(ValueError, match="was trained for eps"):
        world.fitted(smaller)
    wider = make_attack("pros-gan", world.objective, generator=path, width=8)
    with pytest.raises(ValueError, match=r"with options width=4, and width=8 is asked for; name another"):
        world.fitted(wider)
    with pytest.raises(ValueError, match="there is no generator"):
        make_attack("pros-gan", world.objective, generator=str(tmp_path / "none"), transfer=True)


def test_a_transferred_generator_is_known_by_its_nets(world, tmp_path):
    files = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    for epochs, file in enumerate(files, 1):
        world.fitted(make_attack("pros-gan", world.objective, epochs=epochs, bounded=False, generator=file))
    carried = [make_attack("pros-gan", world.objective, generator=file, transfer=True) for file in files]
    assert identity(carried[0].settings()) != identity(carried[1].settings())
    assert not carried[0].guide.bounded, "it paints images, as it was trained to"


def test_a_generator_that_is_not_trained_to_its_end_is_not_transferred(world, tmp_path, monkeypatch):
    file, write = tmp_path / "generator.pt", GeneratorFile.write

    def killed(self: GeneratorFile, parts: dict[str, Any], epoch: int) -> None:
        write(self, parts, epoch)
        raise Interrupted

    monkeypatch.setattr(GeneratorFile, "write", killed)
    with pytest.raises(Interrupted):
        world.fitted(make_attack("pros-gan", world.objective, epochs=3, generator=str(file)))
    other = replace(world, victim=trained_hasher(world.data, epochs=2))
    with pytest.raises(ValueError, match="holds epoch 1 of 3, its training was stopped"):
        other.fitted(make_attack("pros-gan", world.objective, generator=str(file), transfer=True))


@pytest.mark.parametrize("header", [{}, 3, {"victim": "a"}])
def test_a_file_with_another_header_is_no_generator(world, tmp_path, header):
    torch.save({"header": header, "epoch": 1, "state": {}}, tmp_path / "generator.pt")
    with pytest.raises(ValueError, match="is no file of a generator"):
        make_attack("pros-gan", world.objective, generator=str(tmp_path / "generator.pt"), transfer=True)
    with pytest.raises(ValueError, match="is no file in a folder that exists"):
        make_attack("pros-gan", world.objective, generator=str(tmp_path))


def test_one_changed_weight_of_a_generator_file_is_noticed(world, tmp_path):
    file = tmp_path / "generator.pt"
    own = make_attack("pros-gan", world.objective, generator=str(file))
    world.fitted(own)
    stored = torch.load(file, weights_only=True)
    next(iter(stored["state"]["nets"].values())).view(-1)[0] += 1e-3
    torch.save(stored, file)
    with pytest.raises(ValueError, match=r"not those that were trained: .*delete it to train again"):
        world.fitted(own)
    with pytest.raises(ValueError, match="not those that were trained"):
        make_attack("pros-gan", world.objective, generator=str(file), transfer=True)


def test_a_generator_file_of_another_attack_or_size_is_named(pairs, tmp_path):
    file = str(tmp_path / "generator.pt")
    pairs.fitted(make_attack("pros-gan", pairs.objective, generator=file))
    for transfer in (True, False):
        with pytest.raises(ValueError, match="is a generator of pros-gan, not of ta-dch; name another"):
            pairs.fitted(make_attack("ta-dch", pairs.objective, generator=file, transfer=transfer))
    other = replace(pairs, victim=trained_hasher(pairs.data, epochs=2))
    wider = make_attack("pros-gan", pairs.objective, generator=file, transfer=True, width=8)
    with pytest.raises(ValueError, match="nets of other sizes; give the width and hidden that it"):
        other.fitted(wider)


def test_bad_input_is_named(world):
    with pytest.raises(ValueError, match="has no texts; take pros-gan"):
        world.fitted(make_attack("ta-dch", world.objective))
    with pytest.raises(ValueError, match=r"has no text; take cgat"):
        world.fitted(make_attack("dacm", world.objective))
    for name in ("aach", "eqb2a"):
        with pytest.raises(ValueError, match="at least 2 oracle queries, got 0"):
            world.fitted(make_attack(name, world.objective, questions=0))
    with pytest.raises(ValueError, match="width and generator_epochs from 1, got 0, 1"):
        make_attack("eqb2a", world.objective, width=0)
    with pytest.raises(ValueError, match="width and grid must be at least 1, got 0 and 2"):
        world.fitted(make_attack("aach", world.objective, encoder={"name": "small", "width": 0}))
    with pytest.raises(ValueError, match="epochs and batch must be at least 1, got 0"):
        make_attack("pros-gan", world.objective, epochs=0)
    with pytest.raises(ValueError, match=r"call attack\.fit"):
        run(make_attack("aach", world.objective), world)


def test_the_paper_tier_takes_pairs_where_there_are_some(world):
    alone, both = (
        {spec.name: spec for spec in paper_suite(world.objective, pairs=pairs).specs}
        for pairs in (False, True)
    )
    assert set(both) - set(alone) == {"ta-dch", "cmla", "dacm"}
    kinds = {name: both[name].kind for name in ("pros-gan", "classifier", "aach", "eqb2a")}
    assert kinds == {
        "pros-gan": "white-box",
        "classifier": "transfer",
        "aach": "black-box",
        "eqb2a": "black-box",
    }
    short = {spec.name: spec.attack for spec in paper_suite(world.objective, steps=2).specs}
    assert short["pros-gan"].guide.epochs == 2
    assert short["aach"].guide.epochs == 2
