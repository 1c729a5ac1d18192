"""The training log in TensorBoard's event files, and in the calls of Weights & Biases."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.config import Config, ConfigError, make_config
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.training_trackers import TensorBoard, check_trackers

RECIPE = {
    "name": "toy",
    "data": {"name": "synthetic", "train": 16, "query": 8, "database": 16, "size": 12, "texts": False},
    "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2},
}


def recipe(*loggers: str) -> Config:
    return make_config({**RECIPE, "runtime": {"loggers": list(loggers)}})


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard reads them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_numbers_of_the_log(tmp_path: Path) -> None:
    run = training_stages.train(recipe("tensorboard"), tmp_path)
    assert run.id == recipe().model_id(), "loggers are no part of a run's identity"
    read = events(run.path / "tensorboard")
    assert set(read) == {"lr", "seconds", "loss/total", "loss/similarity", "loss/regularisation"}
    for line in run.lines():
        step, value = read["loss/similarity"][line["epoch"]]
        assert (step, value) == (line["epoch"] + 1, pytest.approx(line["similarity"]))
    assert read["loss/total"][1][1] == pytest.approx(
        read["loss/similarity"][1][1] + read["loss/regularisation"][1][1]
    )


def test_an_epoch_trained_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = Run(tmp_path, recipe("tensorboard"))
    first = TensorBoard(run)
    for epoch in (1, 2, 3):
        first.log(epoch, {"lr": 0.1 * epoch})
    first.close()
    again = TensorBoard(run)  # killed before the checkpoint of epoch 3
    again.log(3, {"lr": 9.0})
    again.close()
    assert [step for step, _ in events(tmp_path / "tensorboard")["lr"]] == [1, 2, 3]
    assert events(tmp_path / "tensorboard")["lr"][-1][1] == 9.0


class Session:
    """The calls of ``wandb.Run`` that are used; ``fails`` at this step."""

    def __init__(self, fails: int | None = None) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished, self.fails = False, fails

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.fails:
            raise ConnectionError("the network is gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def stand_in(monkeypatch: pytest.MonkeyPatch, session: Session | Exception) -> list[dict[str, Any]]:
    module, started = types.ModuleType("wandb"), []
    module.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]

    def init(**options: Any) -> Session:
        if isinstance(session, Exception):
            raise session
        started.append(options)
        return session

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return started


def test_wandb_gets_config_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    started = stand_in(monkeypatch, session)
    run = training_stages.train(recipe("wandb"), tmp_path)
    (options,) = started
    assert (options["project"], options["id"], options["resume"]) == ("robusthash", run.id, "allow")
    assert options["config"]["hasher"]["bits"] == 8
    assert [step for step, _ in session.logged] == [1, 2]
    assert session.logged[1][1]["loss/similarity"] == run.lines()[1]["similarity"]
    assert session.finished


def test_a_logger_that_fails_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, Session(fails=1))
    with caplog.at_level(logging.WARNING):
        run = training_stages.train(recipe("wandb"), tmp_path)
    assert run.trained
    assert len(run.lines()) == 2
    assert caplog.text.count("wandb gets no more lines: the network is gone") == 1


def test_what_cannot_start_is_said_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, RuntimeError("no API key"))
    with pytest.raises(ConfigError, match="wandb does not start: no API key"):
        training_stages.train(recipe("wandb"), tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'robusthash\[wandb\]'"):
        check_trackers(["wandb"])
    with pytest.raises(ConfigError, match=r"runtime\.loggers.*'tensorboard' or 'wandb'"):
        recipe("mlflow")
