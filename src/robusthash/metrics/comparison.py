"""Comparison of results, two or many: paired by query and corrected by Holm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robusthash.metrics.results import EvalResult
from robusthash.metrics.statistics import hierarchical_difference, holm, intervals, sign_flip_tests

METHOD_SEEDS = 3
"""Training seeds from which a number may be called that of a method; below, it is that of a checkpoint."""

Claim = Literal["method", "checkpoint"]


@dataclass(frozen=True)
class Difference:
    """A paired difference of two models on the same queries."""

    mean: float  # first minus second
    interval: tuple[float, float]  # 95 % bootstrap over queries
    p: float  # two-sided sign-flip test
    p_holm: float  # corrected over all measures of the comparison
    queries: int  # queries that both have a finite value for


def compare(first: EvalResult, second: EvalResult) -> dict[str, Difference]:
    """Paired differences (first minus second) of every per-query measure that both have.

    Raises:
        ValueError: the settings differ in anything but the model; the message names the fields. Or nothing is
            common.
    """
    if differing := first.setting.difference(second.setting):
        raise ValueError(
            f"these results cannot be compared: they differ in {differing}; "
            "only the model may differ, so evaluate both under the same setting"
        )
    paired: dict[str, Tensor] = {}
    shared = [name for name in first.per_query if name in second.per_query]
    for name in [name for name in shared if not name.startswith("legacy_")]:  # diagnostics, no measures
        left, right = first.per_query[name].to(torch.float64), second.per_query[name].to(torch.float64)
        if left.shape != right.shape:
            raise ValueError(f"{name} has {len(left)} values in one result and {len(right)} in the other")
        gaps = left - right
        if gaps.isfinite().any():  # infinite is the PSNR of an unchanged image
            paired[name] = torch.where(gaps.isfinite(), gaps, torch.nan)
    if not paired:
        raise ValueError("the two results share no per-query measure")
    ends, p_values = intervals(paired), sign_flip_tests(paired)
    corrected = holm(p_values)
    return {
        name: Difference(
            float(gaps.nanmean()), ends[name], p_values[name], corrected[name], int((~gaps.isnan()).sum())
        )
        for name, gaps in paired.items()
    }


@dataclass(frozen=True)
class ComparedModel:
    """A model in one column, compared with the model of highest mean."""

    mean: float
    best: bool  # it has the highest mean
    difference: float  # from the best, at most 0
    interval: tuple[float, float]  # 95 %, of the difference
    p: float  # two-sided
    p_holm: float  # corrected over all comparisons of the table
    bold: bool  # not significantly different from the best
    claim: Claim  # methods are compared where both have enough seeds, else checkpoints


def claim_of(seeds: int) -> Claim:
    """A ``method`` from three training seeds up, else a ``checkpoint``."""
    return "method" if seeds >= METHOD_SEEDS else "checkpoint"


def compare_all(
    table: Mapping[str, Mapping[str, Sequence[EvalResult]]], level: float = 0.05
) -> dict[str, dict[str, ComparedModel]]:
    """Compare every model of every column with the best of that column, by Holm over the whole table.

    Two methods (three training seeds each or more) are compared by the hierarchical bootstrap, seeds then
    queries; all others by the paired sign-flip test over queries of the mean over their seeds, which is a
    claim about checkpoints.

    Args:
        table: by column, which is the name of a per-query measure where higher is better, and model: the
            results of its training seeds.
        level: of significance, after correction.

    Returns:
        By column and model.

    Raises:
        ValueError: an empty column, or results in different settings; the models and fields are named.
    """
    values = {column: _values(column, models) for column, models in table.items()}
    best = {c: max(models, key=lambda name: float(models[name].mean())) for c, models in values.items()}
    tests: dict[str, tuple[float, tuple[float, float]]] = {}  # p and interval by column and model
    for column, models in values.items():
        leader, plain = models[best[column]], {}
        for name, own in models.items():
            key = f"{column}\n{name}"
            if name != best[column] and claim_of(min(len(own), len(leader))) == "method":
                low, high, p = hierarchical_difference(own, leader)
                tests[key] = p, (low, high)
            elif name != best[column]:
                plain[key] = own.mean(0) - leader.mean(0)
        if plain:
            spans = intervals(plain)
            tests |= {key: (p, spans[key]) for key, p in sign_flip_tests(plain).items()}
    corrected = holm({key: p for key, (p, _) in tests.items()})
    rankings: dict[str, dict[str, ComparedModel]] = {column: {} for column in values}
    for column, models in values.items():
        leader = models[best[column]]
        for name, own in models.items():
            mean, claim, key = float(own.mean()), claim_of(min(len(own), len(leader))), f"{column}\n{name}"
            gap, (p, span) = mean - float(leader.mean()), tests.get(key, (1.0, (0.0, 0.0)))
            p_holm, is_best = corrected.get(key, 1.0), name == best[column]
            bold = is_best or p_holm >= level
            rankings[column][name] = ComparedModel(mean, is_best, gap, span, p, p_holm, bold, claim)
    return rankings


def _values(column: str, models: Mapping[str, Sequence[EvalResult]]) -> dict[str, Tensor]:
    """(S, Q) values of each model, on the queries that every model has a value for."""
    if not models or not all(models.values()):
        raise ValueError(f"the column {column} needs at least one result of every model")
    first_name, first = next((name, results[0]) for name, results in models.items())
    for name, results in models.items():
        for result in results:
            if differing := first.setting.difference(result.setting):
                raise ValueError(
                    f"{first_name} and {name} cannot share one table: they differ in {differing}"
                )
            if column not in result.per_query:
                raise ValueError(f"{name} has no per-query values of {column}")
    stacked = {
        n: torch.stack([r.per_query[column].to(torch.float64) for r in rs]) for n, rs in models.items()
    }
    defined = ~torch.cat(list(stacked.values())).isnan().any(0)
    if not defined.any():
        raise ValueError(f"no query has a value of {column} for every model")
    return {name: values[:, defined] for name, values in stacked.items()}
