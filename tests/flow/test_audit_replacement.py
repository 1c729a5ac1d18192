"""The packaged hash beside an audited search: same photographs and attacks, plain words, and no harm."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import robusthash as rh
from robusthash.apps.audit import replacement
from robusthash.apps.audit.measurement import run_audit
from robusthash.apps.audit.targets import AuditOptions, Target, Tier
from robusthash.apps.cli import app
from robusthash.apps.image_hash.copy_hash import proved_levels
from robusthash.core.runtime import packaged
from robusthash.data.own_data import one_image
from tests.flow.test_audit import brightness, save

TINY = Tier("tiny", 8, 3, 4, 20)
OPTIONS = AuditOptions(size=48, tier=TINY)
HIDDEN, TAKEN = "counted as the same under the worst attack", "taken for another on purpose"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for seed in range(9):
        save(tmp_path / "photos" / f"{seed}.png", seed, 80)
    return tmp_path / "photos"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> str:
    made = types.ModuleType("numeric")
    made.brightness = brightness  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "numeric", made)
    return "numeric:brightness"


def test_the_numbers_are_those_of_an_audit_of_the_packaged_hash(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("imagehash", reason="needs the extra 'audit' (pip install robusthash[audit])")
    options = replace(OPTIONS, eps=3 / 255)
    found = run_audit("dhash", tmp_path / "a", folder, options)
    alone = run_audit("copy-hash", tmp_path / "b", folder, replace(options, size=None))
    beside = json.loads(json.dumps(found["replacement"]))
    assert alone["replacement"] is None
    assert beside["rows"] == json.loads(json.dumps(alone["rows"]))
    assert (beside["name"], beside["radius"], beside["size"]) == ("copy-hash", alone["radius"], 64)
    both = {each["what"]: each for each in beside["compared"]}
    for what, kind in ((HIDDEN, "hide-worst"), (TAKEN, "imitate-worst")):
        rows = [next(row for row in each["rows"] if row["kind"] == kind) for each in (found, alone)]
        assert [both[what][side] for side in ("audited", "replacement")] == [
            row["recognised"] for row in rows
        ]
    assert 0 < both["time of a hash"]["replacement"] < 1000
    for each in both.values():  # side by side in words too
        assert f"{each['what']}: {each['texts'][1]} (dHash: {each['texts'][0]})" in beside["said"]
    files = sorted(each for each in folder.iterdir() if each.suffix == ".png")
    levels = proved_levels(torch.stack([one_image(each, 64) for each in files]))
    withstand = sum(level >= 3 for level in levels)
    assert beside["proved"] == withstand > 0
    assert f"Proved, whatever the attack: {withstand} of the 9 photographs" in beside["said"]
    page = (tmp_path / "a" / "report.html").read_text()
    after = page[page.index(found["verdict"]["first"]) + len(found["verdict"]["first"]) :]
    assert re.sub(r"<[^>]*>|\s", "", after).startswith(re.sub(r"\s", "", beside["said"]))
    assert page.count('href="#instead"') == page.count('id="instead"') + 1 + (beside["level"] == "better")


def test_a_black_box_is_compared_under_black_box_attacks(folder: Path, tmp_path: Path, blocks: str) -> None:
    options = replace(OPTIONS, radius=10)
    assert run_audit(blocks, tmp_path / "a", folder, options)["replacement"]["level"] == "not measured"
    found = run_audit(blocks, tmp_path / "a", folder, replace(options, replacement=True))["replacement"]
    assert {row["name"] for row in found["rows"] if row["kind"] == "hide"} == {"square"}
    assert "Both were attacked by questions alone." in found["said"]
    assert (
        run_audit(blocks, tmp_path / "a", folder, replace(options, replacement=False))["replacement"] is None
    )


@pytest.mark.parametrize(
    ("fault", "reason"), [(RuntimeError("no room"), "no room"), (KeyboardInterrupt(), "it was interrupted")]
)
def test_a_failed_comparison_ends_no_audit(
    folder: Path,
    tmp_path: Path,
    blocks: str,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    reason: str,
) -> None:
    out = tmp_path / "out"

    def broken(*_: object, **__: object) -> None:
        before = json.loads((out / "audit.json").read_text())  # whole on the disk before it began
        assert before["rows"]
        assert before["replacement"] is None
        assert (out / "report.html").is_file()
        raise fault

    monkeypatch.setattr(replacement, "measure_codes", broken)
    found = run_audit(blocks, out, folder, replace(OPTIONS, replacement=True))
    assert found["replacement"]["level"] == "failed"
    assert found["replacement"]["said"].endswith(f"but {reason}.")
    assert json.loads((out / "audit.json").read_text())["replacement"]["said"] == found["replacement"]["said"]
    assert found["replacement"]["said"] in (out / "report.html").read_text()


def test_the_terminal_says_it_in_the_next_line(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("imagehash", reason="needs the extra 'audit' (pip install robusthash[audit])")
    words = f"audit ahash --photos {folder} --out {tmp_path / 'out'} --tier smoke --queries 4 --attacked 2 --size 48"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    lines = re.sub(r"\s+", " ", done.stdout)
    assert f"{found['verdict']['first']} {found['replacement']['said']} {found['verdict']['tried']}" in lines
    assert "copy-hash instead of average hash" in done.stdout
    plain = CliRunner().invoke(app, [*words.split(), "--no-replacement", "--json"])
    assert json.loads(plain.stdout)["replacement"] is None
    again = rh.audit("ahash", folder, out=tmp_path / "p", tier="smoke", queries=4, attacked=2, size=48)
    assert again["replacement"]["compared"][:4] == [
        {**each, "texts": tuple(each["texts"])} for each in found["replacement"]["compared"][:4]
    ]


def test_a_search_by_kinds_is_hardened_and_not_replaced() -> None:
    kinds = Target("runs/kinds", "kinds", None, True, purpose="other")
    with pytest.raises(ValueError, match=r"runs/kinds was trained to find kinds.*leave --replacement out"):
        replacement.check_replacement(kinds, AuditOptions(replacement=True))
    assert not replacement.check_replacement(kinds, AuditOptions())
    said = replacement.without_numbers(kinds, AuditOptions(), "fooled")
    assert said is not None
    assert said.level == "harden"
    assert not said.compared
    for path in re.findall(r"(?:recipes|docs)/[\w/-]+\.\w+", said.said):
        assert (Path(__file__).parents[2] / path).is_file()
    assert replacement.without_numbers(kinds, AuditOptions(), "held") is None
    unknown = replace(kinds, purpose="unknown")
    labelled = replacement.without_numbers(unknown, AuditOptions(labels=True), "fooled")
    assert labelled is not None
    assert labelled.level == "harden"
    assert replacement.check_replacement(replace(kinds, purpose="this"), AuditOptions())


@pytest.mark.parametrize("name", ["copy-hash", str(packaged("copy-hash"))])
def test_the_packaged_hash_replaces_not_itself(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the replacement itself"):
        run_audit(name, tmp_path, None, AuditOptions(replacement=True))


def test_only_clear_differences_are_called_so() -> None:
    outcome, level = replacement._outcome, replacement._level
    assert outcome(0.0, 0.5, 12, lower=False) == "better"  # 0 and 6 of 12: p 0.014
    assert outcome(0.5, 0.0, 12, lower=False) == "worse"
    assert outcome(0.5, 0.0, 12, lower=True) == "better"
    assert outcome(0.0, 4 / 12, 12, lower=False) == "level"  # p 0.093
    assert outcome(1.0, 0.0, 3, lower=True) == "level"  # three photographs say nothing
    assert level(["better", "level", None]) == "better"
    assert level(["better", "worse"]) == "mixed"
    assert level(["level", "worse", None]) == "worse"
    assert level(["level", None]) == "level"
