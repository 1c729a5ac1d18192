"""Analyses of a trained hasher: frequency bands, cost."""
