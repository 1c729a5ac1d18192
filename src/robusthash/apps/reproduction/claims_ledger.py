"""The claims of the papers, each judged by paired differences of stored results, or by a computation."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from robusthash.apps.experiment.config import Section
from robusthash.apps.experiment.config_values import validated
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.stored_analyses import Analysis
from robusthash.apps.experiment.tables import Cell, Column, parse_column
from robusthash.apps.reports.cell_text import markdown_cell
from robusthash.apps.reproduction.entry_runs import Recipes, Stored
from robusthash.apps.reproduction.paper_entries import paper
from robusthash.apps.reproduction.printed_table import number_of
from robusthash.attacks.guides import mainstay_code
from robusthash.core.labels import cosine
from robusthash.core.limited_files import parse_yaml
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.data import load_data
from robusthash.metrics.comparison import METHOD_SEEDS
from robusthash.metrics.results import EvalResult, headline_of
from robusthash.metrics.statistics import bootstrap_interval, hierarchical_interval
from robusthash.models.hasher import build_hasher, purified
from robusthash.training import OptimConfig, TrainConfig, fit

Verdict = Literal["reproduced", "reversed", "level", "open", "untestable here"]

_SMALL = 5e-4  # differences below it are written with an exponent
_ENDINGS = ("fails", "level", "holds", "open", "not run")  # of a comparison
_CHOICES = 3  # values of a choice at which a claim fails before it is called reversed


class Side(Section):
    """A weighted sum of results of one recipe; as text ``RECIPE: RESULT``.

    ``kind`` is the analysis whose numbers ``columns`` name, in place of the results of attacks.
    """

    recipe: str
    kind: Literal["results"] | Analysis = "results"
    set: list[str] = Field(default_factory=list)
    columns: dict[str, float] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            recipe, _, column = value.partition(": ")
            return {"recipe": recipe, "columns": {column: 1.0}}
        if isinstance(value, dict) and "column" in value:
            return {**{k: v for k, v in value.items() if k != "column"}, "columns": {value["column"]: 1.0}}
        return value


class Comparison(Section):
    """``first`` is ``above`` or ``below`` ``second``, by at least ``by``; a negative ``by`` is a tolerance.

    ``at`` is the value of the choice that the claim depends on. Where a plain difference is claimed (``by``
    of 0) and the whole interval lies within ``level`` of 0, both sides are level; ``level`` is 0 for
    measures in another unit than MAP.
    """

    what: str
    first: Side
    relation: Literal["above", "below"]
    second: Side
    by: float = 0.0
    at: str = ""
    level: float = Field(0.02, ge=0)


class Claim(Section):
    """A claim of a paper. It has comparisons, a computation, or the reason why it cannot be tested.

    Attributes:
        printed: the paper's figures.
        tier: net and data of the comparisons, and what differs.
        entry: the table or figure whose runs decide it, as arguments of ``robusthash reproduce``.
        depends_on: a choice (a rate, a weight), at three values of which it must fail to be reversed.
        without: what the claim is compared with in the paper and not here.
    """

    id: str
    paper: str
    statement: str
    printed: str = ""
    tier: str = ""
    entry: str = ""
    comparisons: list[Comparison] = Field(default_factory=list)
    computed: Literal["", "mainstay-code", "hasher-stays"] = ""
    untestable: str = ""
    depends_on: str = ""
    without: str = ""

    @model_validator(mode="after")
    def _decidable(self) -> Claim:
        if not (self.comparisons or self.computed or self.untestable or self.entry):
            raise ValueError(f"claim {self.id} names nothing that could decide it")
        return self


@dataclass(frozen=True)
class Finding:
    """A comparison: the difference of first and second, and whether it holds; None where undecided.

    ``means`` are those of both sides. ``level``: it does not hold since both sides are level.
    """

    what: str
    difference: Cell | None
    holds: bool | None
    reason: str = ""
    at: str = ""
    wanted: str = ""
    means: tuple[float, float] | None = None
    level: bool = False

    def text(self) -> str:
        """``mainstay to HAG: 0.504 against 0.515, -0.011 (-0.016 to -0.006), 3 seeds``."""
        name = f"{self.what} ({self.at})" if self.at else self.what
        if self.difference is None or self.means is None:
            return f"{name}: {self.reason}"
        low, _ = self.difference.interval
        digits = 0 if abs(self.difference.value) >= 1000 else 3
        value = self.difference.text(digits) if low == low else f"{self.difference.value:+.{digits}f}"
        value = value if abs(self.difference.value) >= _SMALL else f"{self.difference.value:+.1e}"
        seeds = "1 seed" if self.difference.seeds == 1 else f"{self.difference.seeds} seeds"
        return f"{name}: {' against '.join(map(_plain, self.means))}, {value}{self.wanted}, {seeds}"


def _plain(value: float) -> str:
    """Three decimals, or three digits of a number that is very small; a large one as a whole number."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict."""

    claim: Claim
    verdict: Verdict
    findings: tuple[Finding, ...]
    reason: str = ""

    @property
    def command(self) -> str:
        """The command that makes the runs which decide it."""
        return f"robusthash reproduce {self.claim.entry}" if self.claim.entry else ""

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        findings = [{**asdict(finding), "text": finding.text()} for finding in self.findings]
        claim = self.claim
        named = claim.model_dump(include={"id", "paper", "statement", "printed"})
        more = {"tier": claim.tier, "command": self.command, "reason": self.reason}
        return {**named, "verdict": self.verdict, "findings": findings, **more}


