"""Values of a recipe: numbers in base ten, types without conversion, bounds, and hints to the right section."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import robusthash as rh
from robusthash.apps.cli import app
from robusthash.apps.commands.terminal import print_headlines
from robusthash.apps.experiment.config import ConfigError, load_config
from robusthash.core.limited_files import parse_yaml
from robusthash.core.runtime import choose_device
from robusthash.training.loop import Schedule, TrainConfig


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "plain.yaml"
    path.write_text("data: {name: synthetic, size: 16}\ntraining: {epochs: 1}\n")
    return path


@pytest.mark.parametrize("text", ["010", "-010", "00", "0x10", "0b1", "1:30", "190:20:30", "1:30.5", "0_10"])
def test_numbers_in_another_base_than_ten_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"it: numbers are decimal, .*, got .*; write .* for a text"):
        parse_yaml(f"{{a: {text}}}", "it")
    assert parse_yaml(f"{{a: '{text}'}}", "it") == {"a": text}


def test_decimal_numbers_are_read_as_ever() -> None:
    texts = {"0": 0, "10": 10, "-5": -5, "+5": 5, "1_000": 1000, "1.5e+3": 1500.0, ".5": 0.5, "08": "08"}
    assert parse_yaml(str(list(texts)).replace("'", ""), "it") == list(texts.values())


def test_a_number_of_a_file_is_refused_with_its_line(recipe: Path) -> None:
    recipe.write_text("data: synthetic\ntraining: {epochs: 010}\n")
    with pytest.raises(ConfigError, match=r"plain\.yaml: line 2: numbers are decimal, .* got 010; write 10"):
        load_config(recipe)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.epochs=010", "--set training.epochs: numbers are decimal"),
        ("training.epochs=true", "training.epochs: must be a whole number, got True"),
        ("training.batch_size=true", "training.batch_size: must be a whole number"),
        ("training.clip=true", "training.clip: must be a finite number"),
        ("training.optim.hasher.lr=true", "lr must be a finite number, got True"),
        ("training.optim.hasher.frozen_epochs=true", "frozen_epochs must be a whole number"),
        ("training.schedule.at=[true]", "at must be a list, each item a finite number"),
        ("training.schedule.at=[2]", "at holds shares .* from 0 to 1"),
        ("training.schedule.at=[0.5,-1]", "at holds shares .* from 0 to 1"),
        ("training.schedule.gamma=-1", "gamma must be above 0"),
        ("training.schedule.gamma=0", "gamma must be above 0"),
        ("training.schedule.gamma=.nan", "gamma must be a finite number"),
        ("runtime.seed=true", "runtime.seed: must be a whole number"),
        ("runtime.seed=99999999999999999999", "runtime.seed: is too large"),
        ("runtime.seed=9223372036854775808", "runtime.seed: is too large"),
        ("runtime.compile=1", "runtime.compile: must be true or false"),
        ("evaluation.seed=-1", "evaluation.seed: .*0"),
        ("evaluation.seed=1e22", "evaluation.seed: must be a whole number"),
        ("evaluation.queries=true", "evaluation.queries: must be a whole number"),
        ("evaluation.queries=1e3", r"evaluation.queries: must be a whole number or null, got 1000\.0"),
        ("data.train=1e2", r"train of data 'synthetic' must be a whole number, got 100\.0"),
        (f"data.train={'9' * 400}", "train of data 'synthetic' is too large"),
        ("evaluation.relevance=[]", "evaluation.relevance: names none"),
        ("seed=1", "unknown key 'seed'; did you mean 'runtime.seed' or"),
        ("training.seed=1", "unknown key 'training.seed'; did you mean 'runtime.seed' or"),
        ("epochs=3", r"unknown key 'epochs'; did you mean 'training\.epochs'"),
    ],
)
def test_a_value_is_refused_in_a_line_that_names_its_key(recipe: Path, setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(recipe, [setting])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_values_of_their_type_are_taken(recipe: Path) -> None:
    sets = ["training.optim.hasher.lr=1e-2", "training.clip=1/2", "training.schedule.at=[0,1]"]
    config = load_config(recipe, [*sets, "evaluation.queries=20", f"runtime.seed={2**63 - 1}"])
    assert (config.training.optim["hasher"].lr, config.training.clip) == (0.01, 0.5)
    assert config.training.schedule.at == (0.0, 1.0)
    assert config.runtime.seed == 2**63 - 1


def test_the_loop_refuses_them_too() -> None:
    with pytest.raises(ValueError, match="gamma"):
        Schedule(gamma=float("inf"))
    with pytest.raises(ValueError, match="seed must be at least 0"):
        TrainConfig(seed=-1)


def test_a_device_that_holds_no_numbers_is_refused() -> None:
    with pytest.raises(
        ValueError, match="device 'meta' is not usable here: it holds no numbers; try --device"
    ):
        choose_device("meta")


@pytest.mark.parametrize("bits", ["16", 16.0, True])
def test_bits_of_codes_are_a_whole_number(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be a whole number, got"):
        rh.Codes.from_numpy(np.ones((2, 16), int), bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [5, None, (1, 2, 3), "ab"])
def test_bounds_are_two_numbers(bounds: object) -> None:
    with pytest.raises(ValueError, match="bounds are the least and the largest pixel"):
        rh.wrap(torch.nn.Flatten(), bits=16, bounds=bounds)  # type: ignore[arg-type]


def test_list_takes_the_plural() -> None:
    one, several = (CliRunner().invoke(app, ["list", kind, "--json"]) for kind in ("attack", "attacks"))
    assert one.stdout == several.stdout != ""
    assert several.exit_code == 0


def test_notes_on_measures_that_are_not_shown_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    victim = rh.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 16)), bits=16)
    result = rh.evaluate(victim, rh.load_data("synthetic", size=16, query=8))
    own = "the 5 steps of pgd reach 0.02 of the budget"
    notes = ("MAP@5000: k clipped to the 300 items of the database", "ACG@500 is undefined: nothing", own)
    print_headlines({"clean": replace(result, notes=notes)})
    said = capsys.readouterr().err
    assert "notes on MAP@5000 and ACG@500: in --json" in said
    assert own in said
    assert "clipped" not in said
