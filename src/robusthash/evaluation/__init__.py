"""Codes and labels -> results: measures, protocols, attacked evaluation, statistics."""

from robusthash.core.registry import discover
from robusthash.evaluation.bench import Bench, make_bench
from robusthash.evaluation.evaluate import evaluate, score_attack, score_clean, worst
from robusthash.evaluation.protocol import Protocol
from robusthash.evaluation.results import EvalResult, compare, load_results, save_results

__all__ = [
    "Bench",
    "EvalResult",
    "Protocol",
    "compare",
    "evaluate",
    "load_results",
    "make_bench",
    "save_results",
    "score_attack",
    "score_clean",
    "worst",
]

discover(__name__, __path__)
