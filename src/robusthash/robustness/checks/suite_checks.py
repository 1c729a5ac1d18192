"""Checks that compare the attacks of a suite: other attacks, or more effort, that beat the white box."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.evaluation.attack_spec import Kind
from robusthash.metrics.results import Flag
from robusthash.metrics.robustness_measures import hubness
from robusthash.metrics.statistics import bootstrap_interval
from robusthash.robustness.checks.base import CHECKS, above, flag, not_run, order


@dataclass(frozen=True)
class MoreEffort:
    """(P,) worst AP of the strongest white-box attack where more was allowed; None where it was not run.

    Args:
        part: (P,) positions of the queries that these are of; all by default.
    """

    unbounded: Tensor | None = None  # at eps = 1
    doubled_steps: Tensor | None = None
    doubled_restarts: Tensor | None = None
    part: Tensor | None = None


def suite_checks(
    ap: Mapping[str, Tensor],
    kind: Mapping[str, Kind],
    clean: Tensor,
    signs: Mapping[str, Tensor],
    chance: float,
    *,
    floor: Tensor | None = None,
    curve: Mapping[float, Tensor] | None = None,
    more: MoreEffort = MoreEffort(),
    cut: bool = False,
) -> tuple[Flag, ...]:
    """F4-F9 and F18. A check whose values are None could not be run, and is amber.

    Args:
        ap: (R, Q) AP of each untargeted attack and restart.
        kind: of each attack.
        clean: (Q,) AP of the clean queries.
        signs: (R, Q, K) attacked codes of each attack.
        chance: MAP of a random order.
        floor: (Q,) lowest AP that a search over codes found.
        curve: worst AP (Q,) by eps, in any order of keys.
        cut: no gradient reaches the input, so white-box attacks were left out and count as the clean value.

    Raises:
        ValueError: an attack without a kind, shapes that do not fit the clean queries, or NaN.
    """
    _require_fitting(ap, kind, clean, signs)
    part = torch.arange(len(clean)) if more.part is None else more.part
    for values in [v for v in (more.unbounded, more.doubled_steps, more.doubled_restarts) if v is not None]:
        if len(values) != len(part):
            raise ValueError(f"{len(values)} values for {len(part)} clean queries")
    lowest = {name: torch.minimum(clean.double(), values.double().amin(0)) for name, values in ap.items()}
    of_white = [values for name, values in lowest.items() if kind[name] in ("white-box", "adaptive")]
    white = torch.stack(of_white).amin(0) if of_white else clean.double() if cut else None
    some = None if white is None else white[part]
    flags = [_curve(curve), _universal(signs)]
    for id, kinds in (("F4", ("black-box", "noise")), ("F5", ("transfer",))):
        rivals = {name: values for name, values in lowest.items() if kind[name] in kinds}
        flags.append(_beaten(id, rivals, white, " or ".join(kinds)))
    if more.unbounded is None:
        flags.append(not_run("F6", "no attack was run at eps = 1 (standard and full tiers do)"))
    else:
        bound = chance if floor is None else max(chance, float(floor[part].double().mean()))
        flags.append(above("F6", float(more.unbounded.double().mean()) - bound))
    flags.append(_effort("F8", some, more.doubled_steps, "doubled steps"))
    flags.append(_effort("F9", some, more.doubled_restarts, "doubled restarts"))
    return order(flags)


def _beaten(id: str, rivals: Mapping[str, Tensor], white: Tensor | None, kinds: str) -> Flag:
    """The gain of the strongest rival over the white-box wMAP, with a paired bootstrap over queries.

    Red where the whole 95 % interval lies beyond the threshold, amber where only the value does.
    """
    if not rivals or white is None:
        return not_run(id, f"the suite has no {'white-box' if white is None else kinds} attack")
    gains = {name: white - torch.minimum(white, values) for name, values in rivals.items()}
    name = max(gains, key=lambda rival: float(gains[rival].mean()))
    gain, threshold = float(gains[name].mean()), CHECKS[id].threshold
    if gain <= threshold:
        return flag(id, gain, "pass")
    sure = bootstrap_interval(gains[name])[0] > threshold
    remedy = f"{name} finds what the white box misses: {CHECKS[id].remedy}"
    return flag(id, gain, "red" if sure else "amber", remedy=remedy)


def _curve(curve: Mapping[float, Tensor] | None) -> Flag:
    if curve is None or len(curve) < 2:
        return not_run("F7", "no curve over eps was run")
    means = torch.stack([curve[eps].double().mean() for eps in sorted(curve)])
    rise = float((means - means.cummin(0).values).max())
    return above("F7", rise if rise > 1e-9 else 0.0)


def _effort(id: str, white: Tensor | None, more: Tensor | None, effort: str) -> Flag:
    if more is None or white is None:
        return not_run(id, f"no white-box attack was run with {effort} (standard and full tiers do)")
    return above(id, float((white - torch.minimum(white, more.double())).mean()))


def _universal(signs: Mapping[str, Tensor]) -> Flag:
    """The share of the most frequent attacked code; amber, since a model may deserve it."""
    if not signs:
        return not_run("F18", "no attacked codes were given")
    codes = [restart for restarts in signs.values() for restart in restarts]
    shares = [hubness(code) for code in codes]
    return above("F18", max(shares), "amber")


def _require_fitting(
    ap: Mapping[str, Tensor], kind: Mapping[str, Kind], clean: Tensor, signs: Mapping[str, Tensor]
) -> None:
    if missing := sorted(set(ap) - set(kind)):
        raise ValueError(f"the attack {missing[0]!r} has no kind")
    for name, values in ap.items():
        if values.ndim != 2 or values.shape[1] != len(clean) or len(values) == 0:
            raise ValueError(f"{name} has AP of shape {tuple(values.shape)}; it must be (R, {len(clean)})")
    for name, codes in signs.items():
        if codes.ndim != 3 or codes.shape[1] != len(clean):
            raise ValueError(f"{name} has codes {tuple(codes.shape)}, which must be (R, {len(clean)}, K)")
    if any(values.isnan().any() for values in (clean, *ap.values())):
        raise ValueError("AP holds NaN; leave queries without a value out before the checks")
