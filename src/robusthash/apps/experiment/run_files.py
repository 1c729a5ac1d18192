"""Files of a run: damage named with its remedy, the model card, and weights that run no code when read."""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robusthash.apps.experiment.config import Config, ConfigError, is_folder_name, load_config
from robusthash.core.atomic_files import json_text, write_aside, write_text
from robusthash.core.limited_files import RunError, read_json, reading, regular
from robusthash.core.plugins import PluginError, Sources, as_sources, changed, sources, without_new_code
from robusthash.metrics.results import EvalResult
from robusthash.models.saved_hasher import MODEL, PLAIN, is_count, model_fault
from robusthash.models.saved_hasher import SEAL as SEAL
from robusthash.models.saved_hasher import sealed as sealed

CONFIG = "config.yaml"
RESULTS_ONLY = "kept.json"  # marks a copy of results without weights, see ``results_copy``
COPY_AGAIN = "it is a copy: make it again with 'robusthash keep', or take it from the repository"
PLUGINS = "plugins.json"  # source files of the code that a config names as module:name

_REMADE = {
    "metrics.json": "delete it, then: robusthash evaluate {run}",
    "assess.json": "delete it and assess again (finished blocks are taken): robusthash assess {run}",
    "evidence.json": "delete it and verify the bundles again: robusthash evidence verify BUNDLE --run {run}",
    "curves": "delete it, then: robusthash curves {run}",
}


def remade(path: Path) -> str:
    """The way to make a file of results of a run again."""
    kind = "curves" if path.match("curves-*.json") else path.name
    return _REMADE[kind].format(run=shlex.quote(str(path.parent)))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json_text(value, path.name))


def without_config(path: Path) -> str:
    """Words for the folder of a run, or of a copy, that has lost its config; "" of any other folder."""
    names = ("metrics.json", "assess.json", RESULTS_ONLY)
    model = (path / "model.json").is_file() and not (path / PLAIN.weights).is_file()  # that of an export
    if (path / CONFIG).is_file() or not (model or any((path / name).is_file() for name in names)):
        return ""
    return f"{path} holds results, and no {CONFIG} that says of what; {_config_again(path)}"


def _config_again(path: Path) -> str:
    if (path / RESULTS_ONLY).is_file():
        return COPY_AGAIN
    runs = shlex.quote(str(path.parent.parent))
    return f"write it again with the recipe of the run: robusthash train RECIPE --runs {runs}"


def file_again(path: Path, config: Config, file: str) -> str:
    """The way to make a damaged file of the run at ``path`` again; what is whole is not made twice."""
    if (path / RESULTS_ONLY).is_file():
        return COPY_AGAIN
    recipe, runs = (shlex.quote(str(p)) for p in (path / CONFIG, path.parent.parent))
    if not in_place(path, config):
        return f"train its recipe again, and use that run: robusthash train {recipe}"
    return f"delete {path / file}, then: robusthash train {recipe} --runs {runs}"


