"""Who may import whom, who may print, and what importing the package costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src"
PACKAGE = "robusthash"
ROOMS = (
    *("core", "metrics", "data", "models", "objectives", "training", "attacks", "defenses"),
    *("evaluation", "robustness", "analysis", "index", "apps"),
)
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a dotted name below the package; names of the package itself have the room ``""``."""
    return parts[0] if parts and parts[0] in ROOMS else ""


def imports(path: Path, root: Path = ROOT) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted name below the package) of every import of our own modules, inside functions as well."""
    home = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = home[: -node.level] if node.level else ()
            stem = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*stem, alias.name) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name[1:]) for name in names if name[0] == PACKAGE)


def allowed(importer: tuple[str, ...], room: str) -> bool:
    """Whether a module (dotted name below the package) may import from ``room``."""
    own = room_of(importer)
    if room == "":
        return True  # the version number
    if own == "":
        return room != "apps" or importer in (("__main__",), ("__init__",))  # names loaded on first use
    if own == "index":
        return room in ("core", "index")
    return ROOMS.index(room) <= ROOMS.index(own)


def test_every_folder_is_a_known_room() -> None:
    folders = {
        path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and not path.name.startswith("__")
    }
    assert folders <= set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_go_left(path: Path) -> None:
    importer = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    wrong = [
        f"line {line}: {'.'.join(name)}"
        for line, name in imports(path)
        if not allowed(importer, room_of(name))
    ]
    assert not wrong, f"{path.name} imports from a room to its right: {wrong}"


def test_the_rule_itself_can_fail(tmp_path: Path) -> None:
    module = tmp_path / PACKAGE / "models" / "bad.py"
    module.parent.mkdir(parents=True)
    module.write_text("from ..attacks import base\n\ndef late():\n    import robusthash.training.loop\n")
    found = [room_of(name) for _, name in imports(module, tmp_path)]
    assert found == ["attacks", "training"]
    assert not allowed(("models", "bad"), "attacks")
    assert not allowed(("index", "base"), "data")
    assert not allowed(("robustness", "suite"), "index")
    assert not allowed(("robustness", "suite"), "apps")
    assert not allowed(("version",), "apps")
    assert allowed(("apps", "cli"), "index")
    assert allowed(("index", "local"), "core")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_only_apps_print(path: Path) -> None:
    if room_of(path.relative_to(ROOT / PACKAGE).parts) == "apps":
        return
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not lines, f"{path.name} prints on lines {lines}"


def test_importing_opens_no_connection_and_loads_nothing_heavy() -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("importing opened a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import robusthash.index
from robusthash.core.registry import catalogue
assert catalogue()  # imports every module that registers a name
heavy = ("torchvision", "scipy", "skimage", "sklearn", "faiss")
print(",".join(name for name in heavy if name in sys.modules))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"imported eagerly: {done.stdout}"
