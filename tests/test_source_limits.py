"""Limits that keep the source readable: sizes of files and functions, unique names, first lines of docstrings."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "robusthash"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 70, 10
MOST_APP_FILES = 126
METHODS = ("cpah", "dadh", "daph", "drfgd", "dsarh", "sfcl", "saah", "atrdh", "tha", "fpad", "rocmr", "tpap")
"""Methods of papers: an attack, a defense, a model and an objective of one may each lie in a file of its name."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function))


def own_parameters(function: Function) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    long = [
        f"{f.name}: {f.end_lineno - f.lineno + 1}"
        for f in functions(path)
        if f.end_lineno - f.lineno >= MOST_FUNCTION_LINES
    ]
    assert not long


def test_file_names_are_unique() -> None:
    by_stem = defaultdict(list)
    for path in FILES:
        by_stem[path.stem].append(name_of(path))
    shared = {stem: paths for stem, paths in by_stem.items() if len(paths) > 1}
    assert not {stem: paths for stem, paths in shared.items() if stem not in ("__init__", "base", *METHODS)}


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name_of(path))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_have_few_parameters(path: Path) -> None:
    """A part that recipes configure by name aside; verbs take groups of options as dataclasses."""
    many = {f.name: own_parameters(f) for f in functions(path) if own_parameters(f) > MOST_PARAMETERS}
    assert path.name == "drfgd.py" or not many


def test_apps_stay_in_few_files() -> None:
    """A file of a few lines belongs to the neighbour where a reader would look for it."""
    apps = [path for path in FILES if path.is_relative_to(PACKAGE / "apps")]
    tiny = [
        name_of(path) for path in apps if path.stem != "__init__" and len(path.read_text().splitlines()) < 40
    ]
    assert len(apps) <= MOST_APP_FILES
    assert not tiny


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_docstrings_name_the_thing(path: Path) -> None:
    parts = [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, Function | ast.ClassDef | ast.Module)
    ]
    first = [(ast.get_docstring(part) or "-").split()[0] for part in parts]
    assert not {"What", "Where", "How", "Of", "Whether"} & set(first)