def config_of(path: Path) -> Config:
    """The config of a run directory, with every section: an emptied file is not one of defaults."""
    again = _config_again(path)
    try:
        with opening(path):
            config = load_config(path / CONFIG)
    except PluginError as error:
        raise RunError(str(error)) from None
    except (ConfigError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{path}: its config cannot be read: {first}; {again}") from None
    if missing := [name for name in Config.model_fields if name not in config.model_fields_set]:
        lacks = f"it has no {', '.join(missing)}"
        raise RunError(f"{path / CONFIG} is damaged ({lacks}); {again}")
    return config


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """A block that reads the run at ``path``, which may import the plug-ins that it was made with."""
    with without_new_code(path, _recorded(path)):
        yield


def _recorded(path: Path) -> Sources:
    file = path / PLUGINS
    if not file.is_file():
        return {}
    with reading(file, "train the run again, or delete it and allow its modules by ROBUSTHASH_PLUGINS"):
        try:
            return as_sources(read_json(file))
        except AttributeError:
            raise ValueError("it is no mapping of modules") from None


def record_plugins(path: Path, config: Config) -> None:
    """Write the source files of the modules that a config names, if it names any."""
    if used := sources(config.model_dump()):
        write_json(path / PLUGINS, used)


def check_plugins(path: Path, config: Config) -> None:
    """Refuse a run whose model was trained by other sources than those that its config names now."""
    model = sources(config.data, config.hasher.model_dump(), config.training.model_dump())
    if files := changed(_recorded(path), model):
        raise RunError(
            f"{path} was begun with another {files[0]}, which has changed since; give the recipe another "
            "name, or --runs another folder"
        )


def command_line() -> str:
    """The command of this process as a shell takes it; "" where it is not one of this package."""
    program = Path(sys.argv[0])
    ours = program.stem == "robusthash" or program.parts[-2:] == ("robusthash", "__main__.py")
    return shlex.join(["robusthash", *sys.argv[1:]]) if ours else ""


def command_of(path: Path) -> str:
    """The command that made the run at ``path``, or one that makes it again."""
    file, again = path / "environment.json", shlex.quote(str(path / "config.yaml"))
    command = read_json(file).get("command") if file.is_file() else None
    return command or f"robusthash train {again} --runs {shlex.quote(str(path.parent.parent))}"


def file_digest(path: Path) -> str:
    """16 hex digits of the content of a file."""
    with regular(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def save_weights(state: Mapping[str, Tensor], path: Path) -> str:
    """Write tensors; the digest of the file. It is written as others are, by the umask of the user."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    content = safetensors.torch.save(tensors)
    with write_aside(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()[:16]


def load_weights(module: nn.Module, path: Path, remedy: str) -> None:
    """Load every tensor by name; those that ``setup`` makes (centers) take the shape of the file.

    Raises:
        RunError: a file that cannot be read or does not fit, with the ``remedy``.
    """
    with reading(path, remedy, "the file of weights"):
        tensors = safetensors.torch.load_file(regular(path))
    for name, empty in [*module.named_buffers(), *module.named_parameters()]:
        if name in tensors and empty.shape != tensors[name].shape and empty.numel() == 0:
            owner, _, leaf = name.rpartition(".")
            tensor = torch.empty_like(tensors[name])
            tensor = nn.Parameter(tensor) if isinstance(empty, nn.Parameter) else tensor
            setattr(module.get_submodule(owner), leaf, tensor)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"weights {path} do not fit the model card: {reason}; {remedy}") from None


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


_RUN = {
    "name": is_folder_name,
    "id": is_folder_name,
    **MODEL,
    "declared": lambda value: isinstance(value, str),
    "hasher": lambda value: isinstance(value, dict),
    "epochs": lambda value: is_count(value, 0),
    "last": lambda value: isinstance(value, dict),
    "seconds": _is_duration,
}


def in_place(path: Path, config: Config) -> bool:
    """The directory of a run is called as training calls it; a copy elsewhere may have any name."""
    return path.resolve().parent.name == config.name


def run_fault(card: Any, path: Path, config: Config, results_only: bool = False) -> str:
    """The fault of the card of the run at ``path``, or of a copy of results, written aside."""
    if fault := model_fault(card, _RUN):
        return fault
    if card["name"] != config.name:
        return f"it is of {card['name']!r}, and the config of {config.name!r}"
    if in_place(path, config) and not results_only and card["id"] != path.resolve().name:
        return f"it is of the run {card['id']}, and the directory of {path.resolve().name}"
    size = config.data.get("size") if isinstance(config.data, dict) else None
    own = isinstance(config.data, dict) and ":" not in str(
        config.data.get("name")
    )  # the size of others may differ
    if own and is_count(size) and len(card["image_size"]) == 2 and card["image_size"] != [size, size]:
        return f"image_size is {card['image_size']}, and the config says {size} pixels a side"
    return ""


def other_weights(results: Mapping[str, EvalResult], card: Mapping[str, Any]) -> str:
    """The first result that is of other weights than those of the card, in words; "" of none."""
    for name, result in results.items():
        if (weights := result.setting.digests.get("model", card["digest"])) != card["digest"]:
            return f"the result {name!r} is of the weights {weights}, and the card says {card['digest']}"
    return ""
