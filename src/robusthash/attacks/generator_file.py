"""Files of generators: the nets, and what they were trained for.

That is the attack that made them, the victim (or surrogate) by its weights, sizes and labels, the budget, and
the options of the attack. Nothing else than that may use a file as its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.core.atomic_files import write_aside
from robusthash.data.base import RetrievalData
from robusthash.models.encoding import state_digest, weights_digest
from robusthash.models.hasher import Hasher


def generator_key(attack: str, model: Hasher, data: RetrievalData, eps: float) -> dict[str, Any]:
    """Ties of a generator: its attack, and of its model weights, bits, image size, labels, training items
    and budget.
    """
    classes = 0 if data.train.labels is None else data.train.labels.shape[1]
    sizes = {"bits": model.bits, "labels": classes, "image": list(data.image_size)}
    ties = {"attack": attack, "victim": weights_digest(model), **sizes}
    return {**ties, "train": data.train.fingerprint(), "eps": round(eps, 9)}


@dataclass(frozen=True)
class GeneratorFile:
    """The file of one generator: ``header`` says what it was trained for and how."""

    path: Path
    header: dict[str, Any]

    def restore(self, parts: dict[str, Any]) -> int:
        """Epochs that the file holds, its state put into the parts; 0 where there is no file.

        Raises:
            ValueError: a generator of other options; ``read`` refuses other victims.
        """
        if not self.path.is_file():
            return 0
        stored = read(self.path)
        for key, value in self.header.items():
            if (held := stored["header"].get(key)) != value:
                here, asked = _apart(held, value), _apart(value, held)
                raise ValueError(
                    f"{self.path} holds a generator with {key} {here}, and {asked} is asked for; name "
                    "another file, or delete this one to train again"
                )
        for name, part in parts.items():
            part.load_state_dict(stored["state"][name])
        return int(stored["epoch"])

    def write(self, parts: dict[str, Any], epoch: int) -> None:
        """Replace the file by the state after an epoch; whole or not at all."""
        state = {name: part.state_dict() for name, part in parts.items()}
        with write_aside(self.path) as temporary, temporary.open("wb") as stream:
            held = {"header": self.header, "epoch": epoch, "state": state, "digest": _nets_digest(state)}
            torch.save(held, stream)


def _nets_digest(state: Mapping[str, Mapping[str, Tensor]]) -> str:
    """``state_digest`` of both nets in the state of a training, without its optimisers."""
    nets = ("nets", "critic")
    return state_digest({f"{name}.{key}": value for name in nets for key, value in state[name].items()})


def _apart(one: Any, other: Any) -> str:
    """The part of a fact that the other lacks: of two texts of options, those that differ."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return str(one)
    first, second = (text.partition("(")[2].rstrip(")").split(", ") for text in (one, other))
    return ", ".join(option for option in first if option not in second) or one


def read(path: Path) -> dict[str, Any]:
    """Header, epoch and state of a generator's file.

    Raises:
        ValueError: no such file, no generator, or other nets than those that were written.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no generator {path}; the white-box attack on the surrogate writes one: robusthash "
            f"evaluate SURROGATE --attack '{{name: pros-gan, generator: {path}}}'"
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        kept = {"attack", "victim", "bits", "image", "labels", "eps", "train", "options", "epochs", "bounded"}
        assert kept <= set(stored["header"])
        assert {"nets", "critic", "g", "d"} <= set(stored["state"])
        assert stored["epoch"] == int(stored["epoch"])
        held, written = _nets_digest(stored["state"]), str(stored["digest"])
    except Exception as error:
        raise ValueError(f"{path} is no file of a generator; delete it, or name another") from error
    if held != written:
        raise ValueError(
            f"the nets in {path} are not those that were trained: their digest is {held}, and the file says "
            f"{written}; delete it to train again, or name another"
        )
    return stored


def require_attack(file: Path, header: dict[str, Any], attack: str) -> None:
    """Refuse a generator that another attack made."""
    if header["attack"] != attack:
        raise ValueError(f"{file} is a generator of {header['attack']}, not of {attack}; name another file")


def require_same(file: Path, header: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a generator that was trained for something else than ``expected``."""
    require_attack(file, header, expected["attack"])
    if header["victim"] != expected["victim"]:
        raise ValueError(
            f"{file} was trained for another victim (weights {header['victim'][:8]}, {header['bits']} bits; "
            f"here {expected['victim'][:8]}, {expected['bits']}): name another file to train one for it, "
            "or say transfer: true to measure how it carries over"
        )
    for key in expected:
        require_match(file, header, expected, key)


def require_match(file: Path, header: dict[str, Any], expected: dict[str, Any], key: str) -> None:
    """Refuse a generator that differs in one fact."""
    if header[key] != expected[key]:
        raise ValueError(f"{file} was trained for {key} {header[key]}, not {expected[key]}; name another")
