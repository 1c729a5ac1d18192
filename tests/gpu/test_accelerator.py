"""What a CUDA device must give: the codes of the CPU, training in each precision, resuming to the same bits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from contract.test_recipes import make_recipe
from helpers import Interrupted, MemoryLog, make_data, small_hasher, train_config, trained_hasher

from robusthash.core.out_of_memory import halving
from robusthash.evaluation import make_context
from robusthash.models.encoding import encode_signs
from robusthash.robustness.assess import assess
from robusthash.training import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_codes_are_those_of_the_cpu_but_for_logits_near_zero() -> None:
    data = make_data(query=64)
    victim = trained_hasher(data)
    images = data.query.batch(torch.arange(64)).inputs["image"]
    with torch.no_grad():
        logits = victim({"image": images})["image"].logits
    here, there = encode_signs(victim, "image", images), encode_signs(victim.cuda(), "image", images.cuda())
    assert there.device.type == "cpu"
    assert bool((logits[here != there].abs() < 1e-3).all())


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_saat_learns_in_each_precision(precision: str) -> None:
    recipe = make_recipe("saat", small_hasher())
    first, *_, last = fit(
        recipe, make_data(), replace(train_config(5, lr=0.03), device="cuda", precision=precision)
    )
    total = [sum(v for n, v in line.items() if "/" in n or n == "adversarial") for line in (first, last)]
    assert total[1] < total[0]
    assert recipe.hasher.device.type == "cuda"


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_resumed_training_ends_with_the_same_bits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = replace(train_config(3), device="cuda", precision=precision, checkpoint_minutes=1e-9)
    whole, resumed = (make_recipe("saat", small_hasher()) for _ in range(2))
    fit(whole, make_data(), config)
    log = MemoryLog((1, 2))
    with pytest.raises(Interrupted):
        fit(make_recipe("saat", small_hasher()), make_data(), config, log)
    log.stop_after = None
    fit(resumed, make_data(), config, log)
    for name, value in whole.hasher.state_dict().items():
        assert torch.equal(value, resumed.hasher.state_dict()[name]), name


def test_a_suite_gives_nearly_the_scores_of_the_cpu() -> None:
    data = make_data()
    victim = trained_hasher(data)
    results = [
        assess(make_context(copy.deepcopy(victim).to(place), data, batch_size=8), "smoke", queries=8)
        for place in ("cpu", "cuda")
    ]
    here, there = (result.per_query["wMAP"].nan_to_num() for result in results)
    assert float((here.mean() - there.mean()).abs()) < 0.05  # an attack steps by signs, which rounding turns


def test_memory_that_runs_out_halves_the_batch() -> None:
    free = torch.cuda.mem_get_info()[0]
    said: list[str] = []

    def work(size: int) -> int:
        return torch.empty(size * (free // 3), dtype=torch.uint8, device="cuda").numel()

    _, fitted = halving(work, 8, "queries", "attacked", said.append)
    assert fitted in (1, 2)
    assert len(said) >= 2