@cache
def all_claims() -> list[Claim]:
    """The claims in order. Raises ValueError for a file that says something else."""
    file = files("robusthash.apps.reproduction") / "claims.yaml"
    return [validated(Claim, each, file.name) for each in parse_yaml(file.read_text("utf-8"), file.name)]


def claims_of(name: str | None = None, entry: str | None = None) -> list[Claim]:
    """The claims of a paper that an entry decides; of all entries, and of all papers, where none is named.

    Raises:
        ValueError: no such paper or entry.
    """
    if name is None:
        return all_claims()
    claims = [claim for claim in all_claims() if claim.paper == paper(name).name]
    decided = None if entry is None else f"{name.lower()} {paper(name).entry(entry).id}"
    return [claim for claim in claims if decided in (None, claim.entry)]


def judge(claim: Claim, recipes: Recipes, stored: Stored) -> Judged:
    """The verdict on a claim.

    It is reproduced where every comparison holds beyond its interval, reversed where one fails beyond it
    (in part, where others do not), level where all are measured and none fails but for sides that are
    level, and open else; fewer than three common seeds decide nothing.
    """
    if claim.untestable:
        return Judged(claim, "untestable here", (), claim.untestable)
    if claim.computed:
        held = _COMPUTED[claim.computed]()
        return Judged(claim, "reproduced" if held else "reversed", (), "computed each time this is made")
    findings = tuple(compare_sides(each, recipes, stored) for each in claim.comparisons)
    failing = [finding for finding in findings if finding.holds is False]
    if findings and all(finding.holds for finding in findings):
        return Judged(claim, "reproduced", findings, _without(claim))
    level = all(finding.level for finding in failing)
    if level and (not failing or any(finding.difference is None for finding in findings)):
        return Judged(claim, "open", findings, _undecided(findings))
    values = {finding.at for finding in failing}
    if claim.depends_on and len(values) < _CHOICES:
        reason = f"fails at {len(values)} of the {_CHOICES} values of {claim.depends_on} that are needed"
        return Judged(claim, "open", findings, reason)
    reason = "; ".join(filter(None, (_in_part(findings), _without(claim))))
    return Judged(claim, "level" if level else "reversed", findings, reason)


def _without(claim: Claim) -> str:
    return f"without {claim.without}" if claim.without else ""


def _in_part(findings: Sequence[Finding]) -> str:
    """Counts of how comparisons end: "in part (fails in 1, holds in 2 of 3)"; empty where all are alike."""
    counts = Counter(map(_ending, findings))
    ways = [f"{way} in {counts[way]}" for way in _ENDINGS if counts[way]]
    return f"in part ({', '.join(ways)} of {len(findings)})" if len(ways) > 1 else ""


