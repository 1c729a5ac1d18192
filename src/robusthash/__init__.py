"""Deep hashing for retrieval: train, attack, defend, measure, search.

Example:
    >>> import robusthash as rh
    >>> data = rh.load_data("synthetic", seed=0)
    >>> hasher = rh.build_hasher(image="small", bits=32)
    >>> _ = rh.fit(rh.HashingRecipe(hasher, rh.objectives.CSQ()), data, rh.TrainConfig(epochs=5))
    >>> robust = rh.evaluate(hasher, data, attack=rh.attacks.mainstay(eps=8 / 255, steps=20))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from robusthash.core.registry import discover
from robusthash.version import __version__

if TYPE_CHECKING:
    from robusthash import attacks, objectives
    from robusthash.apps.audit.measurement import audit
    from robusthash.apps.collection.collection_run import encode_collection
    from robusthash.apps.experiment.export_run import export
    from robusthash.apps.experiment.quickstart_run import quickstart
    from robusthash.apps.experiment.search_model import SearchModel, load
    from robusthash.apps.image_hash.copy_hash import ImageHash, hash_image
    from robusthash.apps.image_hash.duplicate_groups import find_duplicates
    from robusthash.apps.reproduction.reproduction import reproduce
    from robusthash.attacks import Attack, Threat
    from robusthash.core.types import Batch, Codes
    from robusthash.data import RetrievalData, load_data
    from robusthash.defenses import AdversarialTraining
    from robusthash.evaluation import EvaluationContext, evaluate, make_context
    from robusthash.index import open_index
    from robusthash.metrics import EvalResult, Protocol, compare
    from robusthash.models import Hasher, build_hasher, encode_split
    from robusthash.models.external.wrap import wrap
    from robusthash.robustness import Suite, assess, tier
    from robusthash.robustness.certificates.certified_map import certify
    from robusthash.training import HashingRecipe, TrainConfig, fit

__all__ = [
    "AdversarialTraining",
    "Attack",
    "Batch",
    "Codes",
    "EvalResult",
    "EvaluationContext",
    "Hasher",
    "HashingRecipe",
    "ImageHash",
    "Protocol",
    "RetrievalData",
    "SearchModel",
    "Suite",
    "Threat",
    "TrainConfig",
    "__version__",
    "assess",
    "attacks",
    "audit",
    "build_hasher",
    "certify",
    "compare",
    "encode_collection",
    "encode_split",
    "evaluate",
    "export",
    "find_duplicates",
    "fit",
    "hash_image",
    "load",
    "load_data",
    "make_context",
    "objectives",
    "open_index",
    "quickstart",
    "reproduce",
    "tier",
    "wrap",
]

_REGISTERING = ("data", "models", "objectives", "training", "attacks", "defenses")
_ROOMS = ("core", "metrics", *_REGISTERING, "evaluation", "robustness", "analysis", "index")
_HOMES = {
    "AdversarialTraining": "defenses",
    "Attack": "attacks",
    "Batch": "core.types",
    "Codes": "core.types",
    "EvalResult": "metrics",
    "EvaluationContext": "evaluation",
    "Hasher": "models",
    "HashingRecipe": "training",
    "ImageHash": "apps.image_hash.copy_hash",
    "Protocol": "metrics",
    "RetrievalData": "data",
    "SearchModel": "apps.experiment.search_model",
    "Suite": "robustness",
    "Threat": "attacks",
    "TrainConfig": "training",
    "assess": "robustness",
    "audit": "apps.audit.measurement",
    "build_hasher": "models",
    "certify": "robustness.certificates.certified_map",
    "compare": "metrics",
    "encode_collection": "apps.collection.collection_run",
    "encode_split": "models",
    "evaluate": "evaluation",
    "export": "apps.experiment.export_run",
    "find_duplicates": "apps.image_hash.duplicate_groups",
    "fit": "training",
    "hash_image": "apps.image_hash.copy_hash",
    "load": "apps.experiment.search_model",
    "load_data": "data",
    "make_context": "evaluation",
    "open_index": "index",
    "quickstart": "apps.experiment.quickstart_run",
    "reproduce": "apps.reproduction.reproduction",
    "tier": "robustness",
    "wrap": "models.external.wrap",
}
"""The room or module that each name is imported from when it is first used: ``import robusthash`` loads
none."""


if not TYPE_CHECKING:  # a type checker reads the imports above, and would take any other name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        if name in _HOMES:
            value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


discover(*(f"{__name__}.{room}" for room in ("metrics.protocol", *_REGISTERING)))
