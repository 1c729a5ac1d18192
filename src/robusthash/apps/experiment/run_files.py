"""Files of a run: damage named with its remedy, and weights in files that run no code when read."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robusthash.apps.experiment.config import Config, ConfigError, load_config
from robusthash.core.atomic_files import json_text, write_aside
from robusthash.core.registry import without_new_code


class RunError(ValueError):
    """A run directory that cannot be used as it stands."""


_DAMAGED: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, RuntimeError, OSError, EOFError)
_DAMAGED += (pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError, RecursionError)


@contextmanager
def reading(path: Path, remedy: str, what: str = "") -> Iterator[None]:
    """Raise an error of a block that reads ``path`` as ``RunError("WHAT PATH is damaged (...); REMEDY")``."""
    try:
        yield
    except RunError:  # named already
        raise
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), repr(error)).removeprefix(f"{path} is ")
        raise RunError(f"{f'{what} {path}'.strip()} is damaged ({reason}); {remedy}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with write_aside(path) as temporary:
        temporary.write_text(json_text(value, path.name))


def config_of(path: Path) -> Config:
    """The config of a run directory, with every section: an emptied file is not one of defaults."""
    again = f"write it again with the recipe of the run: robusthash train RECIPE --runs {path.parent.parent}"
    try:
        with without_new_code(path / "config.yaml"):
            config = load_config(path / "config.yaml")
    except (ConfigError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{path}: its config cannot be read: {first}; {again}") from None
    if missing := [name for name in Config.model_fields if name not in config.model_fields_set]:
        lacks = f"it has no {', '.join(missing)}"
        raise RunError(f"{path / 'config.yaml'} is damaged ({lacks}); {again}")
    return config


def without_weights(encoder: Any) -> Any:
    """Encoder settings without pretrained weights, whose file may be gone since training started there."""
    if not isinstance(encoder, dict):
        return encoder
    return {key: None if key == "weights" else without_weights(value) for key, value in encoder.items()}


def file_digest(path: Path) -> str:
    """16 hex digits of the content of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def save_weights(state: Mapping[str, Tensor], path: Path) -> str:
    """Write tensors; the digest of the file. It is written as others are, by the umask of the user."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    content = safetensors.torch.save(tensors)
    with write_aside(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()[:16]


def load_weights(module: nn.Module, path: Path, remedy: str) -> None:
    """Load every tensor by name; buffers that ``setup`` makes (centers) take the shape of the file.

    Raises:
        RunError: a file that cannot be read or does not fit, with the ``remedy``.
    """
    with reading(path, remedy, "the file of weights"):
        tensors = safetensors.torch.load_file(path)
    for name, buffer in module.named_buffers():
        if name in tensors and buffer.shape != tensors[name].shape and buffer.numel() == 0:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.empty_like(tensors[name]))
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"weights {path} do not fit the model card: {reason}; {remedy}") from None
