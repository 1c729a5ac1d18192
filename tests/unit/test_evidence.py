"""Evidence bundles: scored by us alone, refused with the name of what is wrong, able only to lower a
number."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import robusthash as rh
from robusthash.attacks.threat_model import edit_threat, image_threat, threat_on
from robusthash.evaluation import (
    EvaluationContext,
    make_context,
    score_attack,
    score_clean,
    worst,
)
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.evaluate import attack_all
from robusthash.metrics import EvalResult
from robusthash.models.encoding import weights_digest
from robusthash.robustness.evidence.verification import best_known, export, verify_bundle
from tests.helpers import make_data, small_hasher, trained_hasher

ATTACK = rh.attacks.mainstay(eps=16 / 255, steps=4, step_size=8 / 255)


@pytest.fixture(scope="module")
def context() -> EvaluationContext:
    data = make_data()
    return make_context(trained_hasher(data), data, batch_size=5)


@pytest.fixture(scope="module")
def attacked(context: EvaluationContext) -> AttackedBlock:
    return attack_all(context, ATTACK)


@pytest.fixture(scope="module")
def sent(
    context: EvaluationContext, attacked: AttackedBlock, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("evidence") / "whole"
    export(context, ATTACK.threat, attacked.inputs, folder, attack="mainstay", budget=ATTACK.budget)
    return folder


@pytest.fixture
def bundle(sent: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sent, tmp_path / "bundle"))


def rewrite(
    folder: Path, change: Callable[[dict], None] = lambda manifest: None, **arrays: np.ndarray
) -> None:
    """Change a bundle as its maker could: new arrays, new checksums, a new manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, values in arrays.items():
        path = folder / f"{name.replace('_', '-')}.npy"
        np.save(path, values)
        manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    change(manifest)
    manifest["files"]["ids.json"] = hashlib.sha256((folder / "ids.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def inputs_of(folder: Path) -> np.ndarray:
    return np.load(folder / "inputs.npy")


def test_a_bundle_scores_as_the_attack_did(context, attacked, sent):
    found, own = verify_bundle(sent, context), score_attack(context, ATTACK, attacked)
    for name in ("MAP", "MAP/8bit", "flips"):
        assert torch.equal(found.per_query[name], own.per_query[name])
    assert found.setting.threat == "img-linf-16"
    assert found.setting.attacks == ("mainstay",)
    assert not found.setting.differs(replace(own.setting, budget=found.setting.budget))
    manifest = json.loads((sent / "manifest.json").read_text())
    assert manifest["claimed"]["MAP"] == own["MAP"]
    assert manifest["weights"] == weights_digest(context.victim)
    assert inputs_of(sent).dtype == np.float32
    clean = context.queries.batch(torch.arange(len(context.queries))).inputs["image"]
    stored = torch.from_numpy(np.load(sent / "inputs-8bit.npy")).float() / 255
    assert (stored - clean).abs().max() <= 16 / 255 + 1e-6
    assert (stored - attacked.inputs).abs().max() < 1 / 255 + 1e-6


def test_the_queries_may_come_in_another_order(context, sent, bundle):
    order = np.random.default_rng(0).permutation(len(context.queries))
    ids = json.loads((bundle / "ids.json").read_text())
    (bundle / "ids.json").write_text(json.dumps([ids[i] for i in order]))
    rewrite(bundle, inputs=inputs_of(bundle)[order], inputs_8bit=np.load(bundle / "inputs-8bit.npy")[order])
    assert torch.equal(
        verify_bundle(bundle, context).per_query["MAP"], verify_bundle(sent, context).per_query["MAP"]
    )


def test_a_part_leaves_the_other_queries_clean_and_says_so(context, attacked, tmp_path):
    some = torch.tensor([7, 2, 4])
    export(context, ATTACK.threat, attacked.inputs[some], tmp_path / "part", positions=some)
    found, clean = verify_bundle(tmp_path / "part", context), score_clean(context)
    whole = score_attack(context, ATTACK, attacked)
    others = torch.ones(len(context.queries), dtype=torch.bool)
    others[some] = False
    assert torch.equal(found.per_query["MAP"][others], clean.per_query["MAP"][others])
    assert torch.equal(found.per_query["MAP"][some], whole.per_query["MAP"][some])
    assert any("3 of 12 queries are in the bundle" in note for note in found.notes)


def test_a_claim_that_does_not_hold_is_remarked_upon_and_does_not_count(context, sent, bundle):
    rewrite(bundle, lambda manifest: manifest["claimed"].update(MAP=0.0))
    found = verify_bundle(bundle, context)
    assert found["MAP"] == verify_bundle(sent, context)["MAP"]
    assert any("claims MAP 0.0000" in note for note in found.notes)


def test_best_known_is_the_lower_value_of_each_query_and_never_higher(context, attacked):
    own_attack = score_attack(context, ATTACK, attacked)
    clean = score_clean(context)
    # our own attack reached the even queries, the bundle the odd ones
    even = torch.arange(len(context.queries)) % 2 == 0
    ours = {
        n: torch.where(even, own_attack.per_query[n], clean.per_query["MAP"]) for n in ("MAP", "MAP/8bit")
    }
    theirs = {
        n: torch.where(even, clean.per_query["MAP"], own_attack.per_query[n]) for n in ("MAP", "MAP/8bit")
    }
    drop = clean.per_query["MAP"] - theirs["MAP"]
    others = {n: v for n, v in own_attack.per_query.items() if n.startswith("MAP@")}
    half = replace(own_attack, per_query={**own_attack.per_query, **ours})
    bundle = replace(own_attack, per_query={**others, **theirs, "drop": drop}, name="evidence ab")
    own = worst(context, clean, {"mainstay": half})
    known = best_known(own, {"evidence ab": bundle})
    full = worst(context, clean, {"mainstay": own_attack})
    assert torch.equal(known.per_query["wMAP"], full.per_query["wMAP"])
    assert known["wMAP"] == pytest.approx(full["wMAP"])
    assert known["HRS"] == pytest.approx(full["HRS"])
    assert known.interval["HRS"] == pytest.approx(full.interval["HRS"])
    assert known.reference["own"] == own["wMAP"] > known["wMAP"]
    assert {"evidence ab", "mainstay"} <= set(known.winner)
    assert "lowered by evidence ab" in known.notes
    assert best_known(own, {}) is own


def test_a_weak_bundle_changes_nothing(context, attacked):
    own = worst(context, score_clean(context), {"mainstay": score_attack(context, ATTACK, attacked)})
    idle = {**{n: torch.ones(12, dtype=torch.float64) for n in own.per_query}, "drop": torch.zeros(12)}
    weak = replace(own, per_query={n.removeprefix("w"): v for n, v in idle.items()}, values={"MAP": 1.0})
    known = best_known(own, {"evidence ab": weak})
    assert torch.equal(known.per_query["wMAP"], own.per_query["wMAP"])
    assert known.winner == own.winner
    assert "no bundle lowers our own value" in known.notes


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"threat": "img-linf-4"}, "threat"),
        ({"digests": {"queries": "xx", "database": "yy"}}, "digests.queries"),
    ],
)
def test_best_known_refuses_another_setting(context, attacked, change, field):
    result = score_attack(context, ATTACK, attacked)
    own = worst(context, score_clean(context), {"mainstay": result})
    with pytest.raises(ValueError, match=field):
        best_known(own, {"x": replace(result, setting=replace(result.setting, **change))})


