"""Text of strangers in what we print, and code of strangers that we do not import."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from robusthash.apps.commands import terminal
from robusthash.apps.experiment.config import ConfigError, load_config, make_config, save_config
from robusthash.apps.experiment.config_parts import check_parts
from robusthash.apps.experiment.run_directory import RunError, load_run
from robusthash.apps.reports.cell_text import csv_cell, latex_cell, latex_table, markdown_cell
from robusthash.core.plugins import PLUGINS

TRICKS = (
    "[/red]",
    r"\[red]",
    "[bold]x[/bold]",
    "a\x1b[2J",
    "\u202eexe.jpg",
    ":bomb:",
    "a\\",
    "\udcff.jpg",
    "[link=x]",
)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on a terminal with colours."""
    stream = io.StringIO()
    shown = Console(file=stream, force_terminal=True, width=400, emoji=False)
    monkeypatch.setattr(terminal, "console", shown)
    monkeypatch.setattr(terminal, "answers", shown)
    return stream


@pytest.mark.parametrize("trick", TRICKS)
def test_values_are_shown_as_they_are(screen: io.StringIO, trick: str) -> None:
    terminal.print_table(trick, ["", trick], [[trick, trick]])
    terminal.note(trick)
    terminal.warn("error", trick)
    text = screen.getvalue()
    seen = trick.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").replace("\udcff", r"\udcff")
    assert text.count(seen) >= 5
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    text.encode()


def test_cells_of_tables_for_papers_and_pages() -> None:
    assert markdown_cell("a|b\n<script>x</script> [l](u) *e* _f_ g_h") == (
        r"a\|b &lt;script&gt;x&lt;/script&gt; [l\](u) \*e\* \_f\_ g_h"
    )
    assert markdown_cell("photos:database[180], img-linf-8") == "photos:database[180], img-linf-8"
    rows = latex_table(["a"], [["[0.7]"], ["*"], ["0.68 (0.65-0.71)"], ["+1 (-2 to +3)"], ["a-b 1-2"]])
    assert rows.splitlines()[4:9] == [
        r"{}[0.7] \\",  # after the end of a line "[" and "*" are options
        r"{}* \\",
        r"0.68 {\scriptsize (0.65--0.71)} \\",
        r"+1 {\scriptsize (-2 to +3)} \\",
        r"a-b 1-2 \\",
    ]
    assert latex_cell(r"\input{x}%^~") == r"\textbackslash{}input\{x\}\%\textasciicircum{}\textasciitilde{}"
    assert [csv_cell(text) for text in ("=1+1", "@x", "-0.12", "+x", "a=b", "-inf")] == [
        *("'=1+1", "'@x", "-0.12", "'+x", "a=b", "-inf")
    ]


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a/b", "", "a b", "x" * 101, "a\n"])
def test_a_name_is_one_folder_and_no_other_place(name: str) -> None:
    with pytest.raises(ConfigError, match="up to 100 letters"):
        make_config({"name": name})
    assert make_config({"name": "größe-1.5_x"}).name == "größe-1.5_x"


def test_a_run_imports_no_module_that_nobody_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (tmp_path / "strangers_code.py").write_text(f"{imported}from robusthash.objectives.centers import *\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = save_config(make_config({"name": "x"})).replace("objective: csq", "objective: strangers_code:CSQ")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=f"names 'strangers_code:CSQ', code .* {PLUGINS}=strangers_code"):
        load_run(tmp_path)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(PLUGINS, "other, strangers_code")
    assert load_run(tmp_path).config.training.objective == "strangers_code:CSQ"
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            {"evaluation": {"attacks": ["hag", {"name": "mainstay", "eps": 8}]}},
            r"evaluation\.attacks\.1: eps 8",
        ),
        (
            {"hasher": {"image": {"name": "small", "width": 0}}},
            "hasher: width and grid must be at least 1, got 0",
        ),
    ],
)
def test_options_are_tried_before_any_training(raw: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_parts(make_config({"name": "x", **raw}))


RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("folder", [".", "pretrained", "papers/**"])
def test_the_parts_of_every_recipe_fit_together(folder: str) -> None:
    files = sorted(RECIPES.glob(f"{folder}/*.yaml"))
    assert files
    for file in files:
        check_parts(load_config(file))
