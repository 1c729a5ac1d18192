"""Per-query values in 16 bits: how far they move, what stays exact, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robusthash.metrics.results import (
    EvalResult,
    Setting,
    load_results,
    pack_values,
    save_results,
    unpack_values,
)


def test_values_move_by_half_a_step_at_most_and_ends_stay() -> None:
    drawn = np.random.default_rng(0)
    arrays = {
        "ap": np.concatenate([drawn.random(500), [0.0, 1.0, np.nan]]),
        "acg": 3.7 * drawn.random(40),
        "none": np.full(3, np.nan),
        "empty": np.zeros(0),
    }
    found = unpack_values(pack_values(arrays))
    assert list(found) == list(arrays)
    assert np.nanmax(np.abs(found["ap"] - arrays["ap"])) <= 0.5 / 65_534 + 1e-12
    assert np.nanmax(np.abs(found["acg"] - arrays["acg"])) <= 0.5 * 4 / 65_534 + 1e-12
    assert found["ap"][-3:-1].tolist() == [0.0, 1.0]
    for name, values in arrays.items():
        assert np.array_equal(np.isnan(found[name]), np.isnan(values))
        assert found[name].dtype == np.float64
    assert unpack_values(pack_values({})) == {}


def test_packed_twice_is_packed_once() -> None:
    once = unpack_values(pack_values({"ap": np.random.default_rng(1).random(200)}))
    assert np.array_equal(unpack_values(pack_values(once))["ap"], once["ap"])


@pytest.mark.parametrize("value", [-0.1, float("inf")])
def test_what_has_no_step_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="drop holds a negative or infinite value"):
        pack_values({"drop": np.array([0.5, value])})


def test_packed_results_are_read_as_others_are(tmp_path: Path) -> None:
    setting = Setting("model", "data", "queries", {"k": None}, "I2I", 8)
    ap, curve = torch.rand(100, dtype=torch.float64), {"eps": torch.tensor([0.0, 8 / 255])}
    result = EvalResult(
        setting, {"MAP": float(ap.mean())}, {"MAP": ap}, curves={"wMAP/eps": curve}, name="clean"
    )
    for name, packed in (("plain", False), ("packed", True)):
        save_results(tmp_path / f"{name}.json", [result, result], packed)
        for found in load_results(tmp_path / f"{name}.json"):
            assert found.values == result.values
            assert torch.equal(found.curves["wMAP/eps"]["eps"], curve["eps"])
            assert torch.allclose(found.per_query["MAP"], ap, atol=1e-5 if packed else 0.0, rtol=0.0)
    sizes = [next(tmp_path.glob(f"{name}-*.npz")).stat().st_size for name in ("packed", "plain")]
    assert sizes[0] < sizes[1]
