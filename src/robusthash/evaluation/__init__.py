"""One victim under one attack: evaluation contexts, blocks of attacked queries, scores."""

from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.evaluate import evaluate, score_attack, score_clean, worst

__all__ = ["EvaluationContext", "evaluate", "make_context", "score_attack", "score_clean", "worst"]
