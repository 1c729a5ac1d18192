"""Checks of models and of suites: signs that a robustness number may not be trusted."""
