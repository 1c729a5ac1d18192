"""Certified MAP: the mean over queries of an AP that no change inside a budget can push below.

Queries are encoded by a smoothed code (or, over L-inf balls, by the hasher itself with interval bounds);
the database is the frozen one of the context, by the base hasher: its codes are given numbers, whoever made
them, so no error of theirs enters, an index need not be made again, and learned codes work as they are.

The least AP of m free bits: the distance of an item lies in [d, d + m], d that of the fixed bits. The ranking
in which every relevant item is as far and every other one as near as it can be, with ties against the query,
bounds the AP of any of the 2^m codes. Some free bits are enumerated and only the rest is bounded so; where
all are enumerated the minimum is exact. The bound is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Norm, threat_on
from robusthash.core.labels import relevant
from robusthash.core.runtime import Progress, silent
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack, RefinedAttack
from robusthash.evaluation.code_measures import measure_codes
from robusthash.evaluation.context import EvaluationContext, encoding_batch
from robusthash.metrics.average_precision import Denominator, average_precision
from robusthash.metrics.protocol import Protocol
from robusthash.robustness.certificates.certified_codes import (
    BoundedCodes,
    Cached,
    CertifiedCodes,
    SmoothedCodes,
)
from robusthash.robustness.suite import tier

ENUMERATED = 10
"""Most free bits that are enumerated: up to this number, the minimum is exact."""

_CELLS = 1 << 25  # pairs of a branch and an item that are looked at for one query


def least_ap(
    sign: Tensor, free: Tensor, database: Tensor, relevant: Tensor, protocol: Protocol, most: int = ENUMERATED
) -> float:
    """A lower bound of the AP of every code that agrees with ``sign`` on the bits that are not free.

    Args:
        sign: (K,) in {-1, +1}.
        free: (K,) bool.
        database: (N, K) signs of the items.
        relevant: (N,) bool.
        protocol: its cut, denominator and order of ties.
        most: free bits that are enumerated; fewer in a large database. As many as are free: exact, but for
            ties of a protocol in legacy order, which count against the query.

    Raises:
        ValueError: the denominator ``first-k-relevant``.
    """
    if protocol.ap == "first-k-relevant":
        raise ValueError("no least AP is known for the denominator 'first-k-relevant'; use another protocol")
    if not bool(relevant.any()):
        return 0.0
    ones = (database > 0).to(torch.float32)
    apart = ones != (sign > 0)
    split = _branched(ones, free, relevant, min(most, (_CELLS // len(database)).bit_length() - 1))
    rest = int(free.sum()) - len(split)
    fixed = apart[:, ~free].sum(1)
    values = torch.arange(1 << len(split))[:, None] >> torch.arange(len(split)) & 1
    lowest, step = 1.0, max(1, (1 << 22) // len(database))
    for part in values.to(torch.float32).split(step):
        of = ones[:, split]
        near = fixed + (of.sum(1) + part.sum(1, keepdim=True) - 2 * part @ of.T).long()  # (branches, N)
        lowest = min(lowest, _lowest(near, rest, relevant, len(sign), protocol))
    return lowest


def _branched(ones: Tensor, free: Tensor, relevant: Tensor, most: int) -> Tensor:
    """Positions of the free bits to enumerate: those that tell relevant items best from the others."""
    places = torch.nonzero(free).flatten()
    others = ones[~relevant].mean(0) if not bool(relevant.all()) else ones.mean(0)
    order = (ones[relevant].mean(0) - others).abs()[places].argsort(descending=True, stable=True)
    return places[order[: max(0, most)]]


def _lowest(near: Tensor, rest: int, relevant: Tensor, bits: int, protocol: Protocol) -> float:
    """The least AP over branches, of (branches, N) smallest distances and ``rest`` bits that stay free."""
    far = torch.where(relevant, near + rest, near)
    places = far + (bits + 1) * torch.arange(len(near))[:, None]
    size = len(near) * (bits + 1)
    items = torch.bincount(places.flatten(), minlength=size).view(len(near), bits + 1)
    relevant_counts = torch.bincount(places[:, relevant].flatten(), minlength=size).view(len(near), bits + 1)
    if rest == 0 and protocol.ties == "expected":
        exact: Denominator = protocol.ap  # type: ignore[assignment]
        return float(average_precision(items, relevant_counts, protocol.k, exact).min())
    # fewer hits may raise the mean over them; that over min(R, k) is never larger, and falls with every item
    divisor: Denominator = "rel" if protocol.ap == "rel" else "mink"
    return float(average_precision(items, relevant_counts, protocol.k, divisor, "pessimistic").min())


Method = Literal["smoothing", "intervals"]
RADII: dict[Method, tuple[float, ...]] = {"smoothing": (0.25, 0.5, 1.0), "intervals": (1 / 255, 2 / 255)}
"""Budgets by method: l2 lengths in units of the range [0, 1], and L-inf sizes."""
BLOCK = 32  # queries whose votes are counted, and that are attacked, at a time


@dataclass(frozen=True)
class CertifiedMAP:
    """The interval of one budget: no attack goes below ``certified``, one of the suite reached ``attacked``.

    ``below`` counts queries whose attacked AP lies under their certificate: 0, but for errors of the votes.
    """

    radius: float
    bits: float  # certified, mean over queries
    certified: float
    attacked: float | None  # mean over queries of the lowest AP found; None where no attack was run
    below: int


@dataclass(frozen=True)
class Certificate:
    """Result of ``certify``; the bounds of each query hold together with probability 1 - ``alpha``.

    ``sigma``, ``samples`` and ``alpha`` are 0 of intervals, which are no statistics.
    """

    method: Method
    norm: Norm
    sigma: float
    samples: int
    alpha: float
    queries: int
    bits: int
    direction: str
    headline: str
    base: float  # MAP of the hasher without noise
    clean: float  # MAP of the codes that are certified
    abstained: float  # bits that abstain, mean over queries
    attacks: tuple[str, ...]
    rows: tuple[CertifiedMAP, ...]
    per_query: dict[str, list[float]] = field(repr=False)  # AP: "clean", and by budget "certified 0.25"
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``smoothing 0.25``, with its sigma, or ``intervals``."""
        return f"{self.method} {self.sigma:g}" if self.sigma else self.method

    def plain(self) -> dict[str, Any]:
        return {"schema": "robusthash.certificate/1", "name": self.name, **asdict(self)}


