"""Opening what an audit is about: a run, a model file, a function, an endpoint or a perceptual hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from robusthash.apps.experiment import model_stages
from robusthash.apps.experiment.run_directory import load_run
from robusthash.core.registry import nearest
from robusthash.core.runtime import choose_device
from robusthash.data.copies import trained_for_copies
from robusthash.models.external.http_endpoint import Endpoint
from robusthash.models.external.loaders import NAMES, load_python, load_torchscript, perceptual
from robusthash.models.external.model_answers import AS_IT_IS, AnswerReading, Call
from robusthash.models.external.onnx_file import load_onnx
from robusthash.models.external.wrapper import AsIs, foreign
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.portable.model_files import FileFacts, facts_in
from robusthash.models.saved_hasher import load_exported, names_in
from robusthash.robustness.checks.model_checks import Purpose

_BEHIND_HTTP = "an endpoint shows its answers alone"
_FILES = (".onnx", ".pt", ".pth", ".ts", ".torchscript")
_SIZE = 224  # pixels a side, where neither the user nor a run says


@dataclass(frozen=True)
class Tier:
    """Effort of an audit.

    Args:
        queries: photographs that are searched for, under each everyday change.
        attacked: of these, how many are attacked.
        steps: of each attack that follows gradients.
        questions: oracle queries that a black-box attack may make for one photograph.
        checked: photographs on which the checks look at the model.
    """

    name: str
    queries: int
    attacked: int
    steps: int
    questions: int = 300
    checked: int = 16

    def __post_init__(self) -> None:
        if min(self.queries, self.attacked, self.questions, self.checked) < 1 or self.steps < 2:
            raise ValueError(
                f"an audit needs queries, attacked ones, questions and 2 steps at least, got {self}"
            )


TIERS = {"smoke": Tier("smoke", 20, 4, 5, 30, 4), "fast": Tier("fast", 200, 12, 20)}


def tier_named(name: str, queries: int | None = None, attacked: int | None = None) -> Tier:
    """One of ``TIERS``, with other numbers of photographs; another name is a ValueError."""
    if name not in TIERS:
        raise ValueError(f"the tier of an audit must be one of {', '.join(TIERS)}, got {name!r}")
    tier = TIERS[name]
    return replace(tier, queries=queries or tier.queries, attacked=attacked or tier.attacked)


@dataclass(frozen=True)
class EndpointLimits:
    """Limits on queries to an endpoint; see ``Endpoint``."""

    budget: int = 5000
    rate: float = 5.0
    timeout: float = 10.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class AuditOptions:
    """Options of an audit.

    Args:
        labels: the subfolders of the photographs are categories; each row then has columns on how well the
            other photographs of a category are found. Attacks are aimed as before, at the photograph itself.
        size: pixels a side of the target's inputs; see ``size_of``.
        bits: K where known; found out by default.
        eps: budget of noise and attacks in (0, 0.5], L-infinity in pixels of [0, 1].
        radius: bits (of vectors the distance) that may differ between two pictures that count as the same; by
            default the custom of a perceptual hash, else the largest at which at most 1 % of the pairs of
            different photographs do.
        limit: photographs read at most.
        seed: of the choice of photographs, the noise and the attacks.
        reading: of the answers of a model that is no run: bits or an embedding, and which of several outputs.
        replacement: measure the packaged ``copy-hash`` too, on the same photographs under the same attacks;
            by default where the target finds copies: a perceptual hash, or a run that was trained for them.
        max_pixels: of a photograph that is read (width x height); as of ``read_image`` by default.
    """

    labels: bool = False
    size: int | None = None
    bits: int | None = None
    tier: Tier = TIERS["fast"]
    eps: float = 8 / 255
    radius: float | None = None
    limit: int = 1000
    seed: int = 0
    limits: EndpointLimits = EndpointLimits()
    max_pixels: int | None = None
    reading: AnswerReading = AS_IT_IS
    replacement: bool | None = None

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 0.5:
            raise ValueError(
                f"eps must lie above 0 and be at most 0.5 of the range, got {self.eps:g}; write 8/255, not 8"
            )


@dataclass(frozen=True)
class Target:
    """An opened search: a hasher, or an endpoint that answers ids alone."""

    name: str  # as the user wrote it
    title: str  # for readers
    hasher: Hasher | None
    gradients: bool
    endpoint: Endpoint | None = None
    radius: int | None = None  # bits that may differ, where its users have a custom
    remarks: tuple[str, ...] = ()
    foreign: bool = True
    by_torch: bool = False  # torch computes it, so that there should be gradients, whether or not there are
    purpose: Purpose = "unknown"  # whether its codes were made to find copies
    black_box: str = ""  # why there are no gradients, where there are none


def size_of(target: str | nn.Module, size: int | None) -> int:
    """Pixels a side of the target's inputs: of a run, or of a file made of one, else ``size``, else 224.

    Raises:
        ValueError: a size that a run was not trained on, or a run on vectors of features.
    """
    if isinstance(target, nn.Module):
        return _SIZE if size is None else size
    if _is_run(target):
        trained = _image_size(target)
        if len(trained) != 2:
            raise ValueError(
                f"{target} hashes vectors of features, not pixels; only the encoder before it sees photos"
            )
    elif Path(target).suffix in _FILES and (facts := facts_in(Path(target))) and facts.size:
        trained = [facts.size]
    else:
        return _SIZE if size is None else size
    if size is not None and size != trained[0]:
        raise ValueError(
            f"{target} was trained on images of {trained[0]} pixels, and --size says {size}; leave it out"
        )
    return trained[0]


def _image_size(target: str) -> list[int]:
    card = load_exported(Path(target))[1] if _is_saved(target) else load_run(Path(target)).card()
    if "image" not in card["modalities"]:
        raise ValueError(f"{target} hashes {', '.join(card['modalities'])}, and an audit needs images")
    return list(card["image_size"])


def open_target(
    target: str | nn.Module,
    images: Tensor,
    bits: int | None = None,
    limits: EndpointLimits = EndpointLimits(),
    reading: AnswerReading = AS_IT_IS,
    kept: Path | None = None,
) -> Target:
    """Open what the user named and try it on a few of the photographs.

    Args:
        target: a run directory; ``module:name``; a ``.pt`` (TorchScript) or ``.onnx`` file; an ``http(s)``
            address; ``phash``, ``ahash``, ``dhash``, ``whash``, ``pdq``; or a net in memory, ours or another.
        images: (n, 3, H, W) float in [0, 1], n at least 2.
        bits: K where the user knows it.
        reading: of the answers of a model that is no run; runs, hashes and endpoints have one of their own.
        kept: a file of an endpoint's answers, so that an interrupted audit goes on.

    Raises:
        ValueError: none of these, or a model that is broken (``Broken``).
        FileNotFoundError, ImportError: a file or a module is missing.
    """
    if isinstance(target, nn.Module):
        return _open_net(target, images, bits, reading)
    path, by_url = Path(target), target.startswith(("http://", "https://"))
    if reading != AS_IT_IS and (by_url or target in NAMES or _is_run(target)):
        raise ValueError(f"{target} answers bits or ids; leave --output, --metric and --output-name out")
    if by_url:
        return _open_endpoint(target, images, bits, limits, kept)
    if target in NAMES:
        known, bit = perceptual(target), AnswerReading("logits")
        return _wrapped(target, known.title, known, images, bits, bit, radius=known.radius, purpose="this")
    if _is_run(target):
        return _open_run(target, bits)
    if path.suffix in _FILES:
        facts = facts_in(path) if reading == AS_IT_IS else None
        return _open_file(target, images, bits, reading, facts)
    if ":" in target:
        return _wrapped(target, path.name, load_python(target), images, bits, reading)
    raise ValueError(
        f"{target!r} is no run directory, module:name, .pt or .onnx file, http address, nor one of "
        f"{', '.join(NAMES)}{nearest(target, NAMES).partition(' Known')[0]}"
    )


def _is_run(target: str) -> bool:
    """A run, or the folder of a saved model."""
    return target not in NAMES and Path(target).is_dir()


def _is_saved(target: str) -> bool:
    return not (Path(target) / "config.yaml").is_file() and names_in(Path(target)) is not None


def _open_run(target: str, bits: int | None) -> Target:
    saved, kind = _is_saved(target), "a run of this package"
    if saved:
        hasher, card = load_exported(Path(target))
        name, copies, kind = Path(target).name, card.get("finds_copies"), "a saved model of this package"
        hasher = hasher.to(choose_device("auto"))
    else:
        run = load_run(Path(target))
        hasher, name = model_stages.load_hasher(run), run.card()["name"]
        copies = trained_for_copies(run.config.data)
    if "image" not in hasher.modalities:
        raise ValueError(f"{target} hashes {', '.join(hasher.modalities)}, and an audit needs images")
    if bits is not None and bits != hasher.bits:
        raise ValueError(f"{target} has {hasher.bits} bits, and --bits says {bits}; leave --bits out")
    remark = f"It is {kind} ({hasher.declared} defense), so its weights are known to the attacks."
    return Target(
        target, name, hasher, True, remarks=(remark,), foreign=False, by_torch=True, purpose=_purpose(copies)
    )


def _purpose(copies: bool | None) -> Purpose:
    """The purpose of codes, by what a run or its file says of copies."""
    return "unknown" if copies is None else "this" if copies else "other"


def _open_file(
    target: str, images: Tensor, bits: int | None, reading: AnswerReading, facts: FileFacts | None
) -> Target:
    """An ONNX or TorchScript file; one of this package says itself which output it is searched by."""
    path, reason = Path(target), ""
    model: Call
    remarks: tuple[str, ...] = ()
    if facts is not None:
        _check_file(target, facts, bits)
    if path.suffix == ".onnx":
        model, reason = load_onnx(path, images, reading.name or (None if facts is None else "logits"))
        way = f"by onnxruntime as a black box: {reason}" if reason else "by torch, so that attacks follow it"
        remarks, reading = (f"The ONNX file is computed {way}.",), replace(reading, name=None)
    else:
        model = load_torchscript(path)
        reading = reading if facts is None else replace(reading, name="1")
    if facts is None:
        return _wrapped(target, path.name, model, images, bits, reading, remarks, reason=reason)
    reading = replace(reading, output="logits")
    opened = _wrapped(target, facts.name, model, images, facts.bits, reading, remarks, reason=reason)
    if opened.hasher is not None:
        opened.hasher.heads["image"] = AsIs(facts.bits, scale=facts.scale)
    origin = f"It was exported by this package ({facts.declared} defense)."
    return replace(
        opened, remarks=(origin, *opened.remarks), foreign=False, purpose=_purpose(facts.finds_copies)
    )


def _check_file(target: str, facts: FileFacts, bits: int | None) -> None:
    """Refuse a file of this package that an audit cannot use."""
    if facts.modality != "image":
        raise ValueError(f"{target} hashes {facts.modality}, and an audit needs images")
    if facts.size is None:
        raise ValueError(f"{target} hashes vectors of features, not pixels")
    if facts.input.get("type") != "float32":
        raise ValueError(
            f"{target} takes {facts.input.get('type')} pixels, which no attack can follow; export it for the "
            "audit with --pixels float32"
        )
    if bits is not None and bits != facts.bits:
        raise ValueError(f"{target} has {facts.bits} bits, and --bits says {bits}; leave --bits out")


class _Logits(nn.Module):
    """A hasher as a net that answers its logits."""

    def __init__(self, hasher: Hasher) -> None:
        super().__init__()
        self.hasher = hasher

    def forward(self, images: Tensor) -> Tensor:
        return self.hasher({"image": images})["image"].logits


def _open_net(net: nn.Module, images: Tensor, bits: int | None, reading: AnswerReading) -> Target:
    name = str(net.spec.get("foreign", "a hasher")) if isinstance(net, Hasher) else type(net).__name__
    tensor = next(chain(net.parameters(), net.buffers()), images)
    model = _Logits(net) if isinstance(net, Hasher) else net
    if isinstance(net, Hasher):  # it says itself how it is searched
        reading = (
            AnswerReading("logits") if net.distance == "hamming" else AnswerReading("float", net.distance)
        )
    return _wrapped(name, name, model, images.to(tensor.device), bits, reading)


def _wrapped(
    name: str,
    title: str,
    model: Call,
    images: Tensor,
    bits: int | None,
    reading: AnswerReading,
    remarks: tuple[str, ...] = (),
    radius: int | None = None,
    purpose: Purpose = "unknown",
    reason: str = "",
) -> Target:
    wrapped = foreign(model, images, name, bits, reading)
    by_torch = isinstance(model, nn.Module) or _has_graph(wrapped.hasher, images[:1])
    black_box = "" if wrapped.gradients else reason or "its answers cannot be differentiated"
    remarks = (*wrapped.remarks, *remarks)
    return Target(
        name,
        title,
        wrapped.hasher,
        wrapped.gradients,
        radius=radius,
        remarks=remarks,
        by_torch=by_torch,
        purpose=purpose,
        black_box=black_box,
    )


def _has_graph(hasher: Hasher, images: Tensor) -> bool:
    """True where autograd follows the images up to the logits, though the gradients may be 0."""
    with frozen(hasher), torch.enable_grad():
        return hasher({"image": images.clone().requires_grad_(True)})["image"].logits.requires_grad


def _open_endpoint(
    url: str, images: Tensor, bits: int | None, limits: EndpointLimits, kept: Path | None
) -> Target:
    endpoint = Endpoint(url, limits.budget, limits.rate, limits.timeout, headers=limits.headers, cache=kept)
    answer = endpoint.check_consistency(images)
    if answer.code is None:
        order = "with distances, in their order" if answer.distances else "without distances"
        remark = f"It answers {len(answer.ids)} ids, nearest first, {order}."
        return Target(url, url, None, False, endpoint, remarks=(remark,), black_box=_BEHIND_HTTP)
    wrapped = foreign(endpoint, images, url, bits)
    return Target(url, url, wrapped.hasher, False, endpoint, remarks=wrapped.remarks, black_box=_BEHIND_HTTP)
