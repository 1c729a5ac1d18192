"""A hasher in a folder: a card (JSON) and weights (safetensors), checked when they are read; no pickle."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from robusthash.core.atomic_files import json_text, write_all_aside
from robusthash.core.limited_files import parse_json, read_json, reading, regular, shortened
from robusthash.core.plugins import as_sources, sources, without_new_code
from robusthash.core.runtime import digest
from robusthash.data.image_text import text_form
from robusthash.metrics.results import software_versions
from robusthash.models.encoding import weights_digest
from robusthash.models.hasher import Hasher, build_hasher

SEAL = "card"  # the digest of all other fields; earlier versions wrote none
MOST_BITS, MOST_SIDE = 1 << 16, 1 << 14
"""Limits of a code and of the side of an image in pixels, beyond which a card is not believed."""

_MODALITIES = ("image", "text")


def sealed(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card as it reads from its file, with the digest of all other fields."""
    plain = parse_json(json_text({name: value for name, value in card.items() if name != SEAL}), "the card")
    return {**plain, SEAL: digest(plain, 16)}


def is_digest(value: Any) -> bool:
    """A digest of weights, as cards and codes carry it."""
    return isinstance(value, str) and (value == "none" or re.fullmatch("[0-9a-f]{16}", value) is not None)


def is_count(value: Any, least: int = 1) -> bool:
    """A whole number from ``least`` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    """Sides of images in pixels, or the width of vectors; nothing where there are no images."""
    return isinstance(value, list) and len(value) <= 2 and all(map(is_count, value))


def beyond_limits(card: Mapping[str, Any]) -> str:
    """The fault of a card whose model would take more memory than any that is trained; "" of others."""
    if card["bits"] > MOST_BITS:
        return f"bits is {card['bits']}, more than {MOST_BITS}"
    if len(card["image_size"]) == 2 and max(card["image_size"]) > MOST_SIDE:
        return f"image_size is {card['image_size']}, more than {MOST_SIDE} a side"
    return ""


def _is_modalities(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(name in _MODALITIES for name in value)


Checks = Mapping[str, Callable[[Any], bool]]
MODEL: Checks = {"bits": is_count, "modalities": _is_modalities, "image_size": _is_size, "digest": is_digest}
"""Fields of every card, and whether a value fits."""


def field_fault(facts: Mapping[str, Any], fields: Checks) -> str:
    """The first field that is missing or does not fit, in words; "" where all do."""
    for name, fits in fields.items():
        if name not in facts:
            return f"it lacks {name}"
        if not fits(facts[name]):
            return f"{name} is {shortened(repr(facts[name]))}"
    return ""


def model_fault(card: Any, fields: Checks = MODEL) -> str:
    """The fault of a card of a run or of a saved model, if it has one: a wrong or edited field."""
    if not isinstance(card, dict) or not isinstance(card.get("hasher"), dict):
        return "it names no hasher"
    if fault := field_fault(card, fields) or beyond_limits(card):
        return fault
    if SEAL in card and sealed(card)[SEAL] != card[SEAL]:
        return "a field was changed after it was written: its digest is another"
    if card["hasher"].get("bits") != card["bits"]:
        return f"bits is {card['bits']}, and its hasher has {shortened(repr(card['hasher'].get('bits')))}"
    return ""


logger = logging.getLogger(__name__)

SCHEMA = "robusthash.model/1"


@dataclass(frozen=True)
class FolderNames:
    """Names of the two files of a saved model, and of others that may lie next to them."""

    card: str
    weights: str
    others: tuple[str, ...] = ()


PLAIN = FolderNames("model.json", "hasher.safetensors")
HUB = FolderNames("config.json", "model.safetensors", ("README.md", ".gitattributes", ".cache"))
"""Names by the conventions of the Hugging Face hub."""


def names_in(folder: Path) -> FolderNames | None:
    """The names that the card of a saved model has in a folder; None where there is none."""
    return next((names for names in (PLAIN, HUB) if (folder / names.card).is_file()), None)


def without_weights(settings: Any) -> Any:
    """Settings of parts without pretrained weights, whose file may be gone, or not be meant for this one."""
    if not isinstance(settings, dict):
        return settings
    return {key: None if key == "weights" else without_weights(value) for key, value in settings.items()}


def save_exported(
    folder: Path,
    hasher: Hasher,
    facts: Mapping[str, Any],
    overwrite: bool = False,
    names: FolderNames = PLAIN,
) -> dict[str, Any]:
    """Write weights and card of a hasher to a folder of their own; the card.

    Args:
        facts: fields of the card: ``image_size``, ``texts``, ``digest``, and ``files`` where the digest is
            made of those of the files of a run.
        overwrite: replace a saved model of another digest.

    Raises:
        FileExistsError: the folder holds something else than a saved model, or another model.
        ValueError: a wrapped net, whose code is not of this package; a digest that is not of these weights.
    """
    if "foreign" in hasher.spec:
        raise ValueError(
            f"{hasher.spec['foreign']} is a wrapped net, which only its own code can build again: keep its "
            "state_dict by torch.save, and wrap it after loading"
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in hasher.state_dict().items()}
    weights = safetensors.torch.save(tensors)  # the very bytes of a run's file, of which its digest is made
    spec = without_weights(hasher.spec)
    card = {
        "schema": SCHEMA,
        "texts": None,
        **facts,
        "bits": hasher.bits,
        "modalities": list(hasher.modalities),
        "hasher": spec,
    }
    if fault := beyond_limits(card):
        raise ValueError(f"{fault}: no saved model could be loaded with it")
    if used := sources(spec):
        card["plugins"] = used
    card |= {"weights": hashlib.sha256(weights).hexdigest(), "versions": software_versions()}
    model_digest = _digest_of(card, hasher)
    if card.setdefault("digest", model_digest) != model_digest:
        raise ValueError(
            f"the digest {card['digest']!r} is not that of these weights ({model_digest}), which may have "
            "changed since; save SearchModel(hasher, side), which computes it"
        )
    _check_free(folder, model_digest, overwrite, names)
    card = sealed(card)
    folder.mkdir(parents=True, exist_ok=True)
    with write_all_aside([folder / names.weights, folder / names.card]) as asides:
        asides[0].write_bytes(weights)
        asides[1].write_text(json_text(card, names.card), encoding="utf-8")
    return card


def _check_free(folder: Path, digest_: str, overwrite: bool, names: FolderNames) -> None:
    """Refuse a folder that holds something else than a saved model, or, unasked, another model."""
    listed = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in listed if name not in (names.card, names.weights, *names.others)]:
        raise FileExistsError(f"{folder} holds {others[0]}, which is no part of a model; give another folder")
    if (names.card not in listed and names.weights not in listed) or overwrite:
        return
    try:
        present = read_json(folder / names.card)["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        present = "that cannot be read"
    if present != digest_:
        raise FileExistsError(
            f"{folder} holds another model, {present}, than {digest_}; give another folder, or replace it: "
            "--overwrite, in Python overwrite=True"
        )


def _digest_of(card: Mapping[str, Any], hasher: Hasher) -> str:
    """The digest that a card with these weights has: of the files of its run, else of the tensors."""
    files = card.get("files") or {}
    if not files:
        return weights_digest(hasher)
    return digest({**files, "hasher": card["weights"][:16]}, 16)


def load_exported(folder: Path) -> tuple[Hasher, dict[str, Any]]:
    """Hasher (eval mode, CPU) and card of a saved model, of either names. No pickle is opened.

    The digest of a card by an earlier version, which does not say what it is made of, is not believed: the
    card that is returned has that of the tensors. No weights but those of the folder are read, whatever the
    card says.

    Raises:
        RunError: damaged files, another schema, or parts of a module that ``core.plugins`` refuses.
    """
    names = names_in(folder) or PLAIN
    file, again = folder / names.card, "save the model again" if names is PLAIN else "fetch or save it again"
    with reading(file, again, "the card"):
        card = read_json(file)
        if fault := _fault(card):
            raise ValueError(fault)
        recorded = as_sources(card.get("plugins", {}))
    with reading(folder / names.weights, again, "the file of weights"):
        weights = regular(folder / names.weights).read_bytes()
        if hashlib.sha256(weights).hexdigest() != card["weights"]:
            raise ValueError("its sha256 is not that of the card")
        tensors = safetensors.torch.load(weights)
    with reading(file, again, "the card"):
        with without_new_code(folder, recorded):
            hasher = build_hasher(**without_weights(card["hasher"]))
        if fault := _misfit(tensors, hasher.state_dict()):
            raise ValueError(fault)
        hasher.load_state_dict(tensors)
        if list(hasher.modalities) != card["modalities"]:
            raise ValueError(f"modalities is {card['modalities']}, and its hasher has {hasher.modalities}")
        model_digest = _digest_of(card, hasher)
        if model_digest != card["digest"] and SEAL not in card:
            logger.warning(
                "%s is of an earlier version, and its digest %s cannot be computed from its weights: codes "
                "carry %s; save the model again from its run", file, card["digest"], model_digest
            )  # fmt: skip
        elif model_digest != card["digest"]:
            raise ValueError(f"its digest is {card['digest']}, and that of the weights {model_digest}")
    hasher.side = card["image_size"][0] if len(card["image_size"]) == 2 else None
    return hasher.eval(), {**card, "digest": model_digest}


def _misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first tensor that is missing, unknown or of another shape than the card's hasher has it."""
    if missing := sorted(set(expected) - set(tensors)):
        return f"its hasher has {missing[0]}, and the file of weights does not"
    if unknown := sorted(set(tensors) - set(expected)):
        return f"the file of weights has {unknown[0]}, and its hasher does not"
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = tuple(tensor.shape), tuple(expected[name].shape)
            return f"the weights of {name} have the shape {shapes[0]}, and its hasher takes {shapes[1]}"
    return ""


def _fault(card: Any) -> str:
    """The fault of the card of a saved model, if it has one."""
    if isinstance(card, dict) and card.get("schema") != SCHEMA:
        return f"schema {card.get('schema')!r}, and this version reads {SCHEMA!r}"
    if fault := model_fault(card):
        return fault
    size, files = card["image_size"], card.get("files", {})
    if not isinstance(card.get("weights"), str):
        return "it lacks weights, the sha256 of its file"
    if size and (len(size) != 2 or size[0] != size[1]):
        return f"image_size is {size}, and a model encodes squares"
    if not size and card["modalities"] == ["image"]:
        return "image_size is [], and it encodes images alone"
    if not isinstance(files, dict) or not all(map(is_digest, files.values())):
        return f"files is {shortened(repr(files))}"
    if "texts" not in card:
        return "it lacks texts"
    if card["texts"] is not None:
        if not isinstance(card["texts"], dict):
            return f"texts is {shortened(repr(card['texts']))}"
        text_form(card["texts"])
    return ""
