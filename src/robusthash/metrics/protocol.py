"""Protocols: which measures are reported, with which cut, denominator, tie rule and policy for empty queries.

A number without its protocol is not a result. The names of measures are a small language:

``MAP``, ``MAP@5000``
    over the whole database, or the top k, with the denominator and tie rule of the protocol
``MAP@5000/mink``
    ``/hits``, ``/mink``, ``/rel``, ``/first-k-relevant`` name the denominator
``MAP/pessimistic``
    ``/expected``, ``/optimistic``, ``/pessimistic``, ``/legacy`` name the order within ties
``tie_gap@5000``
    optimistic minus pessimistic MAP
``P@100``, ``R@100``, ``P@r<=2``
    precision and recall of the top k, precision within a Hamming radius
``nDCG@100/lin``, ``ACG@100``, ``WAP``
    graded; ``/exp`` or ``/lin`` names the gain of nDCG, the others have linear gain
``PR``, ``PR/radius``, ``P@N``, ``PR/area``
    curves, stored next to the numbers, and the area under ``PR``
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robusthash.core.labels import draw_targets
from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Codes, Profile
from robusthash.metrics import ranking_measures as measures
from robusthash.metrics.distance_histogram import code_profile
from robusthash.metrics.ranking_measures import Empty, Gain, LegacyDenominator

I2I, I2T, T2I, T2T = ("image", "image"), ("image", "text"), ("text", "image"), ("text", "text")
Order = Literal["expected", "optimistic", "pessimistic", "legacy"]

CURVES = ("PR", "PR/radius", "P@N")
TARGETS = 3  # of each query, the default of every protocol
_DENOMINATORS = get_args(LegacyDenominator)
_OPTIONS: dict[str, tuple[str, ...]] = {
    "MAP": (*_DENOMINATORS, *get_args(Order)),
    "tie_gap": ("hits", "mink", "rel"),
    "nDCG": get_args(Gain),
    "PR": ("area",),
}
_NAME = re.compile(
    r"(?P<base>MAP|tie_gap|P|R|nDCG|ACG|WAP|PR)(@(?P<k>\d+))?(@r<=(?P<radius>\d+))?(?P<options>(/[a-z-]+)*)"
)


@dataclass(frozen=True)
class TargetRule:
    """Target labels for t-MAP, ``count`` a query (see ``draw_targets``); fewer are the first of more."""

    count: int = TARGETS  # targets per query; the mean over them is the headline
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"targets per query must be a whole number of at least 1, got {self.count!r}")

    def draw(self, query_labels: Tensor, ids: Tensor, database_labels: Tensor) -> Tensor:
        """(Q, count, C) label sets, all zero for a query without a possible target."""
        return draw_targets(query_labels, ids, database_labels, self.count, Draws(self.seed))


@dataclass(frozen=True)
class Measure:
    """A parsed measure name."""

    name: str
    base: str
    k: int | None
    radius: int | None
    denominator: LegacyDenominator
    ties: Order
    gain: Gain


@dataclass(frozen=True)
class Protocol:
    """Rules by which codes are scored.

    Raises:
        ValueError: an unknown measure or word, k below 1, or ``first-k-relevant`` outside legacy order.
    """

    name: str
    measures: tuple[str, ...]  # the headline among them
    directions: tuple[tuple[str, str], ...] = (I2I, I2T, T2I, T2T)  # (query, database), where present
    ap: LegacyDenominator = "hits"
    k: int | None = None  # the cut of the headline; None is the whole database
    ties: Literal["expected", "legacy"] = "expected"
    empty: Empty = "zero"
    gain: Gain = "exp"
    targets: TargetRule = field(default_factory=TargetRule)

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"protocol {self.name!r}: k must be at least 1, got {self.k}; all is k=None")
        for key, value, known in (
            ("ap", self.ap, _DENOMINATORS),
            ("ties", self.ties, ("expected", "legacy")),
            ("empty", self.empty, get_args(Empty)),
            ("gain", self.gain, get_args(Gain)),
        ):
            if value not in known:
                raise ValueError(f"protocol {self.name!r}: {key} {value!r} is none of {', '.join(known)}")
        if self.headline not in self.measures:
            raise ValueError(f"protocol {self.name!r} must measure its headline {self.headline!r}")
        for name in self.measures:
            self.parse(name)

    @property
    def headline(self) -> str:
        """The measure that worst cases, chance and summary scores refer to."""
        return "MAP" if self.k is None else f"MAP@{self.k}"

    def parse(self, name: str) -> Measure:
        """The meaning of a measure name under this protocol.

        Raises:
            ValueError: for a name that is not in the language above.
        """
        if name in CURVES:
            return Measure(name, name, None, None, self.ap, "expected", self.gain)
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no measure; examples: MAP, MAP@5000/mink, P@r<=2, nDCG@100")
        base, options = match["base"], match["options"].split("/")[1:]
        k, radius = (int(number) if number else None for number in match.group("k", "radius"))
        for option in options:
            if option not in _OPTIONS.get(base, ()):
                raise ValueError(f"{name!r}: {base} takes no option {option!r}")
        needs_k = (base in ("P", "R") and radius is None) or (base == "PR" and options != ["area"])
        misplaced = (radius is not None and base != "P") or (k and base in ("WAP", "PR"))
        if k == 0 or (k is None and needs_k) or misplaced:
            raise ValueError(f"{name!r} is no measure: its cut is missing, 0, or out of place")
        denominator = next((option for option in options if option in _DENOMINATORS), self.ap)
        ties = next((option for option in options if option in get_args(Order)), self.ties)
        if base == "tie_gap" and denominator == "first-k-relevant":
            raise ValueError(f"{name!r}: a tie gap exists for hits, mink and rel; write {name}/hits")
        if base == "MAP" and denominator == "first-k-relevant" and ties != "legacy":
            raise ValueError(f"{name!r}: first-k-relevant exists in legacy order only")
        gain = next((option for option in options if option in get_args(Gain)), self.gain)
        return Measure(name, base, k, radius, denominator, ties, gain)  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        """The protocol as plain JSON values, as results carry it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Measured:
    """The values of one set of queries under a protocol."""

    values: dict[str, float]  # the mean of each measure
    per_query: dict[str, Tensor]  # (Q,) float64, NaN for a query that the mean leaves out
    empty: int  # queries with nothing relevant in the database
    reference: dict[str, float]  # chance of the headline, "chance/NAME" of other cuts and denominators, least
    curves: dict[str, dict[str, Tensor]]  # by curve, axis -> (G,) means over queries
    notes: tuple[str, ...]  # clipped cuts, undefined measures