def test_best_known_refuses_another_model(context, attacked):
    def of(result: EvalResult, model: str) -> EvalResult:
        return replace(
            result, setting=replace(result.setting, digests={**result.setting.digests, "model": model})
        )

    result = score_attack(context, ATTACK, attacked)
    own = worst(context, score_clean(context), {"mainstay": result})
    with pytest.raises(ValueError, match=r"digests\.model"):
        best_known(of(own, "a"), {"x": of(result, "b")})


# ---------------------------------------------------------------------------------------------- refusals


def refused(
    folder: Path, context: EvaluationContext, words: str, error: type[Exception] = ValueError
) -> None:
    with pytest.raises(error, match=words):
        verify_bundle(folder, context)


def test_inputs_that_leave_the_ball(context, bundle):
    moved = inputs_of(bundle)
    moved[3, 0, 0, 0] = moved[3, 0, 0, 0] + (0.2 if moved[3, 0, 0, 0] < 0.5 else -0.2)
    rewrite(bundle, inputs=moved)
    refused(
        bundle,
        context,
        r"inputs, rows 0 to 4: the attacked image is 0\.\d+ from its origin under linf, beyond",
    )


def test_a_ball_that_is_made_larger_is_another_threat(context, bundle):
    rewrite(bundle, lambda manifest: manifest["threat"].update(eps=32 / 255))
    refused(
        bundle,
        context,
        r"threat\.name 'img-linf-16' does not fit its numbers, which are those of 'img-linf-32'",
    )


def test_inputs_with_nan(context, bundle):
    spoiled = inputs_of(bundle)
    spoiled[1, 0, 0, 0] = np.nan
    rewrite(bundle, inputs=spoiled)
    refused(bundle, context, "NaN or infinite")


def test_inputs_outside_of_the_range(context, bundle):
    values = inputs_of(bundle)
    where = np.unravel_index(values.argmax(), values.shape)
    values[where] = 1.02
    rewrite(bundle, inputs=values)
    refused(bundle, context, "leaves the range|beyond")


def test_other_queries(context, bundle):
    ids = json.loads((bundle / "ids.json").read_text())
    (bundle / "ids.json").write_text(json.dumps([*ids[:-1], "0" * 16]))
    rewrite(bundle)
    refused(bundle, context, r"ids\.json: id '0{16}' \(row 11\) is none of our 12 queries")


