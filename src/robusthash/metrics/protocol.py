"""Protocols: which measures are reported, with which cut, denominator, tie rule and policy for empty queries.

A number without its protocol is not a result. Measures are named; the names are a small language:

====================  ==============================================================================================
``MAP``, ``MAP@5000``  over the whole database, or the top k; denominator and tie rule of the protocol unless
told: ``MAP@5000/mink``      ``/hits``, ``/mink``, ``/rel``, ``/first-k-relevant`` name the denominator,
``MAP/pessimistic``    ``/expected``, ``/optimistic``, ``/pessimistic``, ``/legacy`` the order within ties
``tie_gap@5000``       optimistic minus pessimistic MAP
``P@100, R@100``       precision and recall of the top k; ``P@r<=2`` is the precision within a Hamming radius
``nDCG@100/lin``       graded; ``/exp`` or ``/lin`` names the gain; ``ACG@100``, ``WAP`` have linear gain
``PR, PR/radius, P@N`` curves, kept beside the numbers; ``PR/area`` is the area under ``PR``
====================  ==============================================================================================
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

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

CURVES = ("PR", "PR/radius", "P@N")
TARGETS = 3  # of each query, unless a protocol is told otherwise
_DENOMINATORS = ("hits", "mink", "rel", "first-k-relevant")
_TIES = ("expected", "optimistic", "pessimistic", "legacy")
_NAME = re.compile(
    r"(?P<base>MAP|tie_gap|P|R|nDCG|ACG|WAP|PR)(@(?P<k>\d+))?(?P<radius>@r<=(?P<r>\d+))?(?P<options>(/[a-z-]+)*)"
)


@dataclass(frozen=True)
class TargetRule:
    """Target labels for t-MAP: drawn per query, keyed by query id, from the label sets of the database that
    share no label with the query. Fewer targets are the first ones of more.

    Raises:
        ValueError: a count below 1.
    """

    count: int = TARGETS  # targets per query; the mean over them is the headline
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"targets per query must be a whole number of at least 1, got {self.count!r}")

    def draw(self, query_labels: Tensor, ids: Tensor, database_labels: Tensor) -> Tensor:
        """(Q, count, C) label sets, all zero for a query that has no possible target: it leaves and is
        counted."""
        return draw_targets(query_labels, ids, database_labels, self.count, Draws(self.seed))


@dataclass(frozen=True)
class Measure:
    """A parsed measure name."""

    name: str
    base: str
    k: int | None
    radius: int | None
    denominator: LegacyDenominator
    ties: Literal["expected", "optimistic", "pessimistic", "legacy"]
    gain: Gain


@dataclass(frozen=True)
class Protocol:
    """How codes are scored.

    Raises:
        ValueError: when made with an unknown measure, k below 1, or ``first-k-relevant`` outside legacy
            order.
    """

    name: str
    measures: tuple[str, ...]  # the headline among them
    directions: tuple[tuple[str, str], ...] = (
        I2I,
        I2T,
        T2I,
        T2T,
    )  # (query, database) modality, where data have them
    ap: LegacyDenominator = "hits"
    k: int | None = None  # the cut of the headline; None is the whole database
    ties: Literal["expected", "legacy"] = "expected"
    empty: Empty = "zero"
    gain: Gain = "exp"
    targets: TargetRule = field(default_factory=TargetRule)

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(
                f"protocol {self.name!r}: k must be at least 1, got {self.k}; all ranks are k=None"
            )
        choices = {
            "ap": _DENOMINATORS,
            "ties": ("expected", "legacy"),
            "empty": ("zero", "skip", "error"),
            "gain": ("exp", "lin"),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(
                    f"protocol {self.name!r}: {key} {getattr(self, key)!r} is none of {', '.join(known)}"
                )
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
            raise ValueError(
                f"{name!r} is no measure; examples: MAP, MAP@5000/mink, P@100, P@r<=2, nDCG@100, WAP, PR"
            )
        base, k, radius = match["base"], match["k"] and int(match["k"]), match["r"] and int(match["r"])
        options = match["options"].split("/")[1:]
        allowed = {"MAP": (*_DENOMINATORS, *_TIES), "tie_gap": _DENOMINATORS[:3], "nDCG": ("exp", "lin")}
        allowed["PR"] = ("area",)
        for option in options:
            if option not in allowed.get(base, ()):
                raise ValueError(f"{name!r}: {base} takes no option {option!r}")
        needs_k = (base in ("P", "R") and radius is None) or (base == "PR" and options != ["area"])
        if (
            k == 0
            or (k is None and needs_k)
            or (radius is not None and base != "P")
            or (k and base in ("WAP", "PR"))
        ):
            raise ValueError(f"{name!r} is no measure: its cut is missing, 0, or out of place")
        denominator = next((option for option in options if option in _DENOMINATORS), self.ap)
        ties = next((option for option in options if option in _TIES), self.ties)
        if base == "tie_gap" and denominator == "first-k-relevant":
            raise ValueError(f"{name!r}: a tie gap exists for hits, mink and rel; write {name}/hits")
        if base == "MAP" and denominator == "first-k-relevant" and ties != "legacy":
            raise ValueError(f"{name!r}: first-k-relevant exists in legacy order only")
        gain = next((option for option in options if option in ("exp", "lin")), self.gain)
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
        query_labels: (Q, C) multi-hot; the target labels where t-MAP is wanted.
        labels: (N, C) multi-hot.
        profile: of the same codes and labels, where it is known already.

    Raises:
        ValueError: no queries, codes or labels that do not match, an empty query under ``empty="error"``.
    """
    profile = code_profile(query, query_labels, database, labels) if profile is None else profile
    legacy = {}
    for name in protocol.measures:
        wanted = protocol.parse(name)
        if wanted.base == "MAP" and wanted.ties == "legacy":
            legacy[name] = measures.legacy_average_precision(
                query, query_labels, database, labels, wanted.k, wanted.denominator
            )
    return measure_profile(protocol, profile, legacy)


