"""Attacked evaluation: feasibility is checked by the evaluator, the worst case is per query, targets are
counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import robusthash as rh
from robusthash.attacks.base import Search, SearchResult
from robusthash.attacks.guides import Own
from robusthash.attacks.losses import Agreement
from robusthash.attacks.pgd import ascend
from robusthash.attacks.threat_model import image_threat
from robusthash.core.registry import build
from robusthash.data import RetrievalData
from robusthash.data.splits import stable_subset
from robusthash.evaluation import make_context, score_attack, score_clean, worst
from robusthash.evaluation.attack_block import AttackedBlock, attack_block
from robusthash.evaluation.code_measures import as_codes, measure_codes
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import attack_all
from robusthash.metrics.results import EvalResult


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return rh.load_data("synthetic", seed=0)


@pytest.fixture(scope="module")
def victim(data: RetrievalData) -> rh.Hasher:
    hasher = rh.build_hasher(bits=16, image={"name": "small", "width": 8})
    rh.fit(rh.HashingRecipe(hasher, rh.objectives.CSQ()), data, rh.TrainConfig(epochs=5, batch_size=32))
    return hasher


@pytest.fixture(scope="module")
def context(victim, data):
    return make_context(victim, data, batch_size=16)


def attacks(steps: int = 5) -> dict[str, rh.Attack]:
    return {
        "mainstay": rh.attacks.mainstay(eps=16 / 255, steps=steps, step_size=8 / 255),
        "hag": rh.attacks.hag(eps=16 / 255, steps=steps),
        "guided-apgd": rh.attacks.guided_apgd(eps=16 / 255, steps=10),
    }


def test_worst_case_is_per_query_and_below_every_attack(context):
    clean = score_clean(context)
    results = {
        name: score_attack(context, attack, attack_all(context, attack)) for name, attack in attacks().items()
    }
    found = worst(context, clean, results)
    stacked = torch.stack([clean.per_query["MAP"], *(r.per_query["MAP"] for r in results.values())])
    assert torch.equal(found.per_query["wMAP"], stacked.min(0).values)
    assert found["wMAP"] <= min(result["MAP"] for result in results.values())
    assert found["wMAP"] < clean["MAP"]
    assert 0 <= found["HRS"] <= 1
    low, high = found.interval["wMAP"]
    assert low <= found["wMAP"] <= high
    assert len(found.winner) == len(context.queries)
    assert set(found.winner) <= {"clean", *results}
    assert found.reference["clean"] == clean["MAP"]


def test_an_attack_of_no_budget_changes_nothing(context):
    """F22 in small: at eps = 0 the attacked pipeline gives exactly the clean result."""
    attack = rh.attacks.mainstay(eps=0.0, steps=2)
    result, clean = score_attack(context, attack, attack_all(context, attack)), score_clean(context)
    assert torch.equal(result.per_query["MAP"], clean.per_query["MAP"])
    assert result["flips"] == 0
    assert result.perceptibility["linf/max"] == 0


def test_attacks_are_taken_as_recipes_write_them(victim, data):
    settings = {"name": "mainstay", "steps": 2}
    named, made = (
        rh.evaluate(victim, data, attack=each, queries=4) for each in (settings, rh.attacks.mainstay(steps=2))
    )
    assert named.values == made.values
    for wrong, said in (
        ("mainsty", "did you mean 'mainstay'"),
        ([settings], r"\[{'name': 'mainstay', 'steps': 2}\] is no attack; make one"),
        (rh.attacks.mainstay, "<function mainstay at .* is no attack; make one"),
    ):
        with pytest.raises((KeyError, ValueError), match=said):
            rh.evaluate(victim, data, attack=wrong)


def test_evaluate_in_one_call_gives_the_same(victim, data, context):
    attack = attacks()["mainstay"]
    alone = rh.evaluate(victim, data, attack=attack, batch_size=16)
    beside = score_attack(context, attack, attack_all(context, attack))
    assert alone["MAP"] == beside["MAP"]
    assert rh.evaluate(victim, data)["MAP"] == score_clean(context)["MAP"]


def test_block_size_does_not_matter_to_the_victim_in_double(victim, data):
    twin = rh.build_hasher(bits=16, image={"name": "small", "width": 8})
    twin.load_state_dict(victim.state_dict())
    whole, single = make_context(twin, data, batch_size=40), make_context(twin, data, batch_size=7)
    attack = attacks()["mainstay"]
    one = score_attack(whole, attack, attack_all(whole, attack))
    many = score_attack(single, attack, attack_all(single, attack))
    assert one["MAP"] == pytest.approx(many["MAP"], abs=0.01)  # float32 rounding may flip a bit near zero


def test_exact_selection_is_not_worse_than_the_last_point(context):
    chosen = rh.attacks.guided_apgd(eps=16 / 255, steps=12)
    last = replace(chosen, selects=False)
    assert (
        score_attack(context, chosen, attack_all(context, chosen))["MAP"]
        <= score_attack(context, last, attack_all(context, last))["MAP"] + 1e-12
    )


def test_targeted_results_carry_base_rate_representative_and_collateral(context):
    attack = rh.attacks.mainstay_targeted(eps=16 / 255, steps=5, step_size=8 / 255)
    result = score_attack(context, attack, attack_all(context, attack))
    assert {"t-MAP", "t-MAP/max", "t-MAP/8bit", "MAP", "gain"} <= set(result.values)
    assert result["t-MAP"] > result.reference["clean"]
    assert result["gain"] == pytest.approx(result["t-MAP"] - result.reference["clean"])
    assert "t-MAP" in result.representative
    assert (result.per_query["t-MAP/max"] >= result.per_query["t-MAP"] - 1e-12)[
        ~result.per_query["t-MAP"].isnan()
    ].all()
    assert result.empty == int((context.targets.sum((1, 2)) == 0).sum())


@pytest.fixture(scope="module")
def targeted(context) -> tuple[EvaluationContext, AttackedBlock, EvalResult]:
    """A bench whose queries 1 and 4 have every label, so no target; what a targeted attack came to; its
    result."""
    labels = context.queries.labels.clone()
    labels[[1, 4]] = 1
    context = replace(context, queries=replace(context.queries, labels=labels))
    attack = rh.attacks.mainstay_targeted(eps=16 / 255, steps=3, step_size=8 / 255)
    attacked = attack_all(context, attack)
    return context, attacked, score_attack(context, attack, attacked)


def test_targeted_values_are_means_over_the_targets_of_each_query(targeted):
    context, attacked, result = targeted
    asked = context.targets.sum((1, 2)) > 0
    rounds = [
        measure_codes(context, as_codes(attacked.signs[:, n]), context.targets[:, n]).per_query
        for n in range(3)
    ]
    stacked = torch.stack([each["MAP"] for each in rounds])[:, asked]
    assert result.empty == 2
    assert result.per_query["t-MAP"].isnan().tolist() == (~asked).tolist()
    assert torch.allclose(result.per_query["t-MAP"][asked], stacked.mean(0), atol=1e-12)
    assert torch.equal(result.per_query["t-MAP/max"][asked], stacked.amax(0))
    own = [
        measure_codes(context, as_codes(attacked.signs[:, n]), context.query_labels).per_query
        for n in range(3)
    ]
    expected = torch.stack([each["MAP"] for each in own]).mean(0)
    assert torch.allclose(result.per_query["MAP"][asked], expected[asked], atol=1e-12)
    clean = [
        measure_codes(context, context.query, context.targets[:, n]).per_query["MAP"][asked] for n in range(3)
    ]
    assert result.reference["clean"] == pytest.approx(float(torch.stack(clean).mean()))


def test_targeted_results_carry_the_curves_of_target_and_original_labels(targeted):
    context, attacked, result = targeted
    assert {"PR", "PR/radius", "P@N", "t-PR", "t-PR/radius", "t-P@N"} == set(result.curves)
    asked = torch.nonzero(context.targets.sum((1, 2)) > 0).flatten()
    database = context.database.signs().double()
    for name, labels in (
        ("t-P@N", context.targets),
        ("P@N", context.query_labels[:, None].expand(-1, 3, -1)),
    ):
        curve = result.curves[name]
        assert curve["n"].tolist() == [100.0 * step for step in range(1, len(database) // 100 + 1)]
        for place, cut in enumerate(curve["n"].tolist()):
            precisions = []
            for query in asked.tolist():
                for number in range(3):
                    distance = (database.shape[1] - database @ attacked.signs[query, number].double()) / 2
                    right = (context.database_labels * labels[query, number]).sum(1) > 0
                    last = distance.sort().values[int(cut) - 1]  # the distance that the cut falls into
                    inside, tied = distance < last, distance == last
                    share = (cut - int(inside.sum())) / int(tied.sum())
                    precisions.append((float(right[inside].sum()) + share * float(right[tied].sum())) / cut)
            assert float(curve["precision"][place]) == pytest.approx(sum(precisions) / len(precisions))
    rounds = [
        measure_codes(
            context.at(asked), as_codes(attacked.signs[asked, n]), context.targets[asked, n]
        ).curves["PR"]
        for n in range(3)
    ]
    expected = torch.stack([curve["precision"] for curve in rounds]).mean(0)
    assert torch.allclose(result.curves["t-PR"]["precision"], expected, atol=1e-12)


def test_one_target_of_each_query_is_the_first_of_three(victim, data, context):
    alone = make_context(victim, data, build("protocol", {"name": "house", "targets": 1}), batch_size=16)
    assert alone.targets.shape[1] == 1
    assert torch.equal(alone.targets, context.targets[:, :1])
    attack = rh.attacks.mainstay_targeted(eps=16 / 255, steps=2, step_size=8 / 255)
    result = score_attack(alone, attack, attack_all(alone, attack))
    assert result["t-MAP/max"] == result["t-MAP"]
    assert result.setting.protocol["targets"] == {"count": 1, "seed": 0}


def test_targets_are_disjoint_and_shared_by_all_attacks(context):
    own = context.query_labels[:, None]
    assert ((context.targets * own).sum(2) == 0).all()
    assert torch.equal(context.targets, make_context(context.victim, context.data).targets)


class Cheat(Search):
    """A search that leaves the ball."""

    def __call__(self, score, batch, threat, draws, select, start):
        inputs = {name: batch.inputs[name] + 0.5 for name in threat.balls}
        return SearchResult(inputs, torch.zeros(1), 1, 1)


class Lie(Search):
    """A search that returns NaN."""

    def __call__(self, score, batch, threat, draws, select, start):
        return SearchResult(
            {name: batch.inputs[name] * float("nan") for name in threat.balls}, torch.zeros(1), 1, 1
        )


def test_the_evaluator_projects_again_whatever_the_attack_returns(context, monkeypatch):
    monkeypatch.setattr(rh.Attack, "budget", property(lambda self: "cheating"))
    cheat = rh.Attack("cheat", Own(), Agreement(), Cheat(), image_threat(4 / 255, knowledge="W0"))
    result = score_attack(context, cheat, attack_all(context, cheat))
    assert result.perceptibility["linf/max"] <= 4 / 255 + 1e-6


def test_a_search_by_gradient_refuses_a_score_that_the_input_has_no_gradient_of():
    with pytest.raises(ValueError, match="no gradient reaches the image of this victim"):
        ascend(lambda inputs, _: (torch.zeros(2), torch.zeros(2, 4)), {"image": torch.zeros(2, 3, 8, 8)}, 0.0)


def test_a_nan_from_the_attack_is_an_error(context):
    lie = rh.Attack("lie", Own(), Agreement(), Lie(), image_threat(4 / 255, knowledge="W0"))
    with pytest.raises(ValueError, match="NaN"):
        attack_block(context, lie, 0)


def test_attacked_blocks_survive_a_file(context, tmp_path):
    block = attack_block(context, attacks()["hag"], 0)
    np.savez(tmp_path / "block.npz", **block.arrays())
    with np.load(tmp_path / "block.npz", allow_pickle=False) as arrays:
        again = AttackedBlock.from_arrays({name: arrays[name] for name in arrays.files})
    assert torch.equal(again.signs, block.signs)
    assert torch.equal(again.inputs, block.inputs)
    assert set(again.pixels) == set(block.pixels)


def test_blocks_that_name_their_8_bit_codes_eight_bit_are_read(context):
    block = attack_block(context, attacks()["hag"], 0)
    arrays = block.arrays()
    arrays["eight_bit"] = arrays.pop("codes_8bit")
    assert torch.equal(AttackedBlock.from_arrays(arrays).codes_8bit, block.codes_8bit)


def test_results_hold_the_matrix_norms_of_the_change(context):
    attack = attacks()["hag"]
    attacked = attack_all(context, attack)
    found = score_attack(context, attack, attacked).perceptibility
    clean = context.queries.batch(torch.arange(len(context.queries))).inputs["image"]
    delta = (attacked.inputs - clean).double().numpy()
    rows = np.abs(delta).sum(3).max(2).mean(1)
    spectral = np.linalg.svd(delta, compute_uv=False)[..., 0].mean(1)
    assert found["legacy_matrix_inf/mean"] == pytest.approx(rows.mean())
    assert found["legacy_matrix_inf/max"] == pytest.approx(rows.max())
    assert found["legacy_matrix_2/mean"] == pytest.approx(spectral.mean(), rel=1e-6)


def test_blocks_that_an_older_version_kept_join_with_new_ones(context):
    blocks = [attack_block(context, attacks()["hag"], number) for number in (0, 1)]
    older = replace(
        blocks[1], pixels={n: v for n, v in blocks[1].pixels.items() if not n.startswith("legacy")}
    )
    for pair in ([blocks[0], older], [older, blocks[0]]):
        joined = AttackedBlock.join(pair)
        assert set(joined.pixels) == set(older.pixels)
        assert all(len(values) == len(joined.signs) for values in joined.pixels.values())


def test_a_direction_that_the_victim_lacks_is_refused(victim, data):
    with pytest.raises(ValueError, match="T2I needs codes of texts, and this hasher reads images alone"):
        make_context(victim, data, direction=("text", "image"))


def test_the_query_limit_chooses_by_content(victim, data):
    short = make_context(victim, data, queries=10)
    chosen = stable_subset(data.query, 10)
    assert len(short.queries) == 10
    assert torch.equal(short.query_labels, data.query.labels[chosen])
    assert torch.equal(short.query.packed, make_context(victim, data).query.packed[chosen])
    with pytest.raises(ValueError, match="at least one query, got 0"):
        make_context(victim, data, queries=0)
