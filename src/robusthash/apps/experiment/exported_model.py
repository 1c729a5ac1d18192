"""Models outside of runs: exported folders of weights and a card, and entries of the registry."""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from robusthash.apps.experiment.config import load_config, shortened
from robusthash.apps.experiment.model_card import SEAL, is_digest, model_fault, sealed
from robusthash.apps.experiment.run_directory import Run, RunError, load_run, reading, without_weights
from robusthash.core.atomic_files import json_text, write_all_aside
from robusthash.core.limited_files import read_json, regular
from robusthash.core.plugins import as_sources, sources, without_new_code
from robusthash.core.registry import nearest
from robusthash.core.runtime import digest
from robusthash.data.image_text import text_form
from robusthash.metrics.results import software_versions
from robusthash.models.encoding import weights_digest
from robusthash.models.hasher import Hasher, build_hasher
from robusthash.robustness.evidence.records import ModelSource, load_entry

logger = logging.getLogger(__name__)

SCHEMA = "robusthash.model/1"
CARD, WEIGHTS = "model.json", "hasher.safetensors"
REGISTRY, RUNS = Path("registry"), Path("runs")


def save_exported(folder: Path, hasher: Hasher, facts: dict[str, Any], overwrite: bool = False) -> None:
    """Write weights and card of a hasher to a folder of their own.

    Args:
        facts: fields of the card: ``image_size``, ``texts``, ``digest``, and ``files`` where the digest is
            made of those of the files of a run.
        overwrite: replace an exported model of another digest.

    Raises:
        FileExistsError: the folder holds something else than an exported model, or another model.
        ValueError: a wrapped net, whose code is not of this package; a digest that is not of these weights.
    """
    if "foreign" in hasher.spec:
        raise ValueError(
            f"{hasher.spec['foreign']} is a wrapped net, which only its own code can build again: keep its "
            "state_dict by torch.save, and wrap it after loading"
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in hasher.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    spec = {**hasher.spec, **{name: without_weights(hasher.spec[name]) for name in ("image", "text")}}
    card = {
        "schema": SCHEMA,
        "texts": None,
        **facts,
        "bits": hasher.bits,
        "modalities": list(hasher.modalities),
        "hasher": spec,
    }
    if used := sources(spec):
        card["plugins"] = used
    card |= {"weights": hashlib.sha256(weights).hexdigest(), "versions": software_versions()}
    digests = _digest_of(card, hasher)
    if card.setdefault("digest", digests) != digests:
        raise ValueError(
            f"the digest {card['digest']!r} is not that of these weights ({digests}), which may have changed "
            "since; save SearchModel(hasher, side), which computes it"
        )
    _check_free(folder, digests, overwrite)
    text = json_text(sealed(card), CARD)
    folder.mkdir(parents=True, exist_ok=True)
    with write_all_aside([folder / WEIGHTS, folder / CARD]) as asides:
        asides[0].write_bytes(weights)
        asides[1].write_text(text, encoding="utf-8")


def _check_free(folder: Path, digest_: str, overwrite: bool) -> None:
    """Refuse a folder that holds something else than an exported model, or, unasked, another model."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in names if name not in (CARD, WEIGHTS)]:
        raise FileExistsError(f"{folder} holds {others[0]}, which is no part of a model; give another folder")
    if not names or overwrite:
        return
    try:
        held = read_json(folder / CARD)["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        held = "that cannot be read"
    if held != digest_:
        raise FileExistsError(
            f"{folder} holds another model, {held}, than {digest_}; give another folder, or overwrite=True"
        )


def _digest_of(card: Mapping[str, Any], hasher: Hasher) -> str:
    """The digest that a card with these weights has: of the files of its run, else of the tensors."""
    files = card.get("files") or {}
    if not files:
        return weights_digest(hasher)
    return digest({**files, "hasher": card["weights"][:16]}, 16)


def load_exported(folder: Path) -> tuple[Hasher, dict[str, Any]]:
    """Hasher (eval mode, CPU) and card of an exported model. No pickle is opened.

    The digest of a card by an earlier version, which does not say what it is made of, is not believed: the
    card that is returned has that of the tensors.

    Raises:
        RunError: damaged files, another schema, or parts of a module that ``core.plugins`` refuses.
    """
    again = "save the model again"
    with reading(folder / CARD, again, "the card"):
        card = read_json(folder / CARD)
        if fault := _fault(card):
            raise ValueError(fault)
        recorded = as_sources(card.get("plugins", {}))
    with reading(folder / WEIGHTS, again, "the file of weights"):
        weights = regular(folder / WEIGHTS).read_bytes()
        if hashlib.sha256(weights).hexdigest() != card["weights"]:
            raise ValueError("its sha256 is not that of the card")
        tensors = safetensors.torch.load(weights)
    with reading(folder / CARD, again, "the card"):
        with without_new_code(folder, recorded):
            hasher = build_hasher(**card["hasher"])
        hasher.load_state_dict(tensors)
        if list(hasher.modalities) != card["modalities"]:
            raise ValueError(f"modalities is {card['modalities']}, and its hasher has {hasher.modalities}")
        digests = _digest_of(card, hasher)
        if digests != card["digest"] and SEAL not in card:
            logger.warning(
                "%s is of an earlier version, and its digest %s cannot be computed from its weights: codes "
                "carry %s; save the model again from its run", folder / CARD, card["digest"], digests
            )  # fmt: skip
        elif digests != card["digest"]:
            raise ValueError(f"its digest is {card['digest']}, and that of the weights {digests}")
    return hasher.eval(), {**card, "digest": digests}


def _fault(card: Any) -> str:
    """The fault of the card of an exported model, if it has one."""
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


def name_of_recipe(source: ModelSource) -> str:
    """The name of the runs that a recipe makes; of one that is not here, the name of its file."""
    path = Path(source.recipe)
    return load_config(path, source.set).name if path.is_file() else path.stem


def training_command(source: ModelSource) -> str:
    """The command that makes the model of an entry again."""
    overrides = [word for each in (f"runtime.seed={source.seed}", *source.set) for word in ("--set", each)]
    return shlex.join(["robusthash", "train", source.recipe, *overrides])


def run_of_entry(name: str) -> Run:
    """The run with the weights of a registry entry.

    Args:
        name: id of an entry in ``registry/``, or the path of its file; its run is looked for in ``runs/``.

    Raises:
        RunError: no such entry, or no run with its weights; the message says how to make it.
    """
    path = Path(name) if name.endswith(".yaml") else REGISTRY / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in REGISTRY.glob("*.yaml"))
        hint = nearest(name, known) if known else f"; there is no {REGISTRY}/ here to look a name up in"
        raise RunError(f"{name!r} is neither a run, an exported model nor a registry entry{hint}")
    entry = load_entry(path)
    source, close, recipe_name = entry.source, "", name_of_recipe(entry.source)
    for card in sorted(RUNS.glob("*/*/model.json")):
        run = load_run(card.parent)
        if source.digest and run.card().get("digest") == source.digest:
            return run
        if run.config.name == recipe_name and run.config.runtime.seed == source.seed:
            if not source.digest:
                return run
            close = f" ({run.path} is of this recipe and seed with other weights, {run.card().get('digest')})"
    raise RunError(
        f"the weights {source.digest} of the entry {entry.id} are in no run of {RUNS}/{close}; train it, "
        f"'{training_command(source)}', and load that run"
    )
