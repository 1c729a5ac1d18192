"""Numbers of items that a dry run takes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

from robusthash.apps.experiment.config import Config
from robusthash.apps.experiment.evaluation_stages import attacks_of
from robusthash.attacks.eqb2a import NEAREST, RANKS
from robusthash.core.registry import check
from robusthash.evaluation.context import encoding_batch


@dataclass(frozen=True)
class DryRunRows:
    """Items taken at a time; ``fitted`` is the fewest that the training can be done on."""

    train: int
    query: int
    database: int
    fitted: int

    @classmethod
    def of(cls, config: Config, batch: int | None) -> DryRunRows:
        """Those of a recipe, or at most ``batch`` where its parts take so few."""
        section, fitted = config.evaluation, _fitted(config)
        own = config.training.batch_size, section.batch_size, encoding_batch(section.batch_size)
        train, query, database = own if batch is None else (min(batch, each) for each in own)
        ranked = any(settings["name"] == "eqb2a" for _, settings in attacks_of(section).values())
        return cls(train, query, max(database, NEAREST + RANKS) if ranked else database, fitted)


def _fitted(config: Config) -> int:
    """Methods in closed form need as many items as bits, and as their heads have anchors."""
    if check("recipe", config.training.recipe)[0].name != "shallow":
        return 2
    head, options = check("head", config.hasher.head)
    anchors = signature(head.make).parameters.get("anchors")
    return max(config.hasher.bits, 0 if anchors is None else int(options.get("anchors", anchors.default)))
