"""Shallow hashing: features of training items -> linear projections whose signs are codes, in closed form."""

from robusthash.objectives.shallow.base import Projection, ShallowMethod, TrainingFeatures, solve

__all__ = ["Projection", "ShallowMethod", "TrainingFeatures", "solve"]