def measure(
    protocol: Protocol,
    query: Codes,
    query_labels: Tensor,
    database: Codes,
    labels: Tensor,
    *,
    profile: Profile | None = None,
) -> Measured:
    """Score codes under a protocol.

    Args:
        query_labels, labels: (Q, C) and (N, C) multi-hot; for t-MAP the target labels of the queries.
        profile: of the same codes and labels, where it is known already.
    """
    profile = code_profile(query, query_labels, database, labels) if profile is None else profile
    legacy = {}
    for name in protocol.measures:
        parsed = protocol.parse(name)
        if parsed.base == "MAP" and parsed.ties == "legacy":
            legacy[name] = measures.legacy_average_precision(
                query, query_labels, database, labels, parsed.k, parsed.denominator
            )
    return measure_profile(protocol, profile, legacy)


def measure_profile(
    protocol: Protocol, profile: Profile, legacy: dict[str, Tensor] | None = None
) -> Measured:
    """Score a profile under a protocol.

    Args:
        legacy: (Q,) values of the measures in legacy order, by name, which no profile knows.
    """
    size = measures.database_size(profile)
    total = measures.total_relevant(profile)
    no_relevant = total == 0
    values: dict[str, float] = {}
    per_query: dict[str, Tensor] = {}
    reference: dict[str, float] = {}
    curves: dict[str, dict[str, Tensor]] = {}
    notes: list[str] = []

    def mean(array: Tensor) -> tuple[float | None, Tensor]:
        return measures.mean_over_queries(array, no_relevant, protocol.empty)

    for name in protocol.measures:
        parsed = protocol.parse(name)
        if name in CURVES:
            rows = ~no_relevant if protocol.empty == "skip" or name != "P@N" else torch.ones_like(no_relevant)
            if not rows.any():
                notes.append(f"{name} is undefined: no query has a relevant item")
            elif name == "P@N" and size < 100:
                notes.append(f"P@N is undefined: its grid starts at 100 and the database has {size} items")
            else:
                curves[name] = _curve(name, profile, rows)
            continue
        if parsed.radius is not None and parsed.radius > profile.bits:
            notes.append(f"{name} is undefined: the codes have {profile.bits} bits")
            continue
        if parsed.k is not None and parsed.k > size:
            notes.append(f"{name}: k clipped to the {size} items of the database")
        average, per_query[name] = mean(_values(parsed, profile, legacy or {}))
        if average is None:
            notes.append(f"{name} is undefined: it has a value for no query")
        else:
            values[name] = average
        if parsed.base == "MAP":
            key, random_order = _chance(parsed, protocol, profile)
            expected, _ = mean(random_order)
            if expected is not None:
                reference[key] = expected
            if average is not None and (parsed.k is None or parsed.k >= size):
                _assert_possible(name, per_query[name], profile)
    lowest, _ = mean(measures.least_ap(profile))
    if lowest is not None:
        reference["least"] = lowest
    return Measured(values, per_query, int(no_relevant.sum()), reference, curves, tuple(notes))