def _undecided(findings: Sequence[Finding]) -> str:
    counts = Counter(map(_ending, findings))
    if counts["not run"] == len(findings):
        return "not run"
    few = any(f.difference is not None and f.difference.seeds < METHOD_SEEDS for f in findings)
    parts = [f"holds in {counts['holds']} of {len(findings)}"]
    parts += [f"{counts[way]} {way}" for way in ("level", "not run") if counts[way]]
    return ", ".join([*parts, *([f"fewer than {METHOD_SEEDS} seeds"] if few else [])])


def _ending(finding: Finding) -> str:
    if finding.level:
        return "level"
    if finding.holds is None:
        return "open" if finding.difference else "not run"
    return "holds" if finding.holds else "fails"


def compare_sides(comparison: Comparison, recipes: Recipes, stored: Stored) -> Finding:
    """The paired difference over the seeds that both sides have; undecided below three seeds."""
    pairs = [_of_side(side, recipes, stored) for side in (comparison.first, comparison.second)]
    common = sorted(pairs[0].keys() & pairs[1].keys())
    if not common:
        sides = zip((comparison.first, comparison.second), pairs, strict=True)
        lacking = [side.recipe for side, seeds in sides if not seeds]
        reason = f"no results of {' and '.join(dict.fromkeys(lacking))}" if lacking else "no common seed"
        return Finding(comparison.what, None, None, reason, comparison.at)
    first, second = ([side[seed] for seed in common] for side in pairs)
    both = list(zip(first, second, strict=True))
    if any(one.numel() not in (1, two.numel()) and two.numel() != 1 for one, two in both):
        return Finding(comparison.what, None, None, "their queries differ", comparison.at)
    paired = all(one.numel() == two.numel() for one, two in both)
    gaps = [one - two if paired else (one.nanmean() - two.nanmean())[None] for one, two in both]
    values = torch.stack(gaps)
    known = values.isfinite().all(0)
    values = values[:, known]
    if values.shape[1] == 0:
        return Finding(comparison.what, None, None, "a side lacks the measure", comparison.at)
    cell = Cell(float(values.mean()), _interval(values), len(common), signed=True)
    wanted = f" (wanted {comparison.relation} by {comparison.by})" if comparison.by > 0 else ""
    means = _mean(first, known), _mean(second, known)
    holds = _holds(comparison, cell)
    level = holds is None and _level(comparison, cell)
    return Finding(comparison.what, cell, False if level else holds, "", comparison.at, wanted, means, level)


def _mean(of_seeds: Sequence[Tensor], known: Tensor) -> float:
    """Mean over seeds and the queries that are compared; a side may be one number."""
    alike = [v[known] if v.numel() == known.numel() else v.nanmean()[None] for v in of_seeds]
    return float(torch.stack(alike).mean())


def _interval(values: Tensor) -> tuple[float, float]:
    if len(values) > 1:
        return hierarchical_interval(values)
    return bootstrap_interval(values[0]) if values.shape[1] > 1 else (math.nan, math.nan)


def _holds(comparison: Comparison, cell: Cell) -> bool | None:
    if cell.seeds < METHOD_SEEDS:
        return None
    low, high = cell.interval if comparison.relation == "above" else (-cell.interval[1], -cell.interval[0])
    if low > comparison.by:
        return True
    return False if high < comparison.by else None


def _level(comparison: Comparison, cell: Cell) -> bool:
    """A test of equivalence: a plain difference is claimed, and none of ``level`` is there."""
    low, high = cell.interval
    return cell.seeds >= METHOD_SEEDS and comparison.by == 0 and max(-low, high) < comparison.level


def _of_side(side: Side, recipes: Recipes, stored: Stored) -> dict[int, Tensor]:
    """Values by training seed: of each query, or one number where a measure has none of them."""
    _, config = recipes.config(side.recipe, tuple(side.set))
    by_seed: dict[int, Tensor] = {}
    for run in stored.of_model(config):
        seed = run.config.runtime.seed
        if seed in by_seed:
            continue
        found = _named_values(side, run, stored)
        if side.columns.keys() <= found.keys():
            parts = [weight * found[name] for name, weight in side.columns.items()]
            by_seed[seed] = sum(parts[1:], parts[0])
    return by_seed


