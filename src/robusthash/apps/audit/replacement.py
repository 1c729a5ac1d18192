"""The replacement of an audited search: the packaged hash for copies, measured on the same photographs
under the same changes and attacks; or, where copies are not what is searched for, hardening.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from torch import Tensor, nn

from robusthash.apps.audit.measured_rows import AuditPlan, AuditRow, MeasuredAudit
from robusthash.apps.audit.searches_by_code import measure_codes
from robusthash.apps.audit.targets import AuditOptions, Target, open_target, size_of
from robusthash.apps.audit.verdict import HELD, counted, share_found
from robusthash.apps.image_hash.copy_hash import MOST, NAME, RADIUS, plain, proved_levels
from robusthash.core.runtime import packaged
from robusthash.data.transforms import to_pixels
from robusthash.models.encoding import encode_signs
from robusthash.models.external.loaders import NAMES, perceptual
from robusthash.models.external.model_answers import AS_IT_IS

logger = logging.getLogger(__name__)

Level = Literal["better", "mixed", "level", "worse", "failed", "harden", "not measured"]
Outcome = Literal["better", "worse", "level"]

_CLEAR = 0.05  # p of Fisher's exact test from which on two counts do not differ
_PAIRS = 0.01  # difference of two shares of false matches that counts
_TIMES = 20  # hashes of which the time is the median

_HARDEN = (
    f"{NAME} finds copies and no kinds, so it is no replacement here. Train a model on attacked images "
    "instead, such as by recipes/fashion-robust.yaml or a recipe of SAAT with your data "
    "(docs/methods/own-recipe.md), and audit that run."
)
_ASK = (
    f"Whether {NAME}, the hash for copies of this package, would do better was not measured, as nothing says "
    "that this search is for copies; if it is, audit with --replacement (replacement=True in Python)."
)


@dataclass(frozen=True)
class Compared:
    """One number of the audited search and of the replacement.

    Args:
        asked: photographs that a share is of; 0 where it is no share of photographs.
        audited, replacement: a share of the photographs or of pairs of them, or milliseconds; of a search
            that shows no time, None.
        outcome: of the replacement; counts of photographs differ by Fisher's exact test at 5 %, times are not
            judged.
    """

    what: str
    audited: float | None
    replacement: float
    asked: int = 0
    outcome: Outcome | None = None

    def texts(self) -> tuple[str, str]:
        """Both numbers as a reader takes them: ``9 of 12``, ``0.3 %``, ``1.2 ms``."""
        return self._text(self.audited), self._text(self.replacement)

    def _text(self, value: float | None) -> str:
        if value is None:
            return "unknown"
        if self.asked:
            return f"{counted(value, self.asked)} of {self.asked}"
        return f"{value:.1f} ms" if self.what == _TIME else f"{value:.1%}"


@dataclass(frozen=True)
class Replacement:
    """The replacement of an audited search, in words and numbers.

    Args:
        level: ``better``: clearly so in a number and clearly worse in none; ``mixed``: both; ``level``:
            neither; ``harden`` and ``not measured``: no numbers.
        said: in words, with the numbers.
        rows: the replacement's own rows, as those of the audited search.
    """

    level: Level
    said: str
    compared: tuple[Compared, ...] = ()
    rows: tuple[AuditRow, ...] = ()
    radius: float | None = None
    size: int | None = None  # pixels a side
    proved: int | None = None  # photographs that provably no change within the budget hides

    def plain(self) -> dict[str, Any]:
        """As ``audit.json`` has it."""
        compared = [{**asdict(each), "texts": each.texts()} for each in self.compared]
        return {"name": NAME, **asdict(self), "compared": compared}


_EVERYDAY, _HIDDEN = "{word} after the worst everyday change", "{word} under the worst attack"
_TAKEN, _FALSE = "taken for another on purpose", "different photographs that match by accident"
_TIME = "time of a hash"


def is_copy_hash(target: str | nn.Module) -> bool:
    """True for the packaged hash, by its name or its folder."""
    return isinstance(target, str) and (target == NAME or Path(target).resolve() == packaged(NAME).resolve())


def check_replacement(target: Target, options: AuditOptions) -> bool:
    """True where the packaged hash is to be measured too; a ValueError where it cannot take the place."""
    if options.replacement and target.purpose == "other":
        raise ValueError(
            f"{target.name} was trained to find kinds, and {NAME} finds copies alone; leave --replacement out"
        )
    return target.purpose == "this" if options.replacement is None else options.replacement


def without_numbers(target: Target, options: AuditOptions, level: str) -> Replacement | None:
    """Words on a search with which nothing is compared; none where it held, or nobody wants any."""
    if options.replacement is False or level == "held":
        return None
    if target.purpose == "other" or options.labels:
        return Replacement("harden", _HARDEN)
    return Replacement("not measured", _ASK)


def measure_replacement(plan: AuditPlan, measured: MeasuredAudit, alarm: str = "") -> Replacement:
    """The packaged hash compared with an audited search; where it fails or is interrupted, the reason.

    Args:
        alarm: why the audited numbers may be too good; "" where they are sound.
    """
    try:
        return _measured(plan, measured, alarm)
    except (Exception, KeyboardInterrupt) as error:  # the audit itself is done and goes on
        logger.debug("the replacement was not measured", exc_info=True)
        reason = "it was interrupted" if isinstance(error, KeyboardInterrupt) else f"{error or type(error)}"
        return Replacement("failed", f"{NAME} was to be measured on the same photographs, but {reason}.")


def _measured(plan: AuditPlan, measured: MeasuredAudit, alarm: str) -> Replacement:
    own = _plan(plan)
    found = measure_codes(own, checks=False)
    compared = _compared(plan, measured, found)
    times = _milliseconds(plan.target, plan.images[:1]), _milliseconds(own.target, own.images[:1])
    if times[1] is not None:
        compared.append(Compared(_TIME, times[0], times[1]))
    level = _level([each.outcome for each in compared])
    proved = _proved(own) if plan.by_radius else None
    hidden = next(row for row in found.rows if row.kind == "hide-worst")
    said = _said(level, plan, compared, alarm)
    flat = int(plain(own.photos.first(len(own.photos))).sum())
    if flat:
        said += f" {flat} of the {len(own.photos)} photographs are plain: it says little of those, and "
        said += "robusthash hash and duplicates match them with nothing."
    if level == "better" and (share := share_found(hidden, plan.by_radius)) < HELD:
        said += (
            f" It is no full protection: {counted(1 - share, hidden.asked)} of {hidden.asked} hid from it."
        )
    if proved is not None:
        levels = f"{own.options.eps * 255:g} of 255 levels"
        said += (
            f" Proved, whatever the attack: {proved} of the {len(own.photos)} photographs cannot be hidden "
            f"from it by a change of their square of 64 px within {levels}."
        )
    side = own.photos.pixels.shape[-1]
    return Replacement(level, said, tuple(compared), found.rows, found.radius, side, proved)


def _proved(own: AuditPlan) -> int | None:
    """Photographs that no change within the audit's budget hides from the packaged hash."""
    needed = math.ceil(255 * own.options.eps - 1e-6)
    if needed > MOST:
        return None
    return sum(level >= needed for level in proved_levels(own.photos.first(len(own.photos))))