def measure_profile(
    protocol: Protocol, profile: Profile, legacy: dict[str, Tensor] | None = None
) -> Measured:
    """Score a profile under a protocol.

    Args:
        legacy: (Q,) values of the measures in legacy order, by name, which no profile knows.

    Raises:
        ValueError: no queries, or a measure in legacy order that ``legacy`` does not hold.
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
        wanted = protocol.parse(name)
        if name in CURVES:
            kept = ~no_relevant if protocol.empty == "skip" or name != "P@N" else torch.ones_like(no_relevant)
            if not kept.any():
                notes.append(f"{name} is undefined: no query has a relevant item")
            elif name == "P@N" and size < 100:
                notes.append(f"P@N is undefined: its grid starts at 100 and the database has {size} items")
            else:
                curves[name] = _curve(name, profile, kept)
            continue
        if wanted.k is not None and wanted.k > size:
            notes.append(f"{name}: k clipped to the {size} items of the database")
        average, per_query[name] = mean(_values(wanted, profile, legacy or {}))
        if average is None:
            notes.append(f"{name} is undefined: it has a value for no query")
        else:
            values[name] = average
        if wanted.base == "MAP":
            key, random_order = _chance(wanted, protocol, profile)
            expected, _ = mean(random_order)
            if expected is not None:
                reference[key] = expected
            if average is not None and (wanted.k is None or wanted.k >= size):
                _assert_possible(name, per_query[name], profile)
    lowest, _ = mean(measures.least_ap(profile))
    if lowest is not None:
        reference["least"] = lowest
    return Measured(values, per_query, int(no_relevant.sum()), reference, curves, tuple(notes))


def _values(wanted: Measure, profile: Profile, legacy: dict[str, Tensor]) -> Tensor:
    """(Q,) values of one measure."""
    if wanted.base == "MAP" and wanted.ties == "legacy":
        if wanted.name not in legacy:
            raise ValueError(
                f"{wanted.name} in legacy order depends on the row order; score the codes, not a profile"
            )
        return legacy[wanted.name]
    if wanted.base == "MAP":
        divisor, ties = wanted.denominator, wanted.ties
        assert divisor != "first-k-relevant"  # Protocol.parse allows it in legacy order only
        assert ties != "legacy"
        return measures.average_precision(profile, wanted.k, divisor, ties)
    if wanted.base == "tie_gap":
        assert wanted.denominator != "first-k-relevant"  # Protocol.parse refuses it
        return measures.tie_gap(profile, wanted.k, wanted.denominator)
    if wanted.base == "P" and wanted.radius is not None:
        return measures.precision_within(profile, wanted.radius)
    if wanted.base == "P":
        return measures.precision_at(profile, wanted.k or 0)
    if wanted.base == "R":
        return measures.recall_at(profile, wanted.k or 0)
    if wanted.base == "nDCG":
        return measures.ndcg(profile, wanted.k, wanted.gain)
    if wanted.base == "ACG":
        return measures.acg(profile, wanted.k)
    return measures.wap(profile) if wanted.base == "WAP" else measures.pr_area(profile)


def _chance(wanted: Measure, protocol: Protocol, profile: Profile) -> tuple[str, Tensor]:
    """Name and (Q,) value of the chance level of a MAP; the order within ties has no part in it."""
    if (
        wanted.denominator == "first-k-relevant"
    ):  # no closed form at a cut: the level over the whole database stands
        return "chance", measures.chance(profile)
    plain = "MAP" if wanted.k is None else f"MAP@{wanted.k}"
    plain += "" if wanted.denominator == protocol.ap else f"/{wanted.denominator}"
    key = "chance" if plain == protocol.headline else f"chance/{plain}"
    return key, measures.chance(profile, wanted.k, wanted.denominator)


def _curve(name: str, profile: Profile, kept: Tensor) -> dict[str, Tensor]:
    """Means over the kept queries; a point that no query defines is left out."""
    if name == "P@N":
        ranks, precision = measures.precision_curve(profile)
        return {"n": ranks.to(torch.float64), "precision": precision[kept].mean(0)}
    if name == "PR":
        recall, precision = measures.rank_curve(profile)
        return {"recall": recall, "precision": precision[kept].mean(0)}
    precision, recall = measures.radius_curve(profile, empty="undefined")
    defined = ~precision[kept].isnan()
    some = defined.any(0)
    return {
        "radius": torch.arange(precision.shape[1], dtype=torch.float64)[some],
        "recall": recall[kept].mean(0)[some],
        "precision": precision[kept].nanmean(0)[some],
        "queries": defined.sum(0).to(torch.float64)[some],  # queries whose ball of this radius holds an item
    }


def _assert_possible(name: str, values: Tensor, profile: Profile) -> None:
    """AP over the whole database below its arithmetic minimum is a fault of the counting, never a result."""
    below = values < measures.least_ap(profile) - 1e-9  # NaN compares false
    if below.any():
        first = int(torch.nonzero(below)[0])
        raise ArithmeticError(
            f"{name} of query {first} is {float(values[first])}, below the least that any order can have"
        )


# ---------------------------------------------------------------------------------------------- named
# protocols Each takes ``targets``, the number of target label sets of each query: {name: saat, targets: 1}.


def load_protocol(protocol: str | Protocol) -> Protocol:
    """A registered protocol by name, or the one given."""
    return protocol if isinstance(protocol, Protocol) else build("protocol", protocol)


@register("protocol", "house")
def house(targets: int = TARGETS) -> Protocol:
    """MAP over the whole database and MAP@5000 (hits and mink), tie-expected, with graded measures and PR.

    The default. Empty queries count as 0; ``tie_gap`` says how much is the luck of the order within ties.
    """
    return Protocol(
        name="house",
        measures=(
            *("MAP", "MAP/optimistic", "MAP/pessimistic", "tie_gap", "MAP@5000", "MAP@5000/mink"),
            *("P@100", "R@100", "P@r<=2", "nDCG@100", "ACG@100", "WAP", "PR", "PR/radius", "P@N"),
        ),
        targets=TargetRule(targets),
    )


@register("protocol", "saat", paper="SAAT 2023")
def saat(targets: int = TARGETS) -> Protocol:
    """MAP@5000 with `hits`, in stable-sort order: SAAT, CgAT, ATRDH, ProS-GAN's code, and SAAH.

    A query without a relevant item counts as 0. Published code sorts unstably; the stable order by (distance,
    row) is its reproducible stand-in, and the tie-expected value is listed beside it.
    """
    return Protocol(
        name="saat",
        measures=("MAP@5000", "MAP@5000/expected", "MAP@5000/mink/expected"),
        directions=(I2I,),
        k=5000,
        ties="legacy",
        targets=TargetRule(targets),
    )


@register("protocol", "sfcl", paper="SFCL", modality="cross-modal")
def sfcl(targets: int = TARGETS) -> Protocol:
    """MAP over the whole database, as SFCL states; MAP@5000 beside it.

    The paper's attacked DCMH values lie below the least MAP@ALL that exists, so its tables cannot be what the
    text says; MAP@5000 (`hits`) is the likely reading.
    """
    return Protocol(
        name="sfcl",
        measures=("MAP", "MAP/expected", "MAP@5000", "MAP@5000/expected"),
        directions=(I2T, I2I),
        ties="legacy",
        targets=TargetRule(targets),
    )


@register("protocol", "dsarh", paper="DSARH", modality="cross-modal")
def dsarh(targets: int = TARGETS) -> Protocol:
    """MAP over the whole database, nDCG@100 and ACG@100: DSARH.

    The paper's M is read as the number of relevant items; nDCG has the gain 2^shared - 1.
    """
    return Protocol(
        name="dsarh",
        measures=("MAP", "MAP/expected", "nDCG@100", "ACG@100"),
        directions=(I2T, T2I, I2I),
        ties="legacy",
        targets=TargetRule(targets),
    )


@register("protocol", "crossmodal", paper="EQB2A, TA-DCH", modality="cross-modal")
def crossmodal(k: int = 50, targets: int = TARGETS) -> Protocol:
    """MAP@50 over the first 50 relevant items of the whole ranking: EQB2A, TA-DCH and the DCMH port's k.

    It is no top-k measure: it looks as far down the list as the relevant items lie. Legacy order only.
    """
    return Protocol(
        name="crossmodal",
        measures=(f"MAP@{k}", "MAP/hits/expected"),
        directions=(I2T, T2I),
        ap="first-k-relevant",
        k=k,
        ties="legacy",
        targets=TargetRule(targets),
    )
