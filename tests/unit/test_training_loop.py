"""Sums of gradients over batches, half precision, compiled encoders, and checkpoints inside an epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Interrupted, MemoryLog, make_data, small_hasher, train_config

from robusthash.core.registry import build, catalogue
from robusthash.models import build_hasher
from robusthash.objectives import CSQ
from robusthash.training import HashingRecipe, OptimConfig, TrainConfig, fit
from robusthash.training.shallow_recipe import ShallowRecipe


def trained(**options: object) -> dict[str, torch.Tensor]:
    hasher = small_hasher()
    optim = {"hasher": OptimConfig("sgd", 0.05, momentum=0.9, weight_decay=0.0)}
    config = TrainConfig(epochs=2, optim=optim, batchnorm="frozen", device="cpu")
    fit(HashingRecipe(hasher, CSQ()), make_data(train=40), replace(config, **options))
    return hasher.state_dict()


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_gradients_of_two_batches_make_the_step_of_one_twice_as_large(clip: float) -> None:
    """40 items are two and a half batches of 16: the last step is made of one batch of 8, alone."""
    whole = trained(batch_size=16, clip=clip)
    halves = trained(batch_size=8, accumulate=2, clip=clip)
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-4, atol=1e-6, msg=name)
    apart = trained(batch_size=8, clip=clip)
    assert any(not torch.allclose(apart[name], value, atol=1e-4) for name, value in whole.items())


def test_half_precision_learns_close_to_full() -> None:
    """fp16 with its scaler, which would lose small gradients without: near float32, not equal."""
    full, half = trained(batch_size=16), trained(batch_size=16, precision="fp16")
    for name, value in full.items():
        assert torch.isfinite(half[name]).all()
        torch.testing.assert_close(half[name], value, rtol=0.05, atol=0.01, msg=name)
    assert any(not torch.equal(half[name], value) for name, value in full.items())


def test_compiled_encoders_train_to_the_same_weights_under_the_same_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    compiled = torch.nn.Module.compile

    def counted(module: torch.nn.Module) -> None:
        calls.append(module)
        compiled(module, backend="eager")  # traced by torch.compile, without the minutes of a C++ compiler

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    plain, traced = trained(batch_size=16), trained(batch_size=16, compile=True)
    assert len(calls) == 1
    assert plain.keys() == traced.keys()
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-6)


def test_checkpoints_inside_an_epoch_wait_until_gradients_are_used() -> None:
    class Log(MemoryLog):
        def checkpoint(self, state: dict) -> None:
            places.append((state["epoch"], state["step"]))
            super().checkpoint(state)

    places: list[tuple[int, int]] = []
    config = replace(train_config(2), batch_size=8, accumulate=2, checkpoint_minutes=1e-9)
    fit(HashingRecipe(small_hasher(), CSQ()), make_data(train=40), config, Log())
    assert places == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]


def test_a_checkpoint_of_an_earlier_version_goes_on_from_its_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def recipe() -> HashingRecipe:
        return HashingRecipe(small_hasher(), CSQ())

    whole = MemoryLog()
    fit(recipe(), make_data(), train_config(2), whole)

    class Earlier(MemoryLog):
        def resume(self) -> dict | None:
            state = super().resume()
            new = ("step", "seconds", "sums", "figures", "scaler")
            return state and {key: value for key, value in state.items() if key not in new}

    stopped = Earlier(stop_after=1)
    with pytest.raises(Interrupted):
        fit(recipe(), make_data(), train_config(2), stopped)
    stopped.stop_after = None
    with caplog.at_level("INFO"):
        fit(recipe(), make_data(), train_config(2), stopped)
    assert "goes on from epoch 2 of 2" in caplog.text
    last = [
        {key: value for key, value in log.lines[-1].items() if key != "seconds"} for log in (whole, stopped)
    ]
    assert last[0] == last[1]


def test_training_items_without_any_label_are_refused_by_what_learns_from_labels() -> None:
    data = make_data()
    assert data.train.labels is not None
    bare = replace(data, train=replace(data.train, labels=torch.zeros_like(data.train.labels)))
    for name in [card.name for card in catalogue("objective") if card.supervised]:
        recipe = HashingRecipe(small_hasher(), build("objective", name))
        with pytest.raises(
            ValueError, match=f"^{name} learns from labels, and none of the 48 training items has one; label"
        ):
            fit(recipe, bare, train_config(epochs=1))


@pytest.mark.parametrize("items", [48, 1])
def test_training_items_with_the_same_labels_are_refused_by_what_learns_from_labels(items: int) -> None:
    train = make_data().train.take(torch.arange(items))
    assert train.labels is not None
    data = replace(make_data(), train=replace(train, labels=train.labels[:1].repeat(items, 1)))
    for name in [card.name for card in catalogue("objective") if card.supervised]:
        recipe = HashingRecipe(small_hasher(), build("objective", name))
        said = (
            f"^{name} learns from labels, and all {items} training items have the same, so there is no pair"
        )
        with pytest.raises(ValueError, match=said):
            fit(recipe, data, train_config(epochs=1))


def test_a_method_that_needs_no_labels_is_solved_on_items_of_one_class() -> None:
    data = make_data()
    assert data.train.labels is not None
    one = torch.eye(3)[torch.zeros(len(data.train), dtype=torch.int64)]
    hasher = build_hasher(bits=8, image={"name": "features", "inputs": 3 * 12 * 12}, head="linear")
    recipe = ShallowRecipe(hasher, CSQ(), "itq")
    assert len(fit(recipe, replace(data, train=replace(data.train, labels=one)), train_config(1))) == 1


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        TrainConfig(accumulate=0)
    with pytest.raises(ValueError, match="checkpoint_minutes must be at least 0 and finite, got -1"):
        TrainConfig(checkpoint_minutes=-1)