def _named_values(side: Side, run: Run, stored: Stored) -> dict[str, Tensor]:
    """Values of the columns of a side, as far as a run has them."""
    if side.kind != "results":
        return stored.analysis(run, side.kind)
    results = stored.results(run)
    try:
        columns = {text: parse_column(text, results) for text in side.columns}
    except ValueError:  # this run was not attacked so
        return {}
    return {text: _values(results[column.result], column) for text, column in columns.items()}


def _values(result: EvalResult, column: Column) -> Tensor:
    measure = column.measure or headline_of(result)
    if measure in result.per_query:
        return result.per_query[measure].to(torch.float64)
    number = number_of(result, measure)
    return torch.tensor([math.nan if number is None else number], dtype=torch.float64)


def _mainstay_least() -> bool:
    """The mainstay code has the least weighted distance sum of all codes of 8 bits, for random labels."""
    draws, bits, ids = Draws(0, ("claims",)), 8, torch.arange(40)
    codes = torch.where(draws.within("codes").uniform(ids, (bits,)) < 0.5, -1.0, 1.0)
    labels = (draws.within("labels").uniform(ids, (6,)) < 0.3).float()
    labels[:, 0] = (labels.sum(1) == 0).float()
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)))
    weights = cosine(labels, labels)
    positive = (weights > 0).float()
    signed = weights / weights.sum(1, keepdim=True) - (1 - positive) / (1 - positive).sum(1, keepdim=True)
    sums = signed @ ((bits - codes @ every.T) / 2)  # (items, 2^bits)
    chosen = ((mainstay_code(labels, codes, labels)[:, None] - every).abs().sum(2) == 0).float().argmax(1)
    return bool((sums.gather(1, chosen[:, None])[:, 0] <= sums.amin(1) + 1e-5).all())


def _hasher_stays() -> bool:
    """An epoch of DRFGD's training changes its purifier, and no bit of the hasher."""
    data = load_data("synthetic", texts=False, train=64, query=8, database=16)
    purifiers = {"image": {"name": "drfgd-image", "width": 4}}
    hasher = purified(build_hasher(image={"name": "small", "width": 4}, bits=8), purifiers, "query")
    parts = {name: module for name, module in hasher.named_children() if name != "purifiers"}
    before, purifier = copy.deepcopy(parts), copy.deepcopy(hasher.purifiers)
    objective, attack = build("objective", "dpsh"), build("attack", {"name": "drfgd", "steps": 1})
    recipe = build("recipe", "regenerate", hasher=hasher, objective=objective, attack=attack)
    groups = {name: OptimConfig("adam", 1e-3) for name in ("purifier", "critic")}
    fit(recipe, data, TrainConfig(epochs=1, batch_size=32, optim=groups))
    stays = all(_alike(before[name], module) for name, module in parts.items())
    return stays and not _alike(purifier, hasher.purifiers)


def _alike(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


_COMPUTED: dict[str, Callable[[], bool]] = {"mainstay-code": _mainstay_least, "hasher-stays": _hasher_stays}


def ledger_markdown(ledger: Sequence[Judged]) -> str:
    """A table a paper, below the number of claims by verdict."""
    verdicts = [judged.verdict for judged in ledger]
    order: tuple[Verdict, ...] = ("reproduced", "reversed", "level", "open", "untestable here")
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in order)
    parts = [f"{len(ledger)} claims: {counts}."]
    for name in dict.fromkeys(judged.claim.paper for judged in ledger):
        lines = [f"## {name}", "", "| id | claim | verdict | measured | net and data | runs |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        lines += [_line(judged) for judged in ledger if judged.claim.paper == name]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(judged: Judged) -> str:
    claim = judged.claim
    printed = f" (paper: {claim.printed})" if claim.printed else ""
    measured = "; ".join(found.text() for found in judged.findings if found.difference is not None)
    verdict = f"{judged.verdict}: {judged.reason}" if judged.reason else judged.verdict
    cells = [claim.id, claim.statement + printed, verdict, measured, claim.tier]
    command = f"`{judged.command}`" if judged.command else ""
    return f"| {' | '.join([*map(markdown_cell, cells), command])} |"
