"""The service's parts against attacked queries, measured for a run: a JSON file, filled part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.apps.experiment.evaluation_stages import context_of
from robusthash.apps.experiment.model_stages import load_hasher, read_data, set_threads
from robusthash.apps.experiment.oracle_run import oracle_table
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.threat_options import threat_on_data
from robusthash.attacks import guided_apgd, hag, mainstay
from robusthash.attacks.aach import aach
from robusthash.attacks.base import Attack
from robusthash.attacks.eqb2a import eqb2a
from robusthash.attacks.query_search import NES, Square
from robusthash.core.atomic_files import json_text, write_aside
from robusthash.core.limited_files import read_json
from robusthash.core.runtime import Progress, silent
from robusthash.data.copies import CHANGES, images_below
from robusthash.data.image_files import read_image
from robusthash.defenses.code_agreement import Agreeing, CodeAgreement, against_agreement
from robusthash.defenses.query_detection import DetectionLimits
from robusthash.evaluation.attack_block import in_8bit
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import BlockRunner
from robusthash.models.encoding import encode_signs
from robusthash.robustness.detected_queries import Detected, Evasion, detected_search
from robusthash.robustness.ordinary_traffic import ordinary_refusals
from robusthash.robustness.specs.oracle_attacks import OracleAttack, Shows

PARTS = ("answers", "learned", "detection", "agreement")

EVASIONS = (
    Evasion(),
    Evasion("ten clients", clients=10),
    Evasion("three decoys between", decoys=3),
    Evasion("blinded", blind=True),
    Evasion("blinded, ten clients", clients=10, blind=True),
)
ANSWERS: tuple[Shows, ...] = ("codes", "distances", "coarse", "ids")
LARGER = Evasion("steps of four times the budget")
_PHOTOGRAPH = 192  # pixels a side of those that traffic is made of
_PHOTOGRAPHS = 100  # at most
_FALSE_ALARMS = (0.01, 0.05)


def measure_hardening(
    run: Run,
    parts: Sequence[str],
    out: Path,
    queries: int = 50,
    photographs: Path | None = None,
    search: str | None = None,
    budgets: Sequence[int] = (100, 1000, 5000),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure parts of the hardening and write them to ``out``, whose other parts stay.

    Args:
        parts: ``answers``: MAP by oracle queries for each kind of answer; ``learned``: the same of attacks
            that learn from answers before the first attacked query; ``detection``; ``agreement``.
        queries: of the run, chosen by content.
        photographs: folder that ordinary traffic is made of, for ``detection``.
        search: of ``answers``: as of ``oracle_table``.
        budgets: of oracle queries. ``detection`` takes those up to 1,000.

    Raises:
        ValueError: an unknown part, one that needs photographs without any, queries that are no images.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"parts are {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if "detection" in parts and photographs is None:
        raise ValueError("detection is measured on ordinary traffic too; give a folder by --photographs")
    content = read_json(out) if out.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{out} is no file of hardening; name another")
    if content.get("run", run.config.name) != run.config.name:
        raise ValueError(f"{out} holds parts of the run {content['run']!r}; name another file")
    content |= {"run": run.config.name, "threat": "img-linf-8"}

    def store(part: str, measured: Any) -> None:
        content[part] = measured
        content["queries"] = {**content.get("queries", {}), part: queries}
        with write_aside(out) as aside:
            aside.write_text(json_text(content))

    if "answers" in parts:
        table = oracle_table(run, budgets, ANSWERS, queries, search, progress=progress).plain()
        del table["run"]
        store("answers", {**content.get("answers", {}), table["search"]: table})
    if set(parts) == {"answers"}:
        return content
    set_threads(run.config)
    data = read_data(run.config, progress)
    context = context_of(run, load_hasher(run), data, progress, whole=True).some(queries)
    if "learned" in parts:
        store("learned", _learned(context, budgets, progress))
    if "detection" in parts and photographs is not None:
        store("detection", _detection(context, photographs, budgets, progress))
    if "agreement" in parts:
        store("agreement", _agreement(context, progress))
    return content


def _ap(context: EvaluationContext, signs: Tensor) -> Tensor:
    """(Q,) exact expected AP over the whole database."""
    return context.expected_ap(signs, context.query_labels)


# ------------------------------------------------------------------------------------------ learned


def _learned(context: EvaluationContext, budgets: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """Attacks that learn from the answers to training items; budgets beyond those are cut."""
    most, rows = len(context.data.train), []
    makers: list[tuple[str, Callable[..., Attack]]] = [("codes", aach), ("ids", eqb2a)]
    for shows, make in makers:
        for count in dict.fromkeys(min(budget, most) for budget in budgets):
            attack = make(questions=count)
            attacked = BlockRunner(context).queries(GradientAttack(attack.name, attack), progress=progress)
            value = float(_ap(context, attacked.codes_8bit[:, 0]).mean())
            rows.append({"attack": attack.name, "shows": shows, "in all": count, "wMAP": value})
    return rows


# ------------------------------------------------------------------------------------------ detection


def _detection(
    context: EvaluationContext, photographs: Path, budgets: Sequence[int], progress: Progress
) -> dict[str, Any]:
    limits = DetectionLimits()
    marks = tuple(budget for budget in budgets if budget <= 1000)
    threat = threat_on_data("img-linf-8", context.data, "B2")
    wide = threat_on_data("img-linf-32", context.data, "B2")
    rows = []
    for name, search in (("square", Square()), ("nes", NES())):
        spec = OracleAttack(name, search, threat, "codes", "ap", marks[-1])
        tried = [(spec, evasion) for evasion in EVASIONS] + [(spec.at(wide), LARGER)]
        free: dict[tuple[str, bool], Detected] = {}  # decoys and clients change nothing there
        for each, evasion in tried:
            seen = detected_search(context, each, limits, evasion, marks, progress)
            key = (each.threat.name, evasion.blind)
            if key not in free:
                free[key] = detected_search(context, each, None, evasion, marks, progress)
            rows.append({"search": name, "evasion": evasion.name, **_detected(seen, free[key])})
    files = images_below(photographs).images
    files = files[:: -(-len(files) // _PHOTOGRAPHS)]
    pictures = [Image.fromarray(_pixels(path)) for path in files]
    side = context.queries.batch(torch.arange(1)).inputs["image"].shape[-1]
    traffic = [asdict(kind) for kind in ordinary_refusals(pictures, side, limits, progress=progress)]
    return {"limits": asdict(limits), "attackers": rows, "photographs": len(files), "traffic": traffic}


def _detected(seen: Detected, free: Detected) -> dict[str, Any]:
    caught = seen.refused > 0
    return {
        "budget": seen.budget,
        "refused": float(caught.double().mean()),
        "refused at": float(seen.refused[caught].double().median()) if caught.any() else None,
        "slowed at": float(seen.slowed[seen.slowed > 0].double().median()) if seen.slowed.any() else None,
        "answered": float(seen.answered.double().mean()),
        "wMAP": dict(zip(map(str, seen.marks), seen.ap.mean(0).tolist(), strict=True)),
        "wMAP without detection": dict(zip(map(str, free.marks), free.ap.mean(0).tolist(), strict=True)),
    }


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.ascontiguousarray(read_image(path, _PHOTOGRAPH).permute(1, 2, 0).numpy())


# ------------------------------------------------------------------------------------------ agreement


def _agreement(context: EvaluationContext, progress: Progress) -> dict[str, Any]:
    """Thresholds from database items; false alarms on clean queries and their everyday changes."""
    agreement, victim = CodeAgreement(), context.victim
    count = min(1000, len(context.data.database))
    apart = agreement.disagreement(victim, context.data.database.batch(torch.arange(count)).inputs["image"])
    bits = [int(apart.double().quantile(1 - share, interpolation="higher")) for share in _FALSE_ALARMS]
    clean = context.queries.batch(torch.arange(len(context.queries))).inputs["image"]
    sent = {"clean": clean, **{f"clean, {change.name}": change(clean) for change in CHANGES}}
    for attack in (hag(eps=8 / 255, steps=100), mainstay(eps=8 / 255), guided_apgd(eps=8 / 255, steps=50)):
        aware = against_agreement(attack)
        sent[attack.name] = _attacked(context, GradientAttack(attack.name, attack))
        view = Agreeing(agreement)
        sent[aware.name] = _attacked(context, GradientAttack(aware.name, aware, view=view, seen="agreeing"))
        progress(len(sent) - len(CHANGES) - 1, 6, "code agreement")
    rows = []
    for name, images in sent.items():
        moved, ap = (
            agreement.disagreement(victim, images),
            _ap(context, encode_signs(victim, "image", images)),
        )
        refused = [moved > most for most in bits]
        passed = [float(ap[~each].mean()) if (~each).any() else None for each in refused]
        shares = [float(each.double().mean()) for each in refused]
        rows.append(
            {"queries": name, "wMAP": float(ap.mean()), "refused": shares, "wMAP of the rest": passed}
        )
    return {"changes": asdict(agreement), "bits": victim.bits, "within": bits, "items": count, "rows": rows}


def _attacked(context: EvaluationContext, spec: GradientAttack) -> Tensor:
    """Attacked queries as 8-bit files."""
    blocks = [spec.run(context, block, 0).inputs for block in range(context.blocks)]
    origins = [context.batch(block).inputs["image"].cpu() for block in range(context.blocks)]
    return torch.cat([in_8bit(*pair) for pair in zip(origins, blocks, strict=True)])
