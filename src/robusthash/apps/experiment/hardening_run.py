"""The service's parts against attacked queries, measured for a run: a JSON file and its tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.apps.experiment.evaluation_stages import loaded_context
from robusthash.apps.experiment.oracle_run import oracle_table
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.threat_options import threat_on_data
from robusthash.apps.reports.cell_text import markdown_table
from robusthash.attacks import guided_apgd, hag, mainstay
from robusthash.attacks.aach import aach
from robusthash.attacks.base import Attack
from robusthash.attacks.eqb2a import eqb2a
from robusthash.attacks.query_search import NES, Square
from robusthash.core.atomic_files import json_text, write_text
from robusthash.core.limited_files import read_json
from robusthash.core.runtime import Progress, digest, silent
from robusthash.data.copies import CHANGES, images_below
from robusthash.data.image_files import read_image
from robusthash.defenses.query_detection import Agreeing, CodeAgreement, DetectionLimits, against_agreement
from robusthash.evaluation.attack_block import in_8bit
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import BlockRunner, pass_progress
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

Row = Callable[[str, Callable[[], Any]], Any]
"""(name, how it is measured) -> the row of a part: as it is stored, or measured now and stored."""


@dataclass(frozen=True)
class _HardeningFile:
    """The JSON file of the measurements. ``unfinished`` in it has the rows of parts that were interrupted."""

    path: Path
    content: dict[str, Any]

    def rows(self, part: str, settings: str) -> Row:
        """The rows of a part, of which those measured under the same settings are taken."""
        begun = self.content.setdefault("unfinished", {})
        if begun.get(part, {}).get("settings") != settings:
            begun[part] = {"settings": settings, "rows": {}}
        rows = begun[part]["rows"]

        def row(name: str, measure: Callable[[], Any]) -> Any:
            if name not in rows:
                rows[name] = measure()
                self._write()
            return rows[name]

        return row

    def finish(self, part: str, measured: Any, queries: int) -> None:
        """Store a whole part in place of an earlier one and of its rows."""
        self.content[part] = measured
        self.content["queries"] = {**self.content.get("queries", {}), part: queries}
        unfinished = self.content.get("unfinished", {})
        unfinished.pop(part, None)
        if not unfinished:
            self.content.pop("unfinished", None)
        self._write()

    def _write(self) -> None:
        write_text(self.path, json_text(self.content))


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

    Rows are written as they come: the same call goes on after those that an interrupted one has measured.

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

    file = _HardeningFile(out, content)
    if "answers" in parts:
        table = oracle_table(run, budgets, ANSWERS, queries, search, progress=progress).plain()
        del table["run"]
        file.finish("answers", {**content.get("answers", {}), table["search"]: table}, queries)
    if set(parts) == {"answers"}:
        return content
    context = loaded_context(run, progress, queries=queries)
    model = run.card()["digest"]
    measures: dict[str, tuple[list[Any], Callable[[Row], Any]]] = {
        "learned": ([list(budgets)], lambda row: _learned(context, budgets, row, progress)),
        "detection": (
            [list(budgets), photographs and str(photographs.resolve())],
            lambda row: _detection(context, photographs or Path(), budgets, row, progress),
        ),
        "agreement": ([], lambda row: _agreement(context, row, progress)),
    }
    for part, (settings, measure) in measures.items():
        if part in parts:
            file.finish(part, measure(file.rows(part, digest([model, queries, *settings]))), queries)
    return content


def _ap(context: EvaluationContext, signs: Tensor) -> Tensor:
    """(Q,) exact expected AP over the whole database."""
    return context.expected_ap(signs, context.query_labels)


# ------------------------------------------------------------------------------------------ learned


def _learned(
    context: EvaluationContext, budgets: Sequence[int], row: Row, progress: Progress
) -> list[dict[str, Any]]:
    """Attacks that learn from the answers to training items; budgets beyond those are cut."""
    most, rows = len(context.data.train), []
    makers: list[tuple[str, Callable[..., Attack]]] = [("codes", aach), ("ids", eqb2a)]
    for shows, make in makers:
        for count in dict.fromkeys(min(budget, most) for budget in budgets):
            attack = make(questions=count)
            wmap = row(f"{attack.name}, {count}", partial(_of_learned, context, attack, progress))
            rows.append({"attack": attack.name, "shows": shows, "in all": count, "wMAP": wmap})
    return rows


def _of_learned(context: EvaluationContext, attack: Attack, progress: Progress) -> float:
    """wMAP of the queries that the attack changed."""
    spec = GradientAttack(attack.name, attack)
    with pass_progress(context.victim, progress, attack.name):
        attacked = BlockRunner(context).queries(spec, progress=progress)
    return float(_ap(context, attacked.codes_8bit[:, 0]).mean())


# ------------------------------------------------------------------------------------------ detection


def _detection(
    context: EvaluationContext, photographs: Path, budgets: Sequence[int], row: Row, progress: Progress
) -> dict[str, Any]:
    limits = DetectionLimits()
    marks = tuple(budget for budget in budgets if budget <= 1000)
    threat = threat_on_data("img-linf-8", context.data, "B2")
    wide = threat_on_data("img-linf-32", context.data, "B2")
    free: dict[tuple[str, str, bool], Detected] = {}  # decoys and clients change nothing there

    def attackers(spec: OracleAttack, evasion: Evasion) -> dict[str, Any]:
        result = detected_search(context, spec, limits, evasion, marks, progress)
        key = (spec.name, spec.threat.name, evasion.blind)
        if key not in free:
            free[key] = detected_search(context, spec, None, evasion, marks, progress)
        return {"search": spec.name, "evasion": evasion.name, **_detected(result, free[key])}

    rows = []
    for name, search in (("square", Square()), ("nes", NES())):
        spec = OracleAttack(name, search, threat, "codes", "ap", marks[-1])
        for each, evasion in [*((spec, evasion) for evasion in EVASIONS), (spec.at(wide), LARGER)]:
            rows.append(row(f"{name}, {evasion.name}", partial(attackers, each, evasion)))
    files = images_below(photographs).images
    files = files[:: -(-len(files) // _PHOTOGRAPHS)]

    def ordinary() -> list[dict[str, Any]]:
        pictures = [Image.fromarray(_pixels(path)) for path in files]
        side = context.queries.batch(torch.arange(1)).inputs["image"].shape[-1]
        return [asdict(kind) for kind in ordinary_refusals(pictures, side, limits, progress=progress)]

    traffic = row("ordinary traffic", ordinary)
    return {"limits": asdict(limits), "attackers": rows, "photographs": len(files), "traffic": traffic}


def _detected(result: Detected, free: Detected) -> dict[str, Any]:
    caught, slowed = result.refused > 0, result.slowed[result.slowed > 0]
    return {
        "budget": result.budget,
        "refused": float(caught.double().mean()),
        "refused at": float(result.refused[caught].double().median()) if caught.any() else None,
        "slowed at": float(slowed.double().median()) if len(slowed) else None,
        "answered": float(result.answered.double().mean()),
        "wMAP": dict(zip(map(str, result.marks), result.ap.mean(0).tolist(), strict=True)),
        "wMAP without detection": dict(zip(map(str, free.marks), free.ap.mean(0).tolist(), strict=True)),
    }


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.ascontiguousarray(read_image(path, _PHOTOGRAPH).permute(1, 2, 0).numpy())


# ------------------------------------------------------------------------------------------ agreement


def _agreement(context: EvaluationContext, row: Row, progress: Progress) -> dict[str, Any]:
    """Thresholds from database items; false alarms on clean queries and their everyday changes."""
    agreement, victim = CodeAgreement(), context.victim
    count = min(1000, len(context.data.database))

    def within() -> list[int]:
        items = context.data.database.batch(torch.arange(count)).inputs["image"]
        apart = _apart(context, agreement, items, "clean items", progress).double()
        return [int(apart.quantile(1 - share, interpolation="higher")) for share in _FALSE_ALARMS]

    bits = row("within", within)
    clean = context.queries.batch(torch.arange(len(context.queries))).inputs["image"]
    sent: dict[str, Callable[[], Tensor]] = {"clean": lambda: clean}
    sent |= {f"clean, {change.name}": partial(change, clean) for change in CHANGES}
    for attack in (hag(eps=8 / 255, steps=100), mainstay(eps=8 / 255), guided_apgd(eps=8 / 255, steps=50)):
        aware, view = against_agreement(attack), Agreeing(agreement)
        with_changes = GradientAttack(aware.name, aware, view=view, view_name="agreeing")
        for spec, passes in ((GradientAttack(attack.name, attack), 1), (with_changes, 3)):
            sent[spec.name] = partial(_attacked, context, spec, passes, progress)

    def measured(name: str) -> dict[str, Any]:
        images = sent[name]()
        moved = _apart(context, agreement, images, name, progress)
        ap = _ap(context, encode_signs(victim, "image", images, context.batch_size))
        refused = [moved > most for most in bits]
        passed = [float(ap[~each].mean()) if (~each).any() else None for each in refused]
        shares = [float(each.double().mean()) for each in refused]
        return {"queries": name, "wMAP": float(ap.mean()), "refused": shares, "wMAP of the rest": passed}

    rows = []
    for place, name in enumerate(sent):
        rows.append(row(name, partial(measured, name)))
        progress(place + 1, len(sent), "code agreement")
    return {"changes": asdict(agreement), "bits": victim.bits, "within": bits, "items": count, "rows": rows}


def _apart(
    context: EvaluationContext, agreement: CodeAgreement, images: Tensor, title: str, progress: Progress
) -> Tensor:
    """``CodeAgreement.disagreement``, a batch at a time."""
    parts = []
    for batch in images.split(context.batch_size):
        parts.append(agreement.disagreement(context.victim, batch))
        progress(sum(map(len, parts)), len(images), f"{title}: codes of the changes")
    return torch.cat(parts)


def _attacked(context: EvaluationContext, spec: GradientAttack, passes: int, progress: Progress) -> Tensor:
    """Attacked queries as 8-bit files; ``passes`` of the victim make a step of the attack."""
    steps = spec.attack.search.steps * passes * context.blocks
    with pass_progress(context.victim, progress, spec.name, steps):
        blocks = [spec.run(context, block, 0).inputs for block in range(context.blocks)]
    origins = [context.batch(block).inputs["image"].cpu() for block in range(context.blocks)]
    return torch.cat([in_8bit(*pair) for pair in zip(origins, blocks, strict=True)])


def hardening_tables(content: dict[str, Any], parts: Collection[str]) -> str:
    """The tables of these parts, where a file has them.

    Raises:
        ValueError: content of another shape, or an unknown part.
    """
    if unknown := set(parts) - set(_TABLES):
        raise ValueError(f"parts are {', '.join(_TABLES)}, not {', '.join(sorted(unknown))}")
    try:
        subject = f"{content['run']}, {content['threat']}"
        return "\n\n".join(
            text
            for part, tables_of in _TABLES.items()
            if part in content and part in parts
            for text in (f"{subject}, {content['queries'][part]} queries", *tables_of(content[part]))
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no file of 'robusthash hardening': {error!r}") from None


def _whole(number: float | None) -> str:
    return "never" if number is None else f"{number:.0f}"


def _answers_table(part: dict[str, Any]) -> list[str]:
    rows, budgets = [], []
    for search, table in part.items():
        budgets = [f"after {budget:,}" for budget in table["budgets"]]
        for shows, curve in table["shows"].items():
            rows.append([search, shows, table["clean"], *curve["wMAP"]])
    return [markdown_table(["search", "what answers show", "wMAP clean", *budgets], rows)]


def _learned_table(part: list[dict[str, Any]]) -> list[str]:
    rows = [[one["attack"], one["shows"], f"{one['in all']:,}", one["wMAP"]] for one in part]
    return [markdown_table(["attack", "what answers show", "oracle queries in all", "wMAP attacked"], rows)]


def _detection_tables(part: dict[str, Any]) -> list[str]:
    marks = list(part["attackers"][0]["wMAP"])
    head = ["search", "attacker", "attackers refused", "slowed at", "refused at", "answered of all"]
    for mark in marks:
        head += [f"wMAP after {int(mark):,}", "without detection"]
    rows = []
    for one in part["attackers"]:
        row = [
            one["search"],
            one["evasion"],
            one["refused"],
            _whole(one["slowed at"]),
            _whole(one["refused at"]),
        ]
        row.append(f"{one['answered']:.0f} of {one['budget']:,}")
        for mark in marks:
            row += [one["wMAP"][mark], one["wMAP without detection"][mark]]
        rows.append(row)
    traffic = [
        [
            one["kind"],
            one["words"],
            one["queries"],
            f"{one['slowed'] / one['queries']:.2%}",
            f"{one['refused'] / one['queries']:.2%}",
        ]
        for one in part["traffic"]
    ]
    return [
        markdown_table(head, rows),
        markdown_table(["ordinary traffic", "", "queries", "slowed", "refused"], traffic),
    ]


def _agreement_table(part: dict[str, Any]) -> list[str]:
    head = ["queries", "wMAP"]
    for bits in part["within"]:
        head += [f"refused, {bits} bits", "wMAP of the rest"]
    rows = []
    for one in part["rows"]:
        row = [one["queries"], one["wMAP"]]
        for refused, rest in zip(one["refused"], one["wMAP of the rest"], strict=True):
            row += [refused, rest]
        rows.append(row)
    return [markdown_table(head, rows)]


_TABLES: dict[str, Callable[[Any], list[str]]] = {
    "answers": _answers_table,
    "learned": _learned_table,
    "detection": _detection_tables,
    "agreement": _agreement_table,
}
