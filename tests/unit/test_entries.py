"""Registry entries: every fault of a file is named, and a claim is held against a run of its own tier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from robusthash.metrics import EvalResult
from robusthash.metrics.results import Flag, Setting
from robusthash.robustness.evidence.records import (
    RegistryEntry,
    entry_text,
    load_any_entry,
    load_entry,
    verify,
)

REGISTRY = Path(__file__).parents[2] / "registry"
PLAIN = {
    "schema": "robusthash.entry/1",
    "id": "tiny-seed0",
    "source": {"recipe": "tiny.yaml", "seed": 0},
    "data": "synthetic",
    "input_size": [12, 12],
    "bits": 12,
    "defense": "plain",
    "restrictions": {
        "gradients": True,
        "deterministic": True,
        "no_inner_optimisation": True,
        "static_database": True,
    },
    "claimed": {"threat": "img-linf-8", "queries": 4, "clean": 0.8, "worst": 0.2},
    "best_known": {"value": 0.2, "source": "own"},
}


def entry(**changes: object) -> RegistryEntry:
    return RegistryEntry.model_validate({**{k: v for k, v in PLAIN.items() if k != "schema"}, **changes})


def results(
    clean: float = 0.8, worst: float = 0.2, bits: int = 12, **changes: object
) -> dict[str, EvalResult]:
    setting = Setting(
        "m", "s", "s", {"k": None}, "I2I", bits, "img-linf-8", digests={"model": "aa"}, defense="plain"
    )
    made = {}
    for name, measure, value in (("clean", "MAP", clean), ("worst", "wMAP", worst)):
        per_query = {measure: torch.full((4,), value, dtype=torch.float64)}
        made[name] = EvalResult(replace(setting, **changes), {measure: value}, per_query)  # type: ignore[arg-type]
    return made


def write(folder: Path, **changes: object) -> Path:
    plain = {**PLAIN, **changes}
    path = folder / "tiny-seed0.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in plain.items() if value is not None}))
    return path


def test_an_entry_survives_its_file(tmp_path):
    read = load_entry(write(tmp_path))
    (tmp_path / "tiny-seed0.yaml").write_text(entry_text(read))
    assert load_entry(tmp_path / "tiny-seed0.yaml") == read == entry()


def test_the_entries_of_the_registry_are_whole_and_name_recipes_that_exist():
    entries = [load_any_entry(path) for path in REGISTRY.glob("*.yaml")]
    trained = [held for held in entries if isinstance(held, RegistryEntry)]
    assert len(trained) >= 4
    for held in trained:
        assert (REGISTRY.parent / held.source.recipe).is_file()
        assert held.source.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": None}, "names no schema"),
        ({"schema": "robusthash.entry/7"}, "schema 'robusthash.entry/7' is not"),
        ({"bits": None}, "the field 'bits' is missing"),
        ({"bits": 0}, "bits: Input should be greater"),
        ({"defence": "plain"}, "unknown field 'defence'; did you mean 'defense'"),
        ({"defense": "magic"}, r"defense: Input should be 'plain', 'adversarial'.* \(got 'magic'\)"),
        (
            {"source": {"recipe": "tiny.yaml", "sede": 0}},
            r"unknown field 'source\.sede'; did you mean 'seed'",
        ),
        ({"claimed": {**PLAIN["claimed"], "worst": 0.9}}, r"claimed\.worst 0\.9 is above claimed\.clean"),
        ({"claimed": {**PLAIN["claimed"], "clean": 1.5}}, r"claimed\.clean: Input should be less"),
        ({"claimed": {**PLAIN["claimed"], "clean": float("nan")}}, r"claimed\.clean"),
        ({"best_known": {"value": 0.5, "source": "own"}}, r"best_known\.value 0\.5 is above"),
        ({"id": "other"}, "name the file other.yaml"),
    ],
)
def test_a_bad_entry_is_refused_by_field(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        load_entry(write(tmp_path, **changes))


def test_files_that_are_no_entries(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_entry(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_entry(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="names no schema"):
        load_entry(tmp_path / "x.yaml")


def test_a_claim_within_tolerance_holds():
    verified = verify(entry(), results(0.805, 0.195))
    assert verified.faults == ()
    verified.check()
    assert (verified.clean, verified.worst) == (0.805, 0.195)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (results(worst=0.15), r"claimed\.worst is 0\.2000, measured 0\.1500, tolerance 0\.01"),
        (results(worst=0.3), r"claimed\.worst is 0\.2000, measured 0\.3000"),
        (results(clean=0.7), r"claimed\.clean is 0\.8000, measured 0\.7000"),
        (results(bits=32), "bits is 12, found 32"),
        (results(defense="gate"), "defense is 'plain', found 'gate'"),
        (results(threat="img-linf-4"), r"claimed\.threat is 'img-linf-8', found 'img-linf-4'"),
        (results(worst=0.15), r"best_known\.value is 0\.2000, and this run found 0\.1500"),
    ],
)
def test_a_claim_that_does_not_hold_fails_and_says_why(found, words):
    with pytest.raises(ValueError, match=words):
        verify(entry(), found).check()


def test_queries_weights_and_red_flags_are_held_against_the_entry():
    claimed = {**PLAIN["claimed"], "queries": 9}
    with pytest.raises(ValueError, match=r"claimed\.queries is 9, found 4"):
        verify(entry(claimed=claimed), results()).check()
    source = {"recipe": "tiny.yaml", "seed": 0, "digest": "bb"}
    with pytest.raises(ValueError, match=r"source\.digest is 'bb', found 'aa'"):
        verify(entry(source=source), results()).check()
    flagged = results()
    flagged["worst"] = replace(flagged["worst"], flags=(Flag("F4", 0.1, 0.005, "red", "masking"),))
    with pytest.raises(ValueError, match="red flags F4 were raised"):
        verify(entry(), flagged).check()
    assert verify(entry(unreliable="F4"), flagged).faults == ()


@pytest.mark.parametrize(("digest", "tolerance"), [("", 0.05), ("aa", 0.02), ("aa", 0.001)])
def test_a_tolerance_is_one_of_repetition(tmp_path, digest, tolerance):
    source = {**PLAIN["source"], "digest": digest}
    entry(source=source, claimed={**PLAIN["claimed"], "tolerance": tolerance})


@pytest.mark.parametrize(
    ("digest", "tolerance", "words"),
    [("", 0.99, "claimed.tolerance"), ("", 0.06, "claimed.tolerance"), ("aa", 0.05, "too large where"), ("", 0.0, "claimed.tolerance")],
)  # fmt: skip
def test_a_tolerance_that_passes_another_model_is_refused(tmp_path, digest, tolerance, words):
    source = {**PLAIN["source"], "digest": digest}
    path = write(tmp_path, source=source, claimed={**PLAIN["claimed"], "tolerance": tolerance})
    with pytest.raises(ValueError, match=words):
        load_entry(path)
