"""Codes and labels -> results: measures, protocols, attacked evaluation, statistics."""

from robusthash.evaluation.assess import assess, run_shard
from robusthash.evaluation.bench import Bench, make_bench
from robusthash.evaluation.curve import eps_curve
from robusthash.evaluation.evaluate import evaluate, score_attack, score_clean, worst
from robusthash.evaluation.presets import paper_suite
from robusthash.evaluation.protocol import Protocol
from robusthash.evaluation.results import EvalResult, compare, load_results, save_results
from robusthash.evaluation.suite import Suite, tier

__all__ = [
    "Bench",
    "EvalResult",
    "Protocol",
    "Suite",
    "assess",
    "compare",
    "eps_curve",
    "evaluate",
    "load_results",
    "make_bench",
    "paper_suite",
    "run_shard",
    "save_results",
    "score_attack",
    "score_clean",
    "tier",
    "worst",
]