def _plan(plan: AuditPlan) -> AuditPlan:
    """The packaged hash at its own size and radius; followed by attackers only as the audited search is."""

    def progress(done: int, total: int, what: str) -> None:
        plan.progress(done, total, f"the same with {NAME}: {what}")

    radius = RADIUS[256] if plan.by_radius else None
    folder = str(packaged(NAME))
    photos = plan.photos.at(size_of(folder, None), plan.options.max_pixels)
    target = open_target(folder, photos.first(1))
    options = replace(plan.options, radius=None, reading=AS_IT_IS, labels=False, bits=None, size=None)
    target = replace(target, radius=radius, gradients=plan.target.gradients)
    return AuditPlan(target, photos, None, options, progress)


# ------------------------------------------------------------------------------------------------ numbers


def _compared(plan: AuditPlan, audited: MeasuredAudit, own: MeasuredAudit) -> list[Compared]:
    by_radius = plan.by_radius
    word = "counted as the same" if by_radius else "found first"

    def shares(rows: Sequence[AuditRow], kind: str) -> list[tuple[float, int]]:
        return [(share_found(row, by_radius), row.asked) for row in rows if row.kind == kind]

    compared = []
    for what, kind in ((_EVERYDAY, "everyday"), (_HIDDEN, "hide-worst"), (_TAKEN, "imitate-worst")):
        theirs, ours = shares(audited.rows, kind), shares(own.rows, kind)
        if theirs and ours:
            (one, asked), (other, _) = min(theirs), min(ours)
            outcome = _outcome(one, other, asked, lower=what == _TAKEN)
            compared.append(Compared(what.format(word=word), one, other, asked, outcome))
    if by_radius and audited.false_matches is not None and own.false_matches is not None:
        gain = audited.false_matches - own.false_matches
        level: Outcome = "level" if abs(gain) <= _PAIRS else "better" if gain > 0 else "worse"
        compared.append(Compared(_FALSE, audited.false_matches, own.false_matches, outcome=level))
    return compared


