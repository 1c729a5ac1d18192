"""Tables in the pages are what their commands print from the results that the repository keeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cogapp import Cog

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("results/*.md")), *sorted(DOCS.glob("methods/*.md"))]
GENERATED = [page for page in PAGES if "[[[cog" in page.read_text(encoding="utf-8")]
COG = ["cog", "-I", str(ROOT / "docs"), "-p", "from commands import show"]


def page_of(command: str, folder: Path) -> Path:
    page = folder / "page.md"
    page.write_text(
        f'Before.\n<!-- [[[cog\nshow(r"""\n{command}\n""")\n]]] -->\n<!-- [[[end]]] -->\nAfter.\n'
    )
    return page


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_a_page_is_what_its_results_give(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert Cog().main([*COG, "--check", "--diff", str(page)]) == 0, (
        f"{page.name} is out of date; run: make tables"
    )


def test_there_is_a_page_to_check() -> None:
    assert GENERATED
    assert "docs/results/*.md" in (ROOT / "Makefile").read_text()


def test_a_page_that_is_out_of_date_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = "robusthash list \\\n  protocol --json"
    page = page_of(command, tmp_path)
    assert Cog().main([*COG, "--check", str(page)]) != 0
    assert Cog().main([*COG, "-r", str(page)]) == 0
    text = page.read_text()
    assert f"```\n{command}\n```" in text
    assert '"house"' in text
    assert text.startswith("Before.\n<!-- [[[cog")
    assert text.endswith("<!-- [[[end]]] -->\nAfter.\n")
    assert Cog().main([*COG, "--check", str(page)]) == 0
    page.write_text(re.sub('"house"', '"horse"', text))
    assert Cog().main([*COG, "--check", str(page)]) != 0


def test_pages_run_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match="commands of robusthash, not of 'rm'"):
        Cog().callable_main([*COG, str(page_of("rm results", tmp_path))])


def test_kept_results_hold_no_weights_and_no_paths() -> None:
    kept = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {".json", ".jsonl", ".npz", ".yaml"}
    for path in kept:
        if path.suffix != ".npz":
            assert not re.search(r'["\s](/|~/|\.\./)\w', path.read_text()), (
                f"{path} holds a path of a machine"
            )