def _values(measure: Measure, profile: Profile, legacy: dict[str, Tensor]) -> Tensor:
    """(Q,) values of one measure."""
    k, radius, denominator = measure.k, measure.radius, measure.denominator
    match measure.base:
        case "MAP" if measure.ties == "legacy":
            if measure.name not in legacy:
                raise ValueError(
                    f"{measure.name} in legacy order depends on the row order; score the codes, not a profile"
                )
            return legacy[measure.name]
        case "MAP":
            assert denominator != "first-k-relevant"  # Protocol.parse allows it in legacy order only
            assert measure.ties != "legacy"
            return measures.average_precision(profile, k, denominator, measure.ties)
        case "tie_gap":
            assert denominator != "first-k-relevant"  # Protocol.parse refuses it
            return measures.tie_gap(profile, k, denominator)
        case "P":
            if radius is not None:
                return measures.precision_within(profile, radius)
            return measures.precision_at(profile, k or 0)
        case "R":
            return measures.recall_at(profile, k or 0)
        case "nDCG":
            return measures.ndcg(profile, k, measure.gain)
        case "ACG":
            return measures.acg(profile, k)
        case "WAP":
            return measures.wap(profile)
    return measures.pr_area(profile)


def _chance(measure: Measure, protocol: Protocol, profile: Profile) -> tuple[str, Tensor]:
    """Name and (Q,) value of the chance level of a MAP; the order within ties has no part in it."""
    if measure.denominator == "first-k-relevant":  # no closed form at a cut: the level of the whole database
        return "chance", measures.chance(profile)
    plain = "MAP" if measure.k is None else f"MAP@{measure.k}"
    plain += "" if measure.denominator == protocol.ap else f"/{measure.denominator}"
    key = "chance" if plain == protocol.headline else f"chance/{plain}"
    return key, measures.chance(profile, measure.k, measure.denominator)


def _curve(name: str, profile: Profile, rows: Tensor) -> dict[str, Tensor]:
    """Means over the queries in ``rows``; a point that no query defines is left out."""
    if name == "P@N":
        ranks, precision = measures.precision_curve(profile)
        return {"n": ranks.to(torch.float64), "precision": precision[rows].mean(0)}
    if name == "PR":
        recall, precision = measures.rank_curve(profile)
        return {"recall": recall, "precision": precision[rows].mean(0)}
    precision, recall = measures.radius_curve(profile, empty="undefined")
    defined = ~precision[rows].isnan()
    some = defined.any(0)
    return {
        "radius": torch.arange(precision.shape[1], dtype=torch.float64)[some],
        "recall": recall[rows].mean(0)[some],
        "precision": precision[rows].nanmean(0)[some],
        "queries": defined.sum(0).to(torch.float64)[some],  # queries whose ball of this radius holds an item
    }