def certify(
    context: EvaluationContext,
    method: Method = "smoothing",
    *,
    sigma: float = 0.25,
    samples: int = 1000,
    alpha: float = 0.001,
    radii: Sequence[float] | None = None,
    queries: int | None = 100,
    attacks: str | None = "fast",
    kept: Cached = lambda name, work: work(),
    progress: Progress = silent,
) -> Certificate:
    """Certify the MAP of image queries, and attack them by the suite inside the same budgets.

    Args:
        method: ``smoothing``, of any hasher, by l2 radius; or ``intervals``, of small nets, by L-inf budget.
        sigma: of the noise, in units of the range [0, 1].
        samples: under noise, of each query: for its certificate, and for each attacked input.
        alpha: probability that any bound of a query fails.
        radii: budgets; ``RADII`` of the method by default.
        queries: number of them, chosen by content; None takes all.
        attacks: tier of the suite whose gradient attacks are run, by the mean gradient over 20 draws of the
            noise; None runs none.
        kept: keeps what was computed, so that a stopped call goes on.

    Raises:
        ValueError: queries that are no images, a search without bits, a layer without interval bounds, or
            numbers out of range.
    """
    budgets = checked_budgets(method, sigma, samples, alpha, radii)
    context = context if queries is None else context.some(queries)
    size = context.encoded_by or encoding_batch(context.batch_size)
    context = replace(context, batch_size=BLOCK, encoded_by=size)
    if context.direction[0] != "image":
        raise ValueError(f"certificates are for image queries, and these are {context.direction[0]}s")
    smoothing = method == "smoothing"
    noise = (sigma, samples, alpha)
    model: CertifiedCodes = (
        SmoothedCodes(context, kept, progress, *noise) if smoothing else BoundedCodes(context, kept, progress)
    )
    clean = _ap(context, model.signs)
    free = {radius: model.free(radius) for radius in budgets}
    columns = {
        f"certified {radius:g}": torch.where(clean.isnan(), clean, ap)  # queries that the protocol leaves out
        for radius, ap in _least(context, model.signs, free, progress).items()
    }
    names: tuple[str, ...] = ()
    if attacks is not None:
        reached, names = _attacked(model, attacks, budgets, clean, progress)
        columns |= {f"attacked {radius:g}": ap for radius, ap in reached.items()}
    rows = tuple(_row(radius, free[radius], columns) for radius in budgets)
    return Certificate(
        method=method,
        norm=model.norm,
        sigma=sigma if smoothing else 0.0,
        samples=samples if smoothing else 0,
        alpha=alpha if smoothing else 0.0,
        queries=len(context.queries),
        bits=context.victim.bits,
        direction="2".join(part[0].upper() for part in context.direction),
        headline=context.protocol.headline,
        base=float(_ap(context, context.query_codes.signs()).nanmean()),
        clean=float(clean.nanmean()),
        abstained=float(model.free(0.0).sum(1).double().mean()),
        attacks=names,
        rows=rows,
        per_query={name: ap.tolist() for name, ap in {"clean": clean, **columns}.items()},
        notes=(*context.notes, *model.notes(budgets), *_below(rows)),
    )


