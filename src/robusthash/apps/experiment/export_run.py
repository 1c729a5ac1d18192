"""Export of a trained model: a file that runs without this package, or a folder for the hub, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.apps.experiment.config import settings_of
from robusthash.apps.experiment.run_directory import RunError, load_run
from robusthash.apps.experiment.search_model import SearchModel, load
from robusthash.core.atomic_files import write_aside
from robusthash.core.hamming import pack, unpack
from robusthash.core.limited_files import read_json
from robusthash.core.runtime import Draws, Progress, silent
from robusthash.data.copies import trained_for_copies
from robusthash.data.image_files import read_image
from robusthash.data.photos import PHOTOGRAPHS, photograph_path
from robusthash.metrics.results import EvalResult, headline_of, software_versions
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.hub_folder import HubCard, HubScore, check_id, push_folder
from robusthash.models.portable.model_files import (
    FileFacts,
    WrittenModel,
    input_facts,
    with_check,
    write_model,
)
from robusthash.models.portable.portable_hasher import Pixels, PortableHasher
from robusthash.models.saved_hasher import names_in

Format = Literal["onnx", "torchscript", "torch"]
SUFFIXES: Mapping[Format, str] = {"onnx": ".onnx", "torchscript": ".pt", "torch": ""}

CHECKED = 256  # images whose codes are compared
_BATCH = 100  # of them at a time, so that the last batch is smaller
_AGREE = 0.99  # share of bits below which the file is of another model


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        to: ``onnx``, ``torchscript``, or ``torch``: a folder as ``SearchModel.save_pretrained`` writes it.
        modality: ``image`` or ``text``, of a file; a folder has both.
        side: of a model that purifies queries alone: the hasher of ``query`` or of ``database``.
        pixels: ``float32`` in [0, 1], which an audit can follow, or ``uint8``.
        licence: of the model card of a folder.
        overwrite: replace what is there.
        push: ``user/name`` of the hub, to which a folder is uploaded; None uploads nothing.
    """

    to: Format = "onnx"
    modality: str = "image"
    side: Literal["query", "database"] = "query"
    pixels: Pixels = "float32"
    licence: str = "unknown"
    overwrite: bool = False
    push: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        if self.push is not None and self.to != "torch":
            raise ValueError("the hub takes a folder: say --to torch with --push")
        if self.push is not None:
            check_id(self.push)
        set_options = [
            name
            for name in ("modality", "side", "pixels")
            if getattr(self, name) != getattr(ExportOptions, name)
        ]
        if set_options and self.to == "torch":
            raise ValueError(
                f"a folder holds the whole model: leave --{set_options[0]} out, or write a file by --to onnx"
            )


