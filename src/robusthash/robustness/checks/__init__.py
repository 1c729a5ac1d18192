"""Checks of evaluations: signs that a robustness number may not be trusted."""
