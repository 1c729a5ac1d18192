"""The names that users may rely on, and the ten-line example of the README as it stands there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

import robusthash as rh

REPO = Path(__file__).parents[1]


def test_every_public_name_exists():
    for name in rh.__all__:
        assert getattr(rh, name) is not None
    for name in rh.attacks.__all__:
        assert getattr(rh.attacks, name) is not None


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_example_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (REPO / page).read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1], page, "exec"), {})
    printed = capsys.readouterr().out
    assert "tensor" in printed or re.search(r"0\.\d+", printed)


def test_every_link_of_the_documents_leads_somewhere():
    for page in [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(REPO)} links to {target}"


def test_documented_methods_of_add_a_method_work(monkeypatch):
    """The three complete examples of docs/add-a-method.md register and make what they say."""
    from robusthash.core.registry import build, card

    text = (REPO / "docs" / "add-a-method.md").read_text()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        module = types.ModuleType(f"documented_example_{number}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, module.__name__, "exec"), module.__dict__)
    assert build("attack", "mainstay-scale-free").name == "mainstay-scale-free"
    assert build("objective", "cosine-pairs") is not None
    assert card("outer", "consistency").evidence == "own"
