"""Random victims: evaluate and the worst case average over draws of the noise, as suites do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robusthash as rh
from robusthash.data import load_data
from robusthash.evaluation import make_context, score_attack, score_clean, worst
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.code_measures import as_codes, mean_ap, measure_codes
from robusthash.evaluation.evaluate import attack_all
from robusthash.metrics.results import load_results, save_results
from robusthash.models.hasher import Hasher
from robusthash.robustness.assess import assess
from robusthash.robustness.suite import Suite


class Noisy(nn.Module):
    """An encoder behind fresh noise."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.width = inner, inner.width

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.2 * torch.randn_like(x))


def test_the_worst_case_of_a_random_victim_is_no_least_of_noisy_looks() -> None:
    """Six attacks that may change nothing: the worst case is the clean value, as ``assess`` has it."""
    data = load_data("synthetic", query=40, train=40, database=80, size=16, texts=False, multilabel=False)
    whole = rh.build_hasher(image={"name": "small", "width": 4}, bits=16)
    noisy = Hasher(
        {"image": Noisy(whole.encoders["image"])}, {"image": whole.heads["image"]}, declared="randomised"
    )
    context = make_context(noisy, data)
    idle = {f"idle {n}": replace(rh.attacks.mainstay(eps=0.0, steps=1), name=f"idle {n}") for n in range(6)}
    clean = score_clean(context)
    results = {n: score_attack(context, attack, attack_all(context, attack)) for n, attack in idle.items()}
    found = worst(context, clean, results)
    low, high = clean.interval["MAP"]
    assert low < found["wMAP"] < high
    looks = [
        measure_codes(context, as_codes(codes), context.query_labels) for codes in context.clean_noise[0, :7]
    ]
    least = torch.stack([look.per_query["MAP"] for look in looks]).amin(0).mean()
    assert least < low, "the least of seven looks, which the worst case was, lies below the interval"
    assert clean["MAP"] == pytest.approx(float(mean_ap(context, context.clean_noise[1])["MAP"].mean()))
    assert results["idle 0"].reference["clean"] == clean["MAP"] == found.reference["clean"]
    assert abs(results["idle 0"]["drop"]) < 0.05
    assert any("means over 20 fresh draws" in note for note in found.notes)
    again = rh.evaluate(noisy, data, attack=idle["idle 0"], database=context.database)
    assert again["MAP"] == results["idle 0"]["MAP"], "Python's short way gives the same number"
    suite = Suite("idle", tuple(GradientAttack(name, attack) for name, attack in idle.items()))
    assert assess(context, suite)["wMAP"] == pytest.approx(found["wMAP"], abs=1e-12)
    with pytest.raises(ValueError, match="'idle 0' was scored on one draw of its noise"):
        worst(context, clean, {"idle 0": replace(results["idle 0"], selection={})})


def test_a_suite_with_unchanged_worst_inputs_is_saved(tmp_path: Path) -> None:
    """Their PSNR is infinite, and an interval of NaN ended the suite at its last line."""
    data = load_data("synthetic", query=40, train=40, database=80, size=16, texts=False, multilabel=False)
    whole = rh.build_hasher(image={"name": "small", "width": 4}, bits=16)
    still = Hasher(
        {"image": Noisy(whole.encoders["image"])}, {"image": whole.heads["image"]}, declared="randomised"
    )
    attack = rh.attacks.guided_apgd(eps=0.0, steps=2)
    some = rh.attacks.mainstay(eps=8 / 255, steps=8)
    suite = Suite("still", (GradientAttack("idle", attack), GradientAttack("moved", some)))
    result = assess(make_context(still, data), suite)
    assert result.per_query["psnr"].isinf().any()
    low, high = result.interval["psnr"]
    assert 0 < low <= high < float("inf")
    count = int(result.per_query["psnr"].isinf().sum())
    assert any(note.startswith(f"{count} worst inputs are as the clean ones") for note in result.notes)
    save_results(tmp_path / "assess.json", [result])
    assert load_results(tmp_path / "assess.json")[0].interval["psnr"] == (low, high)