def test_a_query_that_comes_twice(context, bundle):
    ids = json.loads((bundle / "ids.json").read_text())
    (bundle / "ids.json").write_text(json.dumps([*ids[:-1], ids[0]]))
    rewrite(bundle)
    refused(bundle, context, "comes too often")


def test_a_truncated_file(context, bundle):
    path = bundle / "inputs.npy"
    path.write_bytes(path.read_bytes()[:-100])
    refused(bundle, context, r"inputs\.npy is truncated or changed")


def test_truncation_that_the_checksum_covers(context, bundle):
    path = bundle / "inputs.npy"
    path.write_bytes(path.read_bytes()[:-100])
    rewrite(
        bundle, lambda m: m["files"].update({"inputs.npy": hashlib.sha256(path.read_bytes()).hexdigest()})
    )
    refused(bundle, context, r"inputs\.npy is truncated or no array")


def test_fewer_rows_than_ids(context, bundle):
    rewrite(bundle, inputs=inputs_of(bundle)[:-1])
    refused(bundle, context, r"inputs\.npy: shape \(11, .* for 12 ids")


def test_a_single_number_in_place_of_inputs(context, bundle):
    rewrite(bundle, inputs=inputs_of(bundle)[0, 0, 0, 0])
    refused(bundle, context, r"inputs\.npy: shape \(\) for 12 ids")


def test_a_missing_file(context, bundle):
    (bundle / "inputs.npy").unlink()
    refused(bundle, context, r"inputs\.npy is missing", FileNotFoundError)


def test_a_folder_that_is_no_bundle(context, tmp_path):
    refused(tmp_path, context, r"no manifest\.json", FileNotFoundError)


def test_other_weights(bundle):
    data = make_data()
    other = make_context(small_hasher(seed=5), data, batch_size=5)
    refused(bundle, other, r"weights is '\w+' and ours '\w+'; it was made for other weights")


def test_a_wrong_type(context, bundle):
    rewrite(bundle, inputs=inputs_of(bundle).astype(np.float64))
    refused(bundle, context, r"inputs\.npy: dtype is float64, and must be float32")


def test_a_wrong_shape(context, bundle):
    rewrite(bundle, inputs=inputs_of(bundle)[:, :, :6])
    refused(bundle, context, r"inputs are torch\.float32 \(3, 6, 12\)")


def test_an_8_bit_copy_of_something_else(context, bundle):
    rewrite(bundle, inputs_8bit=255 - np.load(bundle / "inputs-8bit.npy"))
    refused(bundle, context, "is not the 8-bit copy")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema="robusthash.evidence/9"), r"schema 'robusthash\.evidence/9' is not"),
        (lambda m: m.pop("schema"), "names no schema"),
        (lambda m: m.pop("bits"), "the field 'bits' is missing"),
        (lambda m: m.update(budgets="x"), "unknown field 'budgets'; did you mean 'budget'"),
        (lambda m: m["threat"].update(nrom="linf"), r"unknown field 'threat\.nrom'; did you mean 'norm'"),
        (lambda m: m["threat"].update(version=2), r"threat\.version 2"),
        (lambda m: m.update(bits=99), "bits is 99 and ours 8"),
        (lambda m: m.update(database="00"), "database is '00'"),
        (lambda m: m.update(direction=["text", "image"]), "direction is"),
        (lambda m: m.update(queries=5), "holds 12 ids, and the manifest says queries 5"),
        (lambda m: m["files"].pop("inputs.npy"), r"files lists no 'inputs\.npy'"),
    ],
)
def test_a_manifest_that_says_something_else(context, bundle, change, words):
    rewrite(bundle, change)
    refused(bundle, context, words)


def test_a_manifest_that_is_no_json(context, bundle):
    (bundle / "manifest.json").write_text("{")
    refused(bundle, context, "is not JSON")


def test_export_refuses_what_verify_would(context, attacked, sent, tmp_path):
    inputs = attacked.inputs
    with pytest.raises(ValueError, match="beyond"):
        export(context, image_threat(4 / 255), inputs, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileExistsError, match="not empty"):
        export(context, ATTACK.threat, inputs, sent)
    with pytest.raises(ValueError, match="queries of 'image' alone"):
        export(context, threat_on("both"), inputs, tmp_path / "b")
    with pytest.raises(ValueError, match="queries of 'image' alone"):
        export(context, edit_threat(), inputs, tmp_path / "c")
    with pytest.raises(ValueError, match="12 inputs for 2 positions"):
        export(context, ATTACK.threat, inputs, tmp_path / "d", positions=torch.tensor([0, 1]))


def test_weights_digest_tells_any_change():
    one, other = small_hasher(seed=1), small_hasher(seed=1)
    assert weights_digest(one) == weights_digest(other)
    parameter: Tensor = next(other.parameters())
    with torch.no_grad():
        parameter.add_(1e-6)
    assert weights_digest(one) != weights_digest(other)
    assert weights_digest(torch.nn.Identity()) == "none"
