"""Suites of attacks on one victim: tiers, curves over budgets, database attacks, checks, evidence."""

from robusthash.robustness.assess import assess, run_shard
from robusthash.robustness.eps_curve import eps_curve
from robusthash.robustness.specs.published_suite import paper_suite
from robusthash.robustness.suite import Suite, tier

__all__ = ["Suite", "assess", "eps_curve", "paper_suite", "run_shard", "tier"]
