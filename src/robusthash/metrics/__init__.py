"""Retrieval measures on codes and labels, protocols, robustness measures, statistics, and result files."""

from robusthash.metrics.comparison import compare
from robusthash.metrics.protocol import Protocol
from robusthash.metrics.results import EvalResult, load_results, save_results

__all__ = ["EvalResult", "Protocol", "compare", "load_results", "save_results"]
