"""Deep hashing for retrieval: train, attack, defend, measure, search.

Example:
    >>> import robusthash as rh
    >>> data = rh.load_data("synthetic", seed=0)
    >>> hasher = rh.build_hasher(image="small", bits=32)
    >>> _ = rh.fit(rh.HashingRecipe(hasher, rh.objectives.CSQ()), data, rh.TrainConfig(epochs=5))
    >>> robust = rh.evaluate(hasher, data, attack=rh.attacks.mainstay(eps=8 / 255, steps=20))
"""

from robusthash import attacks, objectives
from robusthash.attacks import Attack, Threat
from robusthash.core.types import Batch
from robusthash.data import load_data
from robusthash.defenses import AdversarialTraining
from robusthash.evaluation import EvalResult, Protocol, Suite, assess, compare, evaluate, make_bench, tier
from robusthash.index import open_index
from robusthash.models import Hasher, build_hasher, encode_split
from robusthash.training import HashingRecipe, TrainConfig, fit
from robusthash.version import __version__

__all__ = [
    "AdversarialTraining",
    "Attack",
    "Batch",
    "EvalResult",
    "Hasher",
    "HashingRecipe",
    "Protocol",
    "Suite",
    "Threat",
    "TrainConfig",
    "__version__",
    "assess",
    "attacks",
    "build_hasher",
    "compare",
    "encode_split",
    "evaluate",
    "fit",
    "load_data",
    "make_bench",
    "objectives",
    "open_index",
    "tier",
]
