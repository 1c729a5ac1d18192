"""Uncertainty: bootstrap over queries, paired sign-flip tests, Holm's correction, training seeds.

The unit of resampling is the query. All draws are keyed, so the same values always give the same interval,
and in blocks, so that memory does not grow with the number of resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from robusthash.core.runtime import Draws

_BLOCK = 1 << 21  # random numbers held at a time


def resampled_means(values: Tensor, resamples: int = 10_000, draws: Draws = Draws(0)) -> Tensor:
    """Means of bootstrap resamples of the queries, the same resamples for every column.

    Args:
        values: (Q, m) per-query values; NaN or an infinite value (the PSNR of an unchanged image) leaves a
            query out of that column.

    Returns:
        (resamples, m) float64; NaN where a resample holds no defined value of a column.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values must be (Q, m) with Q > 0, got {tuple(values.shape)}")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    count = len(values)
    values = values.to("cpu", torch.float64)
    defined = values.isfinite()
    filled = torch.where(defined, values, 0.0)
    generator = draws.within("bootstrap").generator()
    means = []
    step = max(1, _BLOCK // count)
    for start in range(0, resamples, step):
        times = _resample_counts(min(step, resamples - start), count, generator)
        means.append((times @ filled) / (times @ defined.to(torch.float64)))
    return torch.cat(means)


def _resample_counts(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """(rows, count) number of times that each item is drawn in ``count`` draws with replacement."""
    indices = torch.randint(count, (rows, count), generator=generator) + torch.arange(rows)[:, None] * count
    return torch.bincount(indices.flatten(), minlength=rows * count).view(rows, count).to(torch.float64)


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    draws: Draws = Draws(0),
) -> tuple[float, float]:
    """Percentile bootstrap interval, lower and upper end, of a mean or of a function of several means.

    Args:
        values: (Q,) values, or (Q, m) when the statistic needs m means (AP, wAP and chance for HRS).
        statistic: (resamples, m) means -> (resamples,); None for the mean itself.
        level: coverage in (0, 1).
    """
    means = resampled_means(values[:, None] if values.ndim == 1 else values, resamples, draws)
    return _percentiles(means[:, 0] if statistic is None else statistic(means), level)


def intervals(
    per_query: Mapping[str, Tensor], level: float = 0.95, resamples: int = 10_000, draws: Draws = Draws(0)
) -> dict[str, tuple[float, float]]:
    """The interval of the mean of each (Q,) array over its finite values, from the same resamples.

    Arrays without a finite value are left out.
    """
    names = [name for name, values in per_query.items() if values.isfinite().any()]
    if not names:
        return {}
    columns = torch.stack([per_query[name].to(torch.float64) for name in names], 1)
    means = resampled_means(columns, resamples, draws)
    return {name: _percentiles(means[:, column], level) for column, name in enumerate(names)}


def _percentiles(samples: Tensor, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    samples = samples[~samples.isnan()]
    if len(samples) == 0:
        raise ValueError("the statistic is undefined in every resample")
    tail = (1 - level) / 2
    low, high = torch.quantile(samples, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def hierarchical_interval(
    values: Tensor,
    level: float = 0.95,
    resamples: int = 10_000,
    draws: Draws = Draws(0),
    statistic: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Interval of a METHOD's mean: training seeds are resampled, then queries.

    All seeds are scored on the same queries, so the drawn seeds share one resample of the queries; resampling
    apart would count a query as several independent ones and make the interval too narrow.

    Args:
        values: (S, Q) per-query values of S training seeds, S at least 2; or (S, Q, m) with a ``statistic``.
        statistic: (resamples, m) means -> (resamples,); None for the mean itself.
    """
    means = _hierarchical_means([values if values.ndim == 3 else values[..., None]], resamples, draws)[0]
    return _percentiles(means[:, 0] if statistic is None else statistic(means), level)


def hierarchical_difference(
    first: Tensor, second: Tensor, level: float = 0.95, resamples: int = 10_000, draws: Draws = Draws(0)
) -> tuple[float, float, float]:
    """Lower end, upper end and two-sided p of the difference of two METHODS' means, first minus second.

    Seeds of each method are resampled apart, the queries together. p is twice the share of resamples on the
    rarer side of zero, the observed value among them, so that it is never 0.

    Args:
        first, second: (S, Q) and (S', Q) per-query values of the training seeds, on the same queries.
    """
    left, right = _hierarchical_means([first[..., None], second[..., None]], resamples, draws)
    differences = (left - right)[:, 0]
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return *_percentiles(differences, level), min(1.0, 2 * (rarer + 1) / (resamples + 1))


def _hierarchical_means(groups: Sequence[Tensor], resamples: int, draws: Draws) -> list[Tensor]:
    """(resamples, m) means of each (S, Q, m) group: its seeds resampled, the queries in common."""
    for values in groups:
        if values.ndim != 3 or values.shape[0] < 2 or values.shape[1] == 0:
            raise ValueError(
                f"values must be (S, Q) with at least two training seeds, got {tuple(values.shape[:2])}; one "
                "seed supports a claim about a checkpoint (bootstrap_interval), not about a method"
            )
        if values.isnan().any():
            raise ValueError("values hold NaN; choose the queries that are defined for every seed")
    count = groups[0].shape[1]
    if any(values.shape[1] != count for values in groups):
        raise ValueError(f"score the methods on the same queries, not {[v.shape[1] for v in groups]}")
    groups = [values.to("cpu", torch.float64) for values in groups]
    generator = draws.within("hierarchical").generator()
    means: list[list[Tensor]] = [[] for _ in groups]
    step = max(1, _BLOCK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        seed_times = [_resample_counts(rows, len(values), generator) for values in groups]
        query_times = _resample_counts(rows, count, generator)
        for place, (times, values) in enumerate(zip(seed_times, groups, strict=True)):
            over_seeds = (times @ values.flatten(1)).view(rows, count, -1)
            means[place].append((over_seeds * query_times[..., None]).sum(1) / (len(values) * count))
    return [torch.cat(blocks) for blocks in means]


def sign_flip_tests(
    differences: Mapping[str, Tensor], flips: int = 100_000, draws: Draws = Draws(0)
) -> dict[str, float]:
    """Two-sided p of the paired permutation test of "the mean difference is zero", for each measure.

    p is the share of sign patterns with |mean| >= |observed mean| - 1e-12: of all 2^n patterns for n <= 20,
    else of ``flips`` random ones (the same for all measures), the observed pattern among them, so that p is
    never 0. Differences that are 0 have no sign and do not count towards n.

    Args:
        differences: (Q,) paired differences by measure; NaN leaves a query out of that measure.

    Example:
        >>> import torch
        >>> sign_flip_tests({"AP": torch.tensor([0.1, 0.2, 0.3])})
        {'AP': 0.25}
    """
    if flips < 2:
        raise ValueError(f"flips must be at least 2, got {flips}")
    columns = {name: values.to("cpu", torch.float64).flatten() for name, values in differences.items()}
    p_values: dict[str, float] = {}
    large: dict[str, Tensor] = {}
    for name, values in columns.items():
        if len(values) == 0 or values.isnan().all():
            raise ValueError(f"the test {name} needs the difference of at least one query")
        signed = values[(values != 0) & ~values.isnan()]
        if len(signed) <= 20:
            p_values[name] = _exact_share(signed)
        else:
            large[name] = values.nan_to_num(0.0)  # a zero adds nothing to any pattern
    if large:
        table, generator = torch.stack(list(large.values()), 1), draws.within("sign-flip").generator()
        p_values.update(zip(large, _sampled_shares(table, flips, generator), strict=True))
    return {name: p_values[name] for name in columns}


def _exact_share(values: Tensor) -> float:
    """Share of all sign patterns of at most 20 non-zero values that reach the observed sum."""
    count = len(values)
    if count == 0:
        return 1.0
    threshold = values.sum().abs() - 1e-12 * count
    patterns = 1 << (count - 1)  # the two halves mirror each other, so the last sign stays +1
    step = max(1, _BLOCK // count)
    reached = 0
    for start in range(0, patterns, step):
        numbers = torch.arange(start, min(start + step, patterns))
        signs = 1.0 - 2.0 * ((numbers[:, None] >> torch.arange(count)) & 1).to(torch.float64)
        reached += int(((signs @ values).abs() >= threshold).sum())
    return reached / patterns


def _sampled_shares(values: Tensor, flips: int, generator: torch.Generator) -> list[float]:
    """Share of ``flips`` patterns, with the observed one, that reach the sum of each column of (Q, m)."""
    count, total = len(values), values.sum(0)
    threshold = total.abs() - 1e-12 * count
    reached = torch.ones(values.shape[1], dtype=torch.int64)
    step = max(1, _BLOCK // count)
    for start in range(0, flips - 1, step):
        rows = min(step, flips - 1 - start)
        random = torch.randint(0, 256, (rows, (count + 7) // 8), generator=generator, dtype=torch.uint8)
        positive = torch.from_numpy(np.unpackbits(random.numpy(), axis=1, count=count)).to(torch.float64)
        sums = 2 * (positive @ values) - total  # signs are 2 positive - 1
        reached += (sums.abs() >= threshold).sum(0)
    return (reached.to(torch.float64) / flips).tolist()


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values of one family of comparisons, by name, each at most 1."""
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"the p-value of {name} must lie in [0, 1], got {p}")
    adjusted: dict[str, float] = {}
    largest = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class GroupScores:
    """The means over some of the queries; a query that a measure leaves out is left out here too."""

    queries: int
    values: dict[str, float]  # by measure
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)


def group_scores(per_query: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> dict[str, GroupScores]:
    """Scores of each group that has a query.

    Args:
        per_query: by measure, (Q,) with NaN for a query that it leaves out.
        groups: by name, (Q,) bool.
    """
    scores = {}
    for name, members in groups.items():
        own = {measure: values[members] for measure, values in per_query.items()}
        own = {measure: values for measure, values in own.items() if not values.isnan().all()}
        if members.any():
            means = {measure: float(values.nanmean()) for measure, values in own.items()}
            scores[name] = GroupScores(int(members.sum()), means, intervals(own))
    return scores
