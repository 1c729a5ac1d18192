"""Perceptual hashes and own runs under attack on the packaged photographs, as a Markdown table.

    python docs/hash_table.py runs/NAME/ID ... > table.md

The recall of each: the share of the attacked photographs that are still within the radius.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.audit.measurement import run_audit
from robusthash.apps.audit.targets import AuditOptions, Tier
from robusthash.models.external.loaders import NAMES

LEVELS = (2, 4, 8)
TIER = Tier("table", 20, 10, 20, 1000)
SIZE = 128  # pixels a side for the perceptual hashes
SHARE = 10 / 64  # of the bits of a run: the custom of the image hashes


def row(target: str, level: int) -> list[str]:
    """The cells of one target at one level of 255."""
    own = target not in NAMES
    bits = None
    if own:
        from robusthash.apps.experiment.run_directory import load_run

        bits = load_run(Path(target)).card()["bits"]
    radius = round(SHARE * bits) if bits else None
    options = AuditOptions(
        size=None if own else SIZE, tier=TIER, eps=level / 255, radius=radius if own else None
    )
    with tempfile.TemporaryDirectory() as out:
        summary = run_audit(target, Path(out), None, options)
    title = f"{summary['title']} ({summary['bits']} bits, within {summary['radius']})"
    return [title, str(level), *cells(summary)]


def cells(summary: dict[str, Any]) -> list[str]:
    """Recall under each attacker. White box is the worst of the attacks that follow gradients."""
    rows = {each["name"]: each for each in summary["rows"]}
    kinds = {each["kind"]: each for each in summary["rows"]}
    white = ("guided-apgd", "flip", "mainstay", "evade", "evade-sharp")
    shares = [
        kinds["same"]["recognised"],
        min(rows[name]["recognised"] for name in white),
        kinds["hide-saved"]["recognised"],
        rows["square"]["recognised"],
        kinds["imitate-worst"]["recognised"],
        kinds["imitate-saved"]["recognised"],
    ]
    return [f"{share:.2f}" for share in shares]


def main(targets: list[str]) -> None:
    head = ["search", "of 255", "nothing changed", "white box", "worst, saved as JPEG 95", "1,000 questions"]
    head += ["taken for another", "that, saved as JPEG 95"]
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for target in targets:
        for level in LEVELS:
            print("| " + " | ".join(row(target, level)) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([*NAMES, *sys.argv[1:]])
