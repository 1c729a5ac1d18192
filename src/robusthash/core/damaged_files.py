"""Errors of damaged files: one line that names the file, what is wrong with it, and the remedy."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

from robusthash.core.plugins import PluginError


class RunError(ValueError):
    """A run directory, or a saved model, that cannot be used as it stands."""


_DAMAGED: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, RuntimeError, OSError, EOFError)
_DAMAGED += (pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError, RecursionError)


@contextmanager
def reading(path: Path, remedy: str, what: str = "") -> Iterator[None]:
    """Raise an error of a block that reads ``path`` as ``RunError("WHAT PATH is damaged (...); REMEDY")``."""
    try:
        yield
    except RunError:  # named already
        raise
    except PluginError as error:
        raise RunError(str(error)) from None
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), repr(error)).removeprefix(f"{path} is ")
        raise RunError(f"{f'{what} {path}'.strip()} is damaged ({reason}); {remedy}") from None


def shortened(text: str, most: int = 200) -> str:
    """A text for a message, its middle left out where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"
