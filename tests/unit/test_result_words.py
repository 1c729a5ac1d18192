"""Words below numbers: p-values, budgets, queries without a relevant item; and values that are infinite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from robusthash.apps.cli import app
from robusthash.core.labels import has_relevant, relevant
from robusthash.core.registry import build, catalogue
from robusthash.metrics.code_scoring import read_codes, score
from robusthash.metrics.comparison import compare
from robusthash.metrics.result_words import budget_words, empty_note, empty_notes, p_text, result_notes
from robusthash.metrics.statistics import bootstrap_interval, intervals
from robusthash.objectives import CSQ


def test_p_values() -> None:
    assert [p_text(p) for p in (0.0, 9.9e-5, 1e-4, 0.04567, 1.0)] == [
        "< 0.0001",
        "< 0.0001",
        "0.0001",
        "0.0457",
        "1.0000",
    ]


def test_notes_say_whose_they_are(tmp_path: Path) -> None:
    result = replace(score(*map(read_codes, files(tmp_path, 20))), notes=("of all",))
    own = replace(result, notes=("of all", "of some"))
    names = ("mainstay", "hag", "pgd", "cgat", "sdha")
    notes = result_notes({"clean": result, **dict.fromkeys(names, own)})
    assert notes == {"of all": "of all", "of some": "mainstay, hag, pgd and 2 more: of some"}
    assert result_notes({"clean": result, "hag": own})["of some"] == "hag: of some"


def test_budgets_of_all_attacks_are_words() -> None:
    for card in catalogue("attack"):
        try:
            attack = build("attack", card.name, objective=CSQ())
        except (KeyError, ValueError):
            continue
        words = budget_words(attack.budget)
        assert not set(words) & set("()=_'"), (card.name, words)
        assert "1 steps" not in words.split(", ")
        assert {"knows", "sees"} & set(words.split()), card.name
    both = (
        "PGD(steps=5, step_size=0.00392156862745098, momentum=0.5), slope one, starts 3, W0; suite x, 4 lines"
    )
    assert budget_words(both) == (
        "PGD, 5 steps, step size 1/255, momentum 0.5, fixed slope, 3 starts, knows the weights alone; "
        "suite x, 4 lines"
    )
    assert budget_words("PGD(steps=5, step_size=0.006)") == "PGD, 5 steps, step size 0.006"


def files(folder: Path, matched: int) -> list[str]:
    """Codes of 20 queries, of which ``matched`` have a class of the database."""
    random = np.random.default_rng(0)
    classes = np.where(np.arange(20) < matched, 0, 9)
    for name, labels in (("q", classes), ("d", np.zeros(150, int))):
        codes = random.integers(0, 2, (len(labels), 16))
        np.savez(folder / f"{name}.npz", codes=codes, labels=labels)
    return [str(folder / "q.npz"), str(folder / "d.npz")]


def test_queries_without_a_relevant_item_are_said_by_score(tmp_path: Path) -> None:
    sides = files(tmp_path, 15)
    said = CliRunner().invoke(app, ["score", *sides])
    assert "5 of 20 queries have no relevant item in the database and count 0" in " ".join(
        said.stderr.split()
    )
    skipped = CliRunner().invoke(app, ["score", *sides, "--protocol", "{name: house, empty: skip}"])
    assert "5 queries have no relevant item in the database and are left out" in " ".join(
        skipped.stderr.split()
    )
    query, database = map(read_codes, sides)
    zero, skip = (score(query, database, {"name": "house", "empty": e}) for e in ("zero", "skip"))
    for name in ("MAP", "P@100", "R@100", "nDCG@100"):
        assert skip[name] * 15 == pytest.approx(zero[name] * 20), name  # one rule for all
    assert (zero.empty, skip.empty) == (5, 5)
    assert empty_note(score(*map(read_codes, files(tmp_path, 20)))) == ""
    nothing = empty_note(score(*map(read_codes, files(tmp_path, 0))))
    assert nothing.startswith("20 of 20 queries have no relevant item")
    assert nothing.endswith("look whether both sides name their labels alike")
    with pytest.raises(ValueError, match=r"no query of q\.npz has a relevant item"):
        score(*map(read_codes, files(tmp_path, 0)), {"name": "house", "empty": "skip"})


def test_notes_of_several_directions(tmp_path: Path) -> None:
    result = score(*map(read_codes, files(tmp_path, 15)))
    one, two = replace(result, scored_on="I2T"), replace(result, scored_on="T2I", empty=6)
    notes = empty_notes({"a": one, "b": two, "c": one})
    assert [note[:12] for note in notes] == ["I2T: 5 of 20", "T2I: 6 of 20"]
    assert empty_notes({"a": result})[0].startswith("5 of 20")


def test_which_queries_have_a_relevant_item() -> None:
    random = torch.Generator().manual_seed(0)
    queries = (torch.rand(50, 9, generator=random) < 0.2).float()
    database = (torch.rand(7, 9, generator=random) < 0.1).float()
    found = has_relevant(queries, database)
    assert torch.equal(found, relevant(queries, database).any(1))
    assert found.any()
    assert not found.all()


def test_intervals_of_infinite_values() -> None:
    """PSNR of an unchanged image."""
    values = torch.tensor([30.0, 40.0, float("inf"), float("nan"), 35.0])
    finite = torch.tensor([30.0, 40.0, float("nan"), float("nan"), 35.0])
    both = intervals({"psnr": values, "finite": finite, "all": torch.full((5,), float("inf"))})
    assert both.keys() == {"psnr", "finite"}
    assert both["psnr"] == both["finite"] == bootstrap_interval(values)
    assert 30 <= both["psnr"][0] < both["psnr"][1] <= 40


def test_comparisons_pass_over_infinite_differences(tmp_path: Path) -> None:
    result = score(*map(read_codes, files(tmp_path, 20)))
    psnr = torch.linspace(30, 40, 20)
    other = torch.where(torch.arange(20) < 4, torch.inf, psnr + 1)
    first, second = (replace(result, per_query={"psnr": values}) for values in (other, psnr))
    found = compare(first, second)["psnr"]
    assert found.queries == 16
    assert found.mean == pytest.approx(1, abs=1e-5)


def test_a_suite_of_one_line_has_one_line() -> None:
    assert budget_words("suite smoke, 1 lines") == "suite smoke, 1 line"
    assert budget_words("suite standard, 21 lines") == "suite standard, 21 lines"
