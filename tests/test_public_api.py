"""The names that users may rely on, and the ten-line example of the README as it stands there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import robusthash as rh

REPO = Path(__file__).parents[1]


def test_every_public_name_exists():
    for name in rh.__all__:
        assert getattr(rh, name) is not None
    for name in rh.attacks.__all__:
        assert getattr(rh.attacks, name) is not None


def test_names_are_imported_when_they_are_first_used():
    program = """
import sys
import robusthash as rh
assert not {"torch", "numpy", "yaml"} & set(sys.modules)
assert {*rh.__all__, "evaluation", "index"} <= set(dir(rh))
assert rh.Batch.__module__ == "robusthash.core.types"
assert "robusthash.attacks" not in sys.modules
assert rh.objectives.CSQ().__class__.__name__ == "CSQ"
assert rh.data.load_data is rh.load_data is sys.modules["robusthash"].__dict__["load_data"]
try:
    rh.atacks
except AttributeError as error:
    assert str(error) == "module 'robusthash' has no attribute 'atacks'"
else:
    raise AssertionError("a name that does not exist was found")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_the_names_where_they_are_imported_from():
    tree = ast.parse(Path(rh.__file__).read_text())
    block = next(
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert {*seen, "__version__"} == set(rh.__all__)
    homes = {name: f"robusthash.{home}" for name, home in rh._HOMES.items()}
    assert seen == {**homes, "attacks": "robusthash", "objectives": "robusthash"}


def test_a_name_of_the_package_is_found_without_importing_its_room():
    program = "from robusthash.core.registry import build; print(build('attack', 'mainstay').name)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "mainstay", done.stderr


def test_a_name_of_the_package_is_refused_to_code_from_outside(tmp_path):
    """Although nothing of the package has been looked up yet when that code is imported."""
    (tmp_path / "theirs.py").write_text(
        "from robusthash.core.registry import register\n\n\n"
        "@register('objective', 'csq')\ndef mine():\n    return None\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", "import theirs"], capture_output=True, text=True, check=False, env=environment
    )
    assert "objective 'csq' is already registered by robusthash.objectives.centers" in done.stderr


def python_of(page):
    """The Python programs of a page, as they stand there."""
    return re.findall(r"^```python\n(.*?)^```", (REPO / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_example_of_the_readme_learns_and_runs_twice(tmp_path, monkeypatch, capsys):
    (code,) = python_of("README.md")
    assert python_of("docs/quickstart.md") == [code]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(compile(code, "README.md", "exec"), {})
        clean, robust, chance = map(float, capsys.readouterr().out.partition("\n")[0].split())
        assert clean > chance + 0.6
        assert robust < clean - 0.3


@pytest.mark.parametrize("number", range(6))
def test_the_examples_of_own_models_run(number, tmp_path, monkeypatch, capsys):
    programs = python_of("docs/own-model.md")
    assert len(programs) == 6
    monkeypatch.chdir(tmp_path)
    exec(compile(programs[number], "own-model.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = [
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_every_link_of_the_documents_leads_somewhere():
    for page in [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.relative_to(REPO)} links to {target}"
            assert not anchor or anchor in anchors_of(there), (
                f"{page.relative_to(REPO)} links to {target}#{anchor}"
            )


def test_anchors_are_those_of_headings():
    assert "in-python" in anchors_of(REPO / "docs" / "robustness.md")
    assert "as-implemented" in anchors_of(REPO / "docs" / "methods" / "drfgd.md")
    assert "mine-yaml" not in anchors_of(REPO / "docs" / "quickstart.md")  # a comment of an example
