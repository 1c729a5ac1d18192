"""Files -> batches. Readers register themselves under the kind ``data``."""

from typing import Any

from robusthash.core.registry import build
from robusthash.data.base import ArraySource, RetrievalData, Source, Split, batches

__all__ = ["ArraySource", "RetrievalData", "Source", "Split", "batches", "load_data"]


def load_data(name: str, **options: Any) -> RetrievalData:
    """Load a registered data set, e.g. ``load_data("photos", seed=0)``.

    Raises:
        KeyError: an unknown name or option; the nearest is offered.
        FileNotFoundError: with what belongs where, when files are missing.
    """
    return build("data", {"name": name, **options})
