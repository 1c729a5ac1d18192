"""docs/add-a-method.md: its files as they stand, beside its recipe, named by module and Python name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import load_config
from robusthash.apps.experiment.run_directory import load_run
from robusthash.attacks import image_threat
from robusthash.core import registry
from robusthash.models import build_hasher
from robusthash.robustness.specs.adaptive_attacks import adaptive_attacks

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs" / "add-a-method.md"
CONTRACT = TESTS / "contract"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with every file of the document; what they register is forgotten afterwards."""
    blocks = re.findall(
        r"```(?:python|yaml)\n# (\w+\.(?:py|yaml))[^\n]*\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
    assert len(blocks) == DOCUMENT.read_text().count("```python") + 1
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    registry.catalogue()
    monkeypatch.setattr(registry, "_CARDS", dict(registry._CARDS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path
    for name, _ in blocks:
        sys.modules.pop(name.partition(".")[0], None)


def test_the_recipe_of_own_parts_learns_and_is_attacked(files: Path) -> None:
    config = load_config(files / "my.yaml")
    run = load_run(training_stages.train(config, files / "runs").path)
    results = evaluation_stages.evaluate(run)
    assert list(results) == ["clean", "mainstay-scale-free", "hinge", "rms", "worst"]
    clean = results["clean"]["MAP"]
    assert clean > results["clean"].reference["chance"] + 0.2
    for attack in ("mainstay-scale-free", "hinge", "rms"):
        assert results[attack]["MAP"] < clean, attack
    assert run.card()["hasher"]["image"] == {"name": "patch_encoder:Patches", "width": 32}


def test_they_pass_the_contract(files: Path) -> None:
    """``--method`` once for each file that the sweep knows, in their folder."""
    named = ("cosine_pairs:CosinePairs", "mainstay_scale_free:mainstay_scale_free", "hinge_loss:hinge_attack")
    named += ("rms_search:rms_attack", "consistency:Consistency")
    words = [
        str(CONTRACT),
        "-p",
        "no:cacheprovider",
        *(part for name in named for part in ("--method", name)),
    ]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=files, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout[-2000:]
    assert re.search(r"\b55 passed", answer.stdout), answer.stdout[-200:]


def test_the_defense_brings_its_attacks(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert registry.card("purifier", "levels:Levels").name == "levels"
    victim = build_hasher(bits=8, purifiers={"image": "levels"})
    names = [spec.name for spec in adaptive_attacks(victim, None, image_threat(knowledge="W2"))]
    assert names[0] == "smooth-levels"