def _outcome(audited: float, own: float, asked: int, lower: bool) -> Outcome:
    """The outcome of the second of two shares of ``asked`` photographs; ``lower`` is better."""
    from scipy.stats import fisher_exact  # a second to import

    counts = [round(share * asked) for share in (audited, own)]
    if fisher_exact([[count, asked - count] for count in counts]).pvalue > _CLEAR:
        return "level"
    return "better" if (own < audited) == lower else "worse"


def _level(outcomes: Sequence[Outcome | None]) -> Level:
    if "better" in outcomes:
        return "mixed" if "worse" in outcomes else "better"
    return "worse" if "worse" in outcomes else "level"


def _milliseconds(target: Target, image: Tensor) -> float | None:
    """Median time of the hash of one image, decoding and resizing aside; None of an endpoint."""
    if target.endpoint is not None or target.hasher is None:
        return None
    run: Callable[[], object] = partial(encode_signs, target.hasher, "image", image, 1)
    if target.name in NAMES:  # the library's own time, without that of the gradient's form
        run = partial(perceptual(target.name).compute, to_pixels(image)[0])
    run()
    times = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


# -------------------------------------------------------------------------------------------------- words


def _said(level: Level, plan: AuditPlan, compared: Sequence[Compared], alarm: str) -> str:
    better, worse = (
        " and ".join(each.what for each in compared if each.outcome == outcome)
        for outcome in ("better", "worse")
    )
    here = "on these photographs, under the same changes and attacks"
    first = {
        "better": f"Use {NAME} instead (robusthash hash FILE, robusthash duplicates DIR); {here}",
        "mixed": f"{NAME} is clearly better in some ({better}) and worse in others ({worse}) {here}",
        "level": f"{NAME}, the hash for copies of this package, is not clearly better {here}",
        "worse": f"Do not take {NAME} instead: it is clearly worse {here}",
    }[level]
    title = plan.target.title
    numbers = "; ".join(
        f"{each.what}: {ours} ({title}: {theirs})" for each in compared for theirs, ours in [each.texts()]
    )
    notes = [
        "" if plan.target.gradients else " Both were attacked by questions alone.",
        f" The numbers of {title} may be too good, as its checks are red." if alarm else "",
        f" {NAME} finds copies, and no kinds." if plan.options.labels else "",
        " A model that is learned can be hardened too: recipes/copies-saat.yaml."
        if level != "better" and plan.target.name not in NAMES
        else "",
    ]
    return f"{first}: {numbers}.{''.join(notes)}"
