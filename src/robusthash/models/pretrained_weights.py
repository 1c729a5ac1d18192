"""Pretrained weights from files as people have them: the loader of ``weights`` of the image encoders."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robusthash.core.limited_files import check_archive
from robusthash.core.out_of_memory import out_of_memory
from robusthash.core.words import some_names

logger = logging.getLogger(__name__)

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Keys under which training scripts put the state dict; the first that holds one is taken."""

Renaming = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""A function that gives the tensors of a file the names of a net here."""

_WRAPPERS = ("module", "_orig_mod")  # put into names by DataParallel and torch.compile, at any place
_OPTIONAL = "num_batches_tracked"  # of BatchNorm; files of old versions lack it and nothing here reads it


def load_weights(
    module: nn.Module, path: str, name: str, head: str = "", fits: str = "", rename: Renaming = dict
) -> tuple[str, ...]:
    """Fill ``module`` with the tensors of a file, matched by name under any common prefix.

    The file is safetensors or written by ``torch.save``: a state dict, bare or under one of ``HOLDERS``, next
    to any plain values and ``argparse.Namespace`` objects. Nothing in it is executed. The prefix
    (``module.``, ``backbone.``, ...) is found, not asked for. Every tensor of the module must be there in its
    shape. Tensors of parts that the module lacks, a classifier of any size above all, are left out, logged
    and returned by name.

    Args:
        name: of the net, for messages.
        head: prefix of a classifier that sits among the module's own names, ``classifier.6.`` of AlexNet.
        fits: remedy where shapes differ, such as which options must fit.
        rename: for files that name their tensors in another way.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is empty, damaged, of another kind or would run code; tensors of another net
            or of two.
    """
    tensors = rename(read_tensors(Path(path).expanduser()))
    expected = module.state_dict()
    originals = {_unwrapped(key): key for key in tensors}
    prefix = _prefix({key: tensors[old] for key, old in originals.items()}, expected, path, name)
    own = {key.removeprefix(prefix): tensors[old] for key, old in originals.items() if key.startswith(prefix)}
    _check(own, expected, f"weights {path!r} ({len(tensors)} tensors)", name, head, fits)
    module.load_state_dict({key: own.get(key, value) for key, value in expected.items()})
    used = {originals[prefix + key] for key in own if key in expected}
    left = tuple(key for key in tensors if key not in used)
    if left:
        listed = some_names([f"{key} ({_shape(tensors[key])})" for key in left])
        message = "weights %s: %d of %d tensors taken; left out: %s"
        logger.warning(message, path, len(used), len(tensors), listed)
    return left


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file of weights, on the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line that names the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file '{path}' does not exist; give a file, or null for none")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"weights '{path}' are an empty file; fetch it again")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            reason = f"weights '{path}' are damaged or no safetensors file ({error})"
            raise ValueError(f"{reason}{_hint(start)}") from None
    return _state(_unpickled(path, start), path)


def _hint(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "; it is the pointer of a Git LFS file: run 'git lfs pull' where it comes from"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "; it is a web page: fetch the file itself"
    return "; fetch it again, whole"


def _unpickled(path: Path, start: bytes) -> Any:
    """The content of a ``torch.save`` file of plain values, tensors and ``argparse.Namespace`` alone."""
    if zipfile.is_zipfile(path):
        check_archive(path, f"weights '{path}'")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch's advice on ways to open a file that would run code
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = str(error)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        if "TorchScript" in str(error):
            raise ValueError(
                f"weights '{path}' are a TorchScript program; save its tensors: "
                f"torch.save(torch.jit.load('{path.name}').state_dict(), '{path.stem}-weights.pth')"
            ) from None
        message = ""
    if needed := re.search(r"GLOBAL ([\w.]+)", message):
        raise ValueError(_refusal(path, needed[1], "is blocked" in message)) from None
    raise ValueError(f"weights '{path}' are damaged or no file of weights{_hint(start)}") from None


def _refusal(path: Path, needed: str, blocked: bool) -> str:
    """The reason why a pickle is not opened, and the line that converts it."""
    if blocked:
        return f"weights '{path}' would run {needed} when opened: do not open this file"
    return (
        f"weights '{path}' hold Python objects ({needed}) next to tensors, and opening these could run any "
        f"code; if you trust who made it, convert it once, where {needed.partition('.')[0]} can be imported: "
        f"{conversion(path)}"
    )


def conversion(path: Path) -> str:
    """The shell command that saves the tensors of a trusted pickle alone."""
    return (
        f"python -c \"import torch; m = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        "m = m.get('state_dict', m.get('model', m)) if isinstance(m, dict) else m; "
        f"torch.save(m if isinstance(m, dict) else m.state_dict(), '{path.stem}-weights.pth')\""
    )


def _state(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in the content of a file."""
    kind = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        for holder in HOLDERS:
            if isinstance(content.get(holder), Mapping):
                return _state(content[holder], path)
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
        kind = f"keys {some_names([str(key) for key in content])}"
    remedy = f"save names and tensors, bare or under {', '.join(HOLDERS)}"
    raise ValueError(f"weights '{path}' hold no state dict but {kind}; {remedy}")


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str, name: str) -> str:
    """The prefix of this net's names in the file: that under which most tensors fit."""
    fitting: Counter[str] = Counter()
    for key, value in tensors.items():
        for place in [0, *(at + 1 for at, letter in enumerate(key) if letter == ".")]:
            if (own := expected.get(key[place:])) is not None:
                fitting[key[:place]] += 1 + (value.shape == own.shape) * len(expected)
    if not fitting:
        return ""
    most = max(fitting.values())
    best = sorted((prefix for prefix, count in fitting.items() if count == most), key=lambda p: (len(p), p))
    for other in best[1:]:
        shared = [key for key in expected if best[0] + key in tensors and other + key in tensors]
        if not all(torch.equal(tensors[best[0] + key], tensors[other + key]) for key in shared):
            places = f"under {best[0]!r} and {other!r}; save the one you mean alone"
            raise ValueError(f"weights {path!r} hold {name} more than once, with other values, {places}")
    return best[0]


def _check(
    own: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str, name: str, head: str, fits: str
) -> None:
    """Refuse missing tensors, other shapes, more layers than the net has, values that are not finite."""
    pairs = {key: (own[key], value) for key, value in expected.items() if key in own}
    missing = [key for key in expected if key not in own and not key.endswith(_OPTIONAL)]
    shaped = [
        f"{key} ({_shape(value)}, not {_shape(right)})"
        for key, (value, right) in pairs.items()
        if value.shape != right.shape or value.is_floating_point() != right.is_floating_point()
    ]
    parts = {key.partition(".")[0] for key in expected}
    more = [key for key in own if key not in expected and key.partition(".")[0] in parts]
    more = [key for key in more if not (head and key.startswith(head))]
    kinds = {"missing": missing, "of another shape": shaped, "too many": more}
    wrong = [f"{len(names)} {kind}: {some_names(names)}" for kind, names in kinds.items() if names]
    if wrong:
        remedy = fits or "give weights of this net, or take the encoder that they are of"
        raise ValueError(f"{file} are not of {name}: {'; '.join(wrong)}; {remedy}")
    broken = [key for key, (value, _) in pairs.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{file} hold NaN or infinite values, in {some_names(broken)}; fetch the file again")


def _shape(value: Tensor) -> str:
    size = " x ".join(map(str, value.shape)) or "a number"
    return size if value.is_floating_point() else f"{size} of {str(value.dtype).removeprefix('torch.')}"
