"""Learning-rate factors, and settings of training that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robusthash.training import OptimConfig, Schedule, TrainConfig


def test_constant() -> None:
    assert {Schedule("constant").factor(progress) for progress in (0.0, 0.3, 0.999)} == {1.0}


def test_cosine_falls_from_one_to_zero() -> None:
    schedule = Schedule()
    assert schedule.kind == "cosine"
    assert schedule.factor(0.0) == 1.0
    assert schedule.factor(0.5) == pytest.approx(0.5)
    assert schedule.factor(0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule.factor(1.0) == pytest.approx(0.0)
    factors = [schedule.factor(step / 50) for step in range(50)]
    assert factors == sorted(factors, reverse=True)


def test_steps_fall_by_gamma_at_each_share() -> None:
    schedule = Schedule("steps", at=(0.5, 0.75), gamma=0.1)
    assert schedule.factor(0.0) == schedule.factor(0.499) == 1.0
    assert schedule.factor(0.5) == schedule.factor(0.749) == pytest.approx(0.1)
    assert schedule.factor(0.75) == schedule.factor(0.999) == pytest.approx(0.01)
    assert Schedule("steps", at=(1 / 3, 2 / 3), gamma=0.5).factor(0.7) == pytest.approx(0.25)


def test_exponential_falls_smoothly_to_gamma() -> None:
    """DSARH's 0.9 an outer iteration, over ten of them."""
    schedule = Schedule("exponential", gamma=0.9**10)
    assert schedule.factor(0.0) == 1.0
    assert [schedule.factor(epoch / 10) for epoch in range(10)] == pytest.approx(
        [0.9**epoch for epoch in range(10)]
    )


@pytest.mark.parametrize("kind", ["constant", "cosine", "steps", "exponential"])
def test_warmup_rises_and_meets_the_schedule(kind: str) -> None:
    schedule = Schedule(kind, warmup=0.2)  # type: ignore[arg-type]
    factors = [schedule.factor(step / 100) for step in range(21)]
    assert 0 < factors[0] < 0.01  # the first step moves a little, too
    assert factors == sorted(factors)
    assert factors[10] == pytest.approx(0.5, abs=0.01)
    assert factors[20] == pytest.approx(1.0)
    assert max(schedule.factor(step / 10_000) for step in range(10_000)) <= 1.0


def test_factor_is_a_function_of_progress_alone() -> None:
    """So a resumed run has the rates of an uninterrupted one."""
    schedule = Schedule("cosine", warmup=0.1)
    forwards = [schedule.factor(step / 10) for step in range(10)]
    backwards = [schedule.factor(step / 10) for step in reversed(range(10))]
    assert forwards == backwards[::-1]


def test_optimisers_are_what_they_are_called() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    sgd = OptimConfig("sgd", 0.1, 0.8, 1e-3).make(parameters)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.1, 0.8, 1e-3)
    adam, adamw = (OptimConfig(name, 0.1, 0.5, 0.0).make(parameters) for name in ("adam", "adamw"))
    assert type(adam) is torch.optim.Adam
    assert type(adamw) is torch.optim.AdamW
    assert adam.defaults["betas"] == (0.5, 0.999)


def test_settings_that_mean_nothing_are_refused() -> None:
    for make, said in [
        (lambda: OptimConfig("lion"), "'lion'"),  # type: ignore[arg-type]
        (lambda: Schedule("linear"), "'linear'"),  # type: ignore[arg-type]
        (lambda: TrainConfig(augment="mixup"), "'mixup'"),  # type: ignore[arg-type]
        (lambda: TrainConfig(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: TrainConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: TrainConfig(epochs=1.5), "epochs must be a whole number, got 1.5"),  # type: ignore[arg-type]
        (lambda: TrainConfig(epochs="2"), "epochs must be a whole number, got '2'"),  # type: ignore[arg-type]
        (lambda: OptimConfig(lr="0.1"), "lr must be a finite number, got '0.1'"),  # type: ignore[arg-type]
        (lambda: OptimConfig(lr=1e38), "lr must be at least 0 and below"),
        (lambda: Schedule(at=(0.5, "1")), "at must be a list, .* got"),  # type: ignore[arg-type]
        (
            lambda: TrainConfig(optim={"hasher": {"lr": 0.1}}),  # type: ignore[dict-item]
            r"optim\['hasher'\] must be an OptimConfig\(lr=...\), got {'lr': 0.1}",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            make()
    assert TrainConfig(epochs=np.int64(3), checkpoint_minutes=1).epochs == 3  # type: ignore[arg-type]