def checked_budgets(
    method: Method,
    sigma: float = 0.25,
    samples: int = 1000,
    alpha: float = 0.001,
    radii: Sequence[float] | None = None,
    **others: Any,
) -> tuple[float, ...]:
    """The budgets of ``certify``, rising; a ValueError where one of its numbers is out of range."""
    radii = RADII.get(method, ()) if radii is None else radii
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be above 0 and finite, such as 0.25, got {sigma!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, such as 1000, got {samples!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, such as 0.001, got {alpha!r}")
    if not radii or not all(0 < radius < math.inf for radius in radii):
        raise ValueError(f"radii must be above 0 and finite, such as 0.25, got {list(radii)}")
    if method == "intervals" and max(radii) > 1:
        raise ValueError(f"the L-inf budget {max(radii):g} is beyond the range of 0 to 1; write 1/255, not 1")
    return tuple(sorted(set(radii)))


def _ap(context: EvaluationContext, signs: Tensor) -> Tensor:
    """(Q,) float64 AP of (Q, K) signs in place of the queries, by the headline of the protocol."""
    protocol = replace(context.protocol, measures=(context.protocol.headline,))
    measured = measure_codes(
        replace(context, protocol=protocol), context.query_codes.of(signs), context.query_labels
    )
    return measured.per_query[protocol.headline]


def _least(
    context: EvaluationContext, signs: Tensor, free: dict[float, Tensor], progress: Progress
) -> dict[float, Tensor]:
    """(Q,) least AP of each query by budget; a bound at a larger one holds at a smaller one too."""
    database, labels = context.codes.signs(), context.database_labels
    least = {radius: torch.zeros(len(signs), dtype=torch.float64) for radius in free}
    for row, sign in enumerate(signs):
        relevant_items = relevant(context.query_labels[row : row + 1], labels)[0]
        floor = 0.0
        for radius in sorted(free, reverse=True):
            floor = max(floor, least_ap(sign, free[radius][row], database, relevant_items, context.protocol))
            least[radius][row] = floor
        progress(row + 1, len(signs), "least AP")
    return least


def _attacked(
    model: CertifiedCodes, name: str, budgets: Sequence[float], clean: Tensor, progress: Progress
) -> tuple[dict[float, Tensor], tuple[str, ...]]:
    """(Q,) lowest AP by budget, and the attacks; what is found in a ball lies in every larger one."""
    lowest, reached, names = clean, dict[float, Tensor](), list[str]()
    for radius in budgets:
        suite = tier(name, threat_on("image", radius, model.norm, "W2"))
        specs = [spec for spec in suite.specs if _untargeted(spec)]
        names = [spec.name for spec in specs]
        for spec in specs:
            assert isinstance(spec, GradientAttack)
            for restart in range(spec.restarts):
                title = f"{spec.name} within {radius:g}"
                lowest = torch.minimum(
                    lowest, _ap(model.context, model.attacked(spec, restart, title, progress))
                )
        reached[radius] = lowest
    return reached, tuple(names)


def _untargeted(spec: AttackSpec) -> bool:
    return not spec.targeted and not isinstance(spec, RefinedAttack)


def _row(radius: float, free: Tensor, columns: dict[str, Tensor]) -> CertifiedMAP:
    least, reached = columns[f"certified {radius:g}"], columns.get(f"attacked {radius:g}")
    return CertifiedMAP(
        radius=radius,
        bits=float((~free).sum(1).double().mean()),
        certified=float(least.nanmean()),
        attacked=None if reached is None else float(reached.nanmean()),
        below=0 if reached is None else int((reached < least - 1e-9).sum()),
    )


def _below(rows: Sequence[CertifiedMAP]) -> tuple[str, ...]:
    return tuple(
        f"{row.below} attacked queries lie below their certificate of {row.radius:g}: majorities at attacked "
        "inputs are estimates; take more samples"
        for row in rows
        if row.below
    )