def _assert_possible(name: str, values: Tensor, profile: Profile) -> None:
    """Refuse an AP over the whole database below its arithmetic minimum: a fault of the counting."""
    below = values < measures.least_ap(profile) - 1e-9  # NaN compares false
    if below.any():
        first = int(torch.nonzero(below)[0])
        raise ArithmeticError(f"{name} of query {first} is {float(values[first])}, below the least possible")


def load_protocol(protocol: str | Mapping[str, Any] | Protocol) -> Protocol:
    """A registered protocol by name or settings, ``{name: saat, empty: skip}``, or the one given."""
    return protocol if isinstance(protocol, Protocol) else build("protocol", protocol)


@register("protocol", "house")
def default_protocol(targets: int = TARGETS, empty: Empty = "zero") -> Protocol:
    """MAP over the whole database and MAP@5000 (hits and mink), tie-expected, with graded measures and PR.

    The default. ``tie_gap`` is the luck of the order within ties. In every protocol queries without a
    relevant item count 0; with ``empty: skip`` they are left out, with ``error`` refused.
    """
    average_precisions = ("MAP", "MAP/optimistic", "MAP/pessimistic", "tie_gap", "MAP@5000", "MAP@5000/mink")
    others = ("P@100", "R@100", "P@r<=2", "nDCG@100", "ACG@100", "WAP", *CURVES)
    return Protocol("house", (*average_precisions, *others), targets=TargetRule(targets), empty=empty)


@register("protocol", "copies")
def copies(targets: int = 1) -> Protocol:
    """Copy detection: MAP, the share of queries whose image is found first (P@1), or among ten (R@10).

    With one relevant item a query, MAP is the mean of 1 / rank.
    """
    return Protocol("copies", ("MAP", "P@1", "R@10"), targets=TargetRule(targets))


@register("protocol", "saat", paper="SAAT 2023")
def saat(targets: int = TARGETS, empty: Empty = "zero") -> Protocol:
    """MAP@5000 with `hits`, in stable-sort order: SAAT, CgAT, ATRDH, ProS-GAN's code, and SAAH.

    A query without a relevant item counts as 0. Published code sorts unstably; the stable order by (distance,
    row) is its reproducible stand-in, and the tie-expected value is listed next to it.
    """
    names = ("MAP@5000", "MAP@5000/expected", "MAP@5000/mink/expected")
    return Protocol("saat", names, (I2I,), k=5000, ties="legacy", targets=TargetRule(targets), empty=empty)


@register("protocol", "sfcl", paper="SFCL", modality="cross-modal")
def sfcl(targets: int = TARGETS, empty: Empty = "zero") -> Protocol:
    """MAP over the whole database, as SFCL states, and MAP@5000.

    The paper's attacked DCMH values lie below the least MAP@ALL that exists, so its tables cannot be what the
    text says; MAP@5000 (`hits`) is the likely reading.
    """
    names = ("MAP", "MAP/expected", "MAP@5000", "MAP@5000/expected")
    return Protocol("sfcl", names, (I2T, I2I), ties="legacy", targets=TargetRule(targets), empty=empty)


@register("protocol", "dsarh", paper="DSARH", modality="cross-modal")
def dsarh(targets: int = TARGETS, empty: Empty = "zero") -> Protocol:
    """MAP over the whole database, nDCG@100 and ACG@100: DSARH.

    The paper's M is read as the number of relevant items; nDCG has the gain 2^shared - 1.
    """
    names = ("MAP", "MAP/expected", "nDCG@100", "ACG@100")
    rules = TargetRule(targets)
    return Protocol("dsarh", names, (I2T, T2I, I2I), ties="legacy", targets=rules, empty=empty)


@register("protocol", "crossmodal", paper="EQB2A, TA-DCH", modality="cross-modal")
def crossmodal(k: int = 50, targets: int = TARGETS, empty: Empty = "zero") -> Protocol:
    """MAP@50 over the first 50 relevant items of the whole ranking: EQB2A, TA-DCH and the DCMH port's k.

    It is no top-k measure: it looks as far down the list as the relevant items lie. Legacy order only.
    """
    names = (f"MAP@{k}", "MAP/hits/expected")
    return Protocol(
        "crossmodal",
        names,
        (I2T, T2I),
        "first-k-relevant",
        k,
        "legacy",
        targets=TargetRule(targets),
        empty=empty,
    )
