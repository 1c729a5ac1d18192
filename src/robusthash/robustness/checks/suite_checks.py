"""Checks that compare the lines of a suite: whatever beats the white box, and whatever more effort still
finds."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from robusthash.core.hamming import pack
from robusthash.core.types import Codes
from robusthash.evaluation.attack_spec import Kind
from robusthash.metrics.results import Flag
from robusthash.metrics.robustness_measures import hubness
from robusthash.metrics.statistics import bootstrap_interval
from robusthash.robustness.checks.base import CHECKS, above, flag, not_run, order

_WHITE: tuple[Kind, ...] = ("white-box", "adaptive")


def suite_checks(
    ap: Mapping[str, Tensor],
    kind: Mapping[str, Kind],
    clean: Tensor,
    signs: Mapping[str, Tensor],
    chance: float,
    floor: Tensor | None = None,
    curve: Mapping[float, Tensor] | None = None,
    unbounded: Tensor | None = None,
    doubled_steps: Tensor | None = None,
    doubled_restarts: Tensor | None = None,
    path: Mapping[str, Tensor] | None = None,
    part: Tensor | None = None,
    cut: bool = False,
) -> tuple[Flag, ...]:
    """F4-F9 and F18, and F11 where the paths are given. What is None could not be run, and is amber.

    Args:
        ap: (R, Q) AP of each untargeted line and restart.
        kind: of each line.
        clean: (Q,) AP of the clean queries.
        signs: (R, Q, K) attacked codes of each line.
        chance: MAP of a random order.
        floor: (Q,) lowest AP that a search over codes found.
        curve: worst AP (Q,) by eps, in any order of keys.
        unbounded: (Q,) worst AP at eps = 1.
        doubled_steps, doubled_restarts: (Q,) worst white-box AP with twice the steps, or restarts.
        path: (R, Q) lowest AP that each line met on its path, before selection.
        part: (P,) positions of the queries that ``unbounded`` and the doubled efforts were run on; all by
            default.
        cut: white-box lines were left out since no gradient reaches the input; they stand at the clean value.

    Raises:
        ValueError: a line without a kind, shapes that do not fit the clean queries, or NaN.
    """
    _check(ap, kind, clean, signs, [floor, *(curve or {}).values()])
    asked = torch.arange(len(clean)) if part is None else part
    _check({}, {}, clean[asked], {}, [unbounded, doubled_steps, doubled_restarts])
    white = worst_of(ap, kind, clean, _WHITE)
    white = clean.double() if white is None and cut else white
    some = None if white is None else white[asked]
    flags = [
        _beaten("F4", ap, kind, clean, white, ("black-box", "noise")),
        _beaten("F5", ap, kind, clean, white, ("transfer",)),
        _unbounded(unbounded, chance, None if floor is None else floor[asked]),
        _curve(curve),
        _effort("F8", some, doubled_steps, "doubled steps"),
        _effort("F9", some, doubled_restarts, "doubled restarts"),
        _universal(signs),
    ]
    if path is not None:
        flags.append(_selection(ap, path))
    return order(flags)


def worst_of(
    ap: Mapping[str, Tensor], kind: Mapping[str, Kind], clean: Tensor, kinds: Collection[Kind]
) -> Tensor | None:
    """(Q,) lowest AP over the clean query and all lines of these kinds; None where there is no such line."""
    chosen = [values.double().amin(0) for name, values in ap.items() if kind[name] in kinds]
    return torch.stack([clean.double(), *chosen]).amin(0) if chosen else None


def _beaten(
    id: str,
    ap: Mapping[str, Tensor],
    kind: Mapping[str, Kind],
    clean: Tensor,
    white: Tensor | None,
    kinds: tuple[Kind, ...],
) -> Flag:
    """What the strongest such line takes off the white-box wMAP, by a paired bootstrap over queries.

    Red where the whole 95 % interval lies beyond the threshold, amber where the value does but its interval
    reaches it.
    """
    rivals = {name: worst_of({name: ap[name]}, kind, clean, kinds) for name in ap if kind[name] in kinds}
    if not rivals or white is None:
        return not_run(id, f"the suite has no {'white-box' if white is None else ' or '.join(kinds)} line")
    gains = {name: white - torch.minimum(white, worst) for name, worst in rivals.items() if worst is not None}
    name = max(gains, key=lambda line: float(gains[line].mean()))
    gain, threshold = float(gains[name].mean()), CHECKS[id].threshold
    if gain <= threshold:
        return flag(id, gain, "pass")
    sure = bootstrap_interval(gains[name])[0] > threshold
    remedy = f"{name} finds what the white box misses: {CHECKS[id].remedy}"
    return flag(id, gain, "red" if sure else "amber", remedy=remedy)


def _unbounded(unbounded: Tensor | None, chance: float, floor: Tensor | None) -> Flag:
    if unbounded is None:
        return not_run("F6", "no line was run at eps = 1 (standard and full tiers do)")
    bound = max(chance, float(floor.double().mean()) if floor is not None else 0.0)
    return above("F6", float(unbounded.double().mean()) - bound)


def _curve(curve: Mapping[float, Tensor] | None) -> Flag:
    if curve is None or len(curve) < 2:
        return not_run("F7", "no curve over eps was run")
    means = torch.stack([curve[eps].double().mean() for eps in sorted(curve)])
    rise = float((means - means.cummin(0).values).max())
    return above("F7", rise if rise > 1e-9 else 0.0)


def _effort(id: str, white: Tensor | None, more: Tensor | None, what: str) -> Flag:
    if more is None or white is None:
        return not_run(id, f"no white-box line was run with {what} (standard and full tiers do)")
    return above(id, float((white - torch.minimum(white, more.double())).mean()))


def _selection(ap: Mapping[str, Tensor], path: Mapping[str, Tensor]) -> Flag:
    if unknown := set(path) - set(ap):
        raise ValueError(f"paths of lines that have no AP: {sorted(unknown)}")
    worse = [(ap[name] - path[name] > 1e-6).double().mean() for name in path]
    return above("F11", float(torch.stack(worse).max())) if worse else not_run("F11", "no path was recorded")


def _universal(signs: Mapping[str, Tensor]) -> Flag:
    """The share of the most frequent attacked code; amber, since a model may deserve it."""
    shares: dict[str, float] = {}
    for name, restarts in signs.items():
        for codes in restarts:
            packed = Codes(pack(codes), codes.shape[1], torch.arange(len(codes)))
            shares[name] = max(shares.get(name, 0.0), hubness(packed))
    return (
        above("F18", max(shares.values()), "amber")
        if shares
        else not_run("F18", "no attacked codes were given")
    )


def _check(
    ap: Mapping[str, Tensor],
    kind: Mapping[str, Kind],
    clean: Tensor,
    signs: Mapping[str, Tensor],
    others: list[Tensor | None],
) -> None:
    if missing := sorted(set(ap) - set(kind)):
        raise ValueError(f"the line {missing[0]!r} has no kind")
    for name, values in ap.items():
        if values.ndim != 2 or values.shape[1] != len(clean) or len(values) == 0:
            raise ValueError(f"{name} has AP of shape {tuple(values.shape)}; it must be (R, {len(clean)})")
    for name, codes in signs.items():
        if codes.ndim != 3 or codes.shape[1] != len(clean):
            raise ValueError(
                f"{name} has codes of shape {tuple(codes.shape)}; they must be (R, {len(clean)}, K)"
            )
    for values in (clean, *ap.values(), *(other for other in others if other is not None)):
        if values.isnan().any():
            raise ValueError("AP holds NaN; leave queries without a value out before the checks")
        if values.shape[-1] != len(clean):
            raise ValueError(f"{values.shape[-1]} values for {len(clean)} clean queries")