def export(
    source: str | Path | SearchModel,
    out: str | Path | None = None,
    *,
    progress: Progress = silent,
    about: HubCard | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a trained model to a file or folder, and compare its codes with those of the model.

    Args:
        source: a run, a saved folder, the id of a registry entry, or a model that was loaded or made.
        out: the file, or the folder of ``torch``; by default the name of the model, here.
        about: facts of the model card; by default those of the run.
        options: fields of ``ExportOptions``.

    Returns:
        ``path``, ``to``, ``bits`` and ``check``: images, equal codes, bits, equal bits; ``address`` of the
        hub where it was pushed.

    Raises:
        FileExistsError: something is there, without ``overwrite``.
        RunError, ValueError: a source that cannot be loaded; a model that the format does not hold, or whose
            codes are drawn at random.
    """
    settings = ExportOptions(**options)
    model = source if isinstance(source, SearchModel) else load(source, "cpu")
    if about is None:
        unknown = HubCard(licence=settings.licence)
        about = unknown if isinstance(source, SearchModel) else about_of(source, settings.licence)
    suffix = SUFFIXES[settings.to]
    path = Path(f"{about.name}{suffix}" if out is None else out)
    if settings.to == "torch":
        return _export_folder(model, about, path, settings)
    if path.suffix != suffix:
        raise ValueError(f"--to {settings.to} writes a file that ends in {suffix}, got {path}")
    if path.exists() and not settings.overwrite:
        raise FileExistsError(f"{path} is there already; give another --out, or --overwrite")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    hasher, inputs = _part(model, settings)
    net = PortableHasher(hasher, settings.modality, settings.pixels)
    progress(0, 2, "writing")
    written = write_model(net, inputs[:2], settings.to)
    progress(1, 2, "comparing codes")
    check = compared(hasher, settings.modality, inputs, written)
    facts = with_check(_facts(model, hasher, about, settings, inputs), check)
    with write_aside(path) as aside:
        aside.write_bytes(written.content(facts))
    progress(2, 2, "comparing codes")
    return {"path": str(path), "to": settings.to, "bits": model.bits, "check": check}


def _export_folder(model: SearchModel, about: HubCard, path: Path, options: ExportOptions) -> dict[str, Any]:
    model.save_pretrained(path, about, options.overwrite)
    again = load(path, "cpu")
    modality = options.modality if options.modality in model.hasher.modalities else model.hasher.modalities[0]
    inputs = checked_inputs(model, modality)
    pairs = [encode_signs(each.hasher, modality, inputs, _BATCH) for each in (model, again)]
    result = {"path": str(path), "to": "torch", "bits": model.bits, "check": _counts(*pairs)}
    if options.push is not None:
        result["address"] = push_folder(path, options.push, options.private)
    return result


def _part(model: SearchModel, options: ExportOptions) -> tuple[Hasher, Tensor]:
    """The hasher of one side, and the inputs that its codes are compared on.

    Raises:
        ValueError: no such modality; numbers instead of bits; codes that are drawn at random.
    """
    hasher = model.hasher
    if options.modality not in hasher.modalities:
        encoded = ", ".join(hasher.modalities)
        raise ValueError(f"this model encodes {encoded}, not {options.modality}; say --modality {encoded}")
    if hasher.distance != "hamming":
        raise ValueError(f"this model is searched by the {hasher.distance} distance and has no codes to pack")
    hasher = hasher.for_database() if options.side == "database" else hasher
    inputs = checked_inputs(model, options.modality)
    first, again = (encode_signs(hasher, options.modality, inputs[:16]) for _ in range(2))
    if not torch.equal(first, again):
        raise ValueError(
            "this model draws its codes at random, which a file does not do; --to torch writes every model"
        )
    if options.modality == "image" and options.pixels == "uint8":
        if inputs.ndim != 4:
            raise ValueError("this model takes features, which are no pixels; leave --pixels out")
        inputs = (inputs * 255).round().to(torch.uint8)
    return hasher, inputs


def _facts(
    model: SearchModel, hasher: Hasher, about: HubCard, options: ExportOptions, inputs: Tensor
) -> FileFacts:
    with frozen(hasher), torch.no_grad():
        few = _as_floats(inputs[:2]).to(hasher.device)
        scale = float(hasher({options.modality: few})[options.modality].scale)
    texts = model.texts if options.modality == "text" else None
    return FileFacts(
        name=about.name,
        bits=model.bits,
        modality=options.modality,
        input=input_facts(inputs, options.pixels),
        size=model.side if options.modality == "image" and model.side else None,
        digest=model.origin,
        declared=hasher.declared,
        purifier=options.modality in hasher.purifiers,
        scale=scale,
        finds_copies=about.finds_copies,
        texts=None if texts is None else texts.plain(),
        versions=software_versions(),
    )


def _as_floats(inputs: Tensor) -> Tensor:
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def compared(hasher: Hasher, modality: str, inputs: Tensor, written: WrittenModel) -> dict[str, int]:
    """Numbers of equal codes and bits of a hasher and of the file, which computes batches of several sizes.

    Raises:
        ValueError: more than 1 % of the bits differ, as of another model, or codes that are not its logits'.
    """
    ours = encode_signs(hasher, modality, _as_floats(inputs), _BATCH)
    answers = [written.run(part) for part in inputs.split(_BATCH)]
    codes = torch.cat([torch.from_numpy(answer[0]) for answer in answers])
    logits = torch.cat([torch.from_numpy(answer[1]) for answer in answers])
    if not torch.equal(codes, pack(logits.ge(0).float())):
        raise ValueError("the codes of the written file are not the signs of its logits; nothing was kept")
    check = _counts(ours, unpack(codes, hasher.bits))
    if check["equal_bits"] < _AGREE * check["bits"]:
        raise ValueError(
            f"the written file agrees on {check['equal_bits']} of {check['bits']} bits; nothing was kept"
        )
    return check


def _counts(one: Tensor, two: Tensor) -> dict[str, int]:
    equal = one == two
    counts = {"images": len(equal), "equal_codes": int(equal.all(1).sum())}
    return {**counts, "bits": equal.numel(), "equal_bits": int(equal.sum())}


def checked_inputs(model: SearchModel, modality: str) -> Tensor:
    """The inputs that codes are compared on, always the same: windows of the photographs of this package.

    Features, bags and token ids are drawn at random.
    """
    draws, ids = Draws(0).within("export", modality), torch.arange(CHECKED)
    if modality == "image" and model.side:
        side = model.side
        whole = [read_image(photograph_path(each), 2 * side) for each in PHOTOGRAPHS]
        places = (draws.uniform(ids, (2,)) * (side + 1)).long().tolist()
        windows = [
            whole[n % len(whole)][:, top : top + side, left : left + side]
            for n, (top, left) in enumerate(places)
        ]
        return torch.stack(windows).float() / 255
    encoder = model.hasher.encoders[modality]
    if modality == "image":
        return draws.uniform(ids, (int(encoder.inputs),))  # type: ignore[arg-type]
    if encoder.embedding is None:
        return draws.uniform(ids, (int(model.hasher.spec["vocabulary"]),)).lt(0.02).float()
    length = int(getattr(model.texts, "max_length", 16))
    return (draws.uniform(ids, (length,)) * int(encoder.words)).long()  # type: ignore[arg-type]


def about_of(source: str | Path, licence: str = "unknown") -> HubCard:
    """The facts of the model card of a run; of other sources the name alone."""
    folder = Path(source)
    if not (folder / "config.yaml").is_file():
        names = names_in(folder)
        copies = None if names is None else read_json(folder / names.card).get("finds_copies")
        return HubCard(name=folder.resolve().name, licence=licence, finds_copies=copies)
    run = load_run(folder)
    parts = run.config.data, run.config.training.objective, run.config.training.recipe
    data, objective, recipe = (settings_of(part)["name"] for part in parts)
    try:
        results = list(run.results().values())
    except RunError:  # not evaluated, or results of other weights, which say nothing of these
        results = []
    return HubCard(
        name=run.config.name,
        licence=licence,
        data=data,
        method=f"objective {objective}, recipe {recipe}",
        scores=tuple(_score(result) for result in results if _is_headline(result)),
        finds_copies=trained_for_copies(run.config.data),
    )


def _attacks(result: EvalResult) -> str:
    """The attacks of a worst case: their names, or the tier and their number."""
    names = result.setting.attacks
    return f"{result.setting.tier} tier, {len(names)} attacks" if result.setting.tier else ", ".join(names)


def _is_headline(result: EvalResult) -> bool:
    """Clean results and worst cases, of an evaluation or of a suite."""
    return result.attack in ("clean", "worst") or bool(result.setting.tier)


def _score(result: EvalResult) -> HubScore:
    measure = headline_of(result)
    low, high = result.interval[measure]
    threat = "" if result.attack == "clean" else f"{result.setting.threat}: {_attacks(result)}"
    chance = result.reference.get("chance")
    return HubScore(result.name, measure, result[measure], low, high, threat, chance)
