"""Files of pretrained weights as people have them: the one loader behind ``weights`` of the image
encoders."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robusthash.core.out_of_memory import out_of_memory

logger = logging.getLogger(__name__)

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Under which keys training scripts put the state dict; the first that holds one is taken."""

_WRAPPERS = ("module", "_orig_mod")  # what DataParallel and torch.compile put into names, at any place
_OPTIONAL = (
    "num_batches_tracked"  # counts of BatchNorm, which files of old versions lack and nothing here reads
)
_SHOWN = 3


def load_weights(module: nn.Module, path: str, name: str, head: str = "", fits: str = "") -> tuple[str, ...]:
    """Fill ``module`` with the tensors of a file, matched by name whatever stands before the names.

    The file is safetensors or what ``torch.save`` wrote: a state dict, bare or under one of ``HOLDERS``,
    beside any plain values and ``argparse.Namespace`` objects. Nothing in it is executed. A common prefix
    (``module.``, ``backbone.``, ``encoder.``, ...) is found, not asked for. Every tensor of the module must
    be there in its shape. What belongs to parts that the module lacks, a classifier of any size above all, is
    left out and logged.

    Args:
        module: the net, without classifier.
        path: of the file.
        name: of the net, for messages.
        head: prefix of a classifier that sits among the module's own names, ``classifier.6.`` of AlexNet.
        fits: remedy where shapes differ, such as which options must fit.

    Returns:
        Names of the tensors that were left out, as the file has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line: a file that is empty, damaged, of another kind or would run code; tensors of
            another net, or of two nets.
    """
    tensors = read_tensors(Path(path).expanduser())
    wanted = module.state_dict()
    clean = {_unwrapped(key): key for key in tensors}
    prefix = _prefix({key: tensors[old] for key, old in clean.items()}, wanted, path, name)
    own = {key.removeprefix(prefix): tensors[old] for key, old in clean.items() if key.startswith(prefix)}
    _check(own, wanted, f"weights {path!r} ({len(tensors)} tensors)", name, head, fits)
    module.load_state_dict({key: own.get(key, value) for key, value in wanted.items()})
    taken = {clean[prefix + key] for key in own if key in wanted}
    left = tuple(key for key in tensors if key not in taken)
    if left:
        told = _some([f"{key} ({_shape(tensors[key])})" for key in left])
        logger.warning(
            "weights %s: %d of %d tensors taken; left out: %s", path, len(taken), len(tensors), told
        )
    return left


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file of weights, on the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line that names the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"weights file '{path}' does not exist; give the path of a file, or null for none"
        )
    start = _start(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"weights '{path}' are damaged or no safetensors file ({error}){_hint(start)}"
            ) from None
    return _state(_unpickled(path, start), path)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"weights '{path}' are an empty file; fetch it again")
    return start


def _hint(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "; it is the pointer of a Git LFS file: run 'git lfs pull' where it comes from"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "; it is a web page: fetch the file itself"
    return "; fetch it again, whole"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's advice on other ways to open a file, which would run code."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        yield


def _unpickled(path: Path, start: bytes) -> Any:
    """What ``torch.save`` wrote, of plain values, tensors and ``argparse.Namespace`` alone."""
    try:
        with _quiet():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        said = str(error)
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        if "TorchScript" in str(error):
            raise ValueError(
                f"weights '{path}' are a TorchScript program; save its tensors: "
                f"torch.save(torch.jit.load('{path.name}').state_dict(), '{path.stem}-weights.pth')"
            ) from None
        said = ""
    if found := re.search(r"GLOBAL ([\w.]+)", said):
        raise ValueError(_refusal(path, found[1], "is blocked" in said)) from None
    raise ValueError(f"weights '{path}' are damaged or no file of weights{_hint(start)}") from None


def _refusal(path: Path, wanted: str, blocked: bool) -> str:
    """Why a pickle is not opened, and the line that converts it."""
    if blocked:
        return (
            f"weights '{path}' would run {wanted} when opened, which no weights need: do not open this file"
        )
    return (
        f"weights '{path}' hold Python objects ({wanted}) beside tensors, and opening these could run any code; if you "
        f"trust who made it, convert it once, where {wanted.partition('.')[0]} can be imported: {conversion(path)}"
    )


def conversion(path: Path) -> str:
    """The shell command that saves the tensors of a trusted pickle alone."""
    return (
        f"python -c \"import torch; m = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        "m = m.get('state_dict', m.get('model', m)) if isinstance(m, dict) else m; "
        f"torch.save(m if isinstance(m, dict) else m.state_dict(), '{path.stem}-weights.pth')\""
    )


def _state(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file held."""
    if isinstance(found, Mapping):
        for holder in HOLDERS:
            if isinstance(found.get(holder), Mapping):
                return _state(found[holder], path)
        tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    held = (
        f"keys {_some([str(key) for key in found])}"
        if isinstance(found, Mapping)
        else f"a {type(found).__name__}"
    )
    raise ValueError(
        f"weights '{path}' hold no state dict but {held}; save names and tensors, bare or under {', '.join(HOLDERS)}"
    )


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str, name: str) -> str:
    """What stands before the names of this net in the file: the prefix under which most tensors fit.

    Raises:
        ValueError: two prefixes under which the whole net is, with other values.
    """
    fitting: Counter[str] = Counter()
    for key, value in tensors.items():
        for place in [0, *(at + 1 for at, letter in enumerate(key) if letter == ".")]:
            if (own := wanted.get(key[place:])) is not None:
                fitting[key[:place]] += 1 + (value.shape == own.shape) * len(wanted)
    if not fitting:
        return ""
    most = max(fitting.values())
    best = sorted((prefix for prefix, count in fitting.items() if count == most), key=lambda p: (len(p), p))
    for other in best[1:]:
        shared = [key for key in wanted if best[0] + key in tensors and other + key in tensors]
        if not all(torch.equal(tensors[best[0] + key], tensors[other + key]) for key in shared):
            raise ValueError(
                f"weights {path!r} hold {name} more than once, with other values, under {best[0]!r} and {other!r}; "
                "save the one you mean alone"
            )
    return best[0]


def _check(
    own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: str, name: str, head: str, fits: str
) -> None:
    """Refuse tensors of another net.

    Raises:
        ValueError: missing tensors, other shapes, more layers than the net has, values that are not finite.
    """
    missing = [key for key in wanted if key not in own and not key.endswith(_OPTIONAL)]
    shaped = [
        f"{key} ({_shape(own[key])}, not {_shape(value)})"
        for key, value in wanted.items()
        if key in own
        and (own[key].shape != value.shape or own[key].is_floating_point() != value.is_floating_point())
    ]
    parts = {key.partition(".")[0] for key in wanted}
    more = [
        k
        for k in own
        if k not in wanted and k.partition(".")[0] in parts and not (head and k.startswith(head))
    ]
    wrong = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("of another shape", shaped), ("too many", more))
        if names
    ]
    if wrong:
        remedy = fits or "give weights of this net, or take the encoder that they are of"
        raise ValueError(f"{file} are not of {name}: {'; '.join(wrong)}; {remedy}")
    broken = [key for key in wanted if key in own and not torch.isfinite(own[key]).all()]
    if broken:
        raise ValueError(f"{file} hold NaN or infinite values, in {_some(broken)}; fetch the file again")


def _shape(value: Tensor) -> str:
    size = " x ".join(map(str, value.shape)) or "a number"
    return size if value.is_floating_point() else f"{size} of {str(value.dtype).removeprefix('torch.')}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
