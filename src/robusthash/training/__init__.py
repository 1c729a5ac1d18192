"""Outputs -> loss terms -> trained hasher: recipes and the one loop."""

from robusthash.training.loop import OptimConfig, RunLog, Schedule, TrainConfig, fit
from robusthash.training.recipe import HashingRecipe, Moment, Recipe

__all__ = ["HashingRecipe", "Moment", "OptimConfig", "Recipe", "RunLog", "Schedule", "TrainConfig", "fit"]
