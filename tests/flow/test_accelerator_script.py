"""The script for a machine with an accelerator, tried at small sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "accelerator_check.sh"


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def test_the_stages_write_what_they_measure(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = called(str(out), "--cpu", "--stages", "codes,throughput")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["state"] == "passed"
    assert [row["differ"] for row in found["stages"]["codes"]] == [0, 0]
    assert all(row["images_per_second"] > 0 for row in found["stages"]["throughput"])
    assert len(found["stages"]["throughput"]) == 3


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what happens without an accelerator")
def test_without_an_accelerator_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = called(str(out))
    assert done.returncode == 0
    assert "no accelerator" in done.stdout
    assert json.loads(out.read_text())["state"] == "no accelerator"
