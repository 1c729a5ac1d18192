"""The hasher: one encoder and one hash head per modality. Image-only is the case with one key."""

from __future__ import annotations

import contextlib
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robusthash.core.embeddings import Distance
from robusthash.core.hamming import finite, sign
from robusthash.core.registry import build, catalogue, check
from robusthash.core.runtime import seed_everything
from robusthash.core.types import HashOutput, Inputs, Outputs
from robusthash.models.purifier import ProxyBackward

if TYPE_CHECKING:
    from robusthash.models.hub_folder import HubCard

Defense = Literal["plain", "adversarial", "gate", "mask", "purifier", "randomised", "detector"]
"""Defense classes of this package; the file of another defense registers its own as kind ``adaptive``."""

Sides = Literal["query", "both"]
View = Literal["white-box", "oblivious", "identity"]
Component = str | Mapping[str, Any]
"""A registered name, or a mapping with ``name`` and options."""


class Encoder(nn.Module, ABC):
    """Base of encoders: ``forward`` maps (B, ...) inputs to (features (B, D), aux), with D = ``width``."""

    width: int
    declares: str = "plain"
    """Defense class of a hasher with this encoder, where the encoder is itself a defense."""

    @property
    def embedding(self) -> nn.Module | None:
        """Module that looks tokens up, (B, L) ids -> (B, L, D), of an encoder of token ids."""
        return None

    @property
    def aux_widths(self) -> Mapping[str, int]:
        """Widths of the features in ``aux`` that outer losses build nets for."""
        return {}

    @property
    def resolved_options(self) -> Mapping[str, Any]:
        """Options read from files of weights, by which a saved model is built again without the files."""
        return {}


class Hasher(nn.Module):
    """Encoders and heads by modality and, where a defense has one, a purifier before the encoder.

    Args:
        encoders: modality -> ``Encoder`` or a module with its call.
        heads: modality -> module; ``features`` -> ``(logits (B, K), code (B, K), scale)``.
        spec: the settings it was built from, saved with the weights so that it can be built again.
        declared: its defense class; selects the adaptive attacks and is saved with the weights.
        purifiers: modality -> ``Purifier``, for any of the modalities.
        sides: purify queries only, or the database too.

    ``side`` is the side in pixels of the images that it was trained on, once that is known.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        spec: Mapping[str, Any] | None = None,
        declared: str = "plain",
        purifiers: Mapping[str, nn.Module] | None = None,
        sides: Sides = "both",
    ) -> None:
        super().__init__()
        if set(encoders) != set(heads):
            raise ValueError(f"encoders for {sorted(encoders)} but heads for {sorted(heads)}")
        bits = {int(head.bits) for head in heads.values()}  # type: ignore[arg-type]
        if len(bits) != 1:
            raise ValueError(f"heads of different bits: {sorted(bits)}")
        if unknown := sorted(set(purifiers or {}) - set(encoders)):
            raise ValueError(f"a purifier for {unknown[0]!r}, which this hasher does not encode")
        self.encoders = nn.ModuleDict(encoders)
        self.heads = nn.ModuleDict(heads)
        self.purifiers = nn.ModuleDict(purifiers or {})
        self.sides = sides
        self.bits = bits.pop()
        self.spec = dict(spec or {})
        self.declared = declared
        self.side: int | None = None
        # lists, so that their content is not registered a second time
        self._frozen: list[nn.Parameter] = []
        self._eval_only: list[nn.Module] = []

    @property
    def distance(self) -> Distance:
        """The distance of its search: of bits (``hamming``), or of the numbers; the heads say it."""
        distance: Distance = getattr(next(iter(self.heads.values())), "distance", "hamming")
        return distance

    def compared(self, logits: Tensor) -> Tensor:
        """(B, K) what the search compares of logits: their signs, or they themselves.

        Raises:
            ValueError: values that are NaN or infinite.
        """
        return sign(logits) if self.distance == "hamming" else finite(logits)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.encoders)

    @property
    def device(self) -> torch.device:
        """That of the weights; the CPU where there are none, as in a perceptual hash."""
        tensor = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def freeze(self, parameters: Iterable[nn.Parameter], batchnorm: bool = False) -> None:
        """Hold these parameters, and no others, in training, without a gradient.

        Modules that hold no others stay in eval mode, so that BatchNorm keeps its statistics and dropout is
        off. With ``batchnorm`` all BatchNorm layers of the encoders keep their statistics.
        """
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for module in self._eval_only:
            module.train(self.training)
        named = list(parameters)
        self._frozen = [parameter for parameter in named if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        ids = {id(parameter) for parameter in named}
        self._eval_only = []
        for module in self.modules():
            owned = [id(parameter) for parameter in module.parameters()]
            if owned and module is not self and ids.issuperset(owned):
                self._eval_only.append(module.eval())
        if batchnorm:
            layers = (module for module in self.encoders.modules() if isinstance(module, _BatchNorm))
            self._eval_only += [layer.eval() for layer in layers]

    def train(self, mode: bool = True) -> Hasher:
        """Set the mode of every module, but what is frozen stays in eval mode."""
        super().train(mode)
        for module in self._eval_only:
            module.eval()
        return self

    def with_parts(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        purifiers: Mapping[str, nn.Module] | None = None,
    ) -> Hasher:
        """The same hasher with some encoders or purifiers exchanged; all else is shared."""
        encoders = {**self.encoders, **(encoders or {})}
        purifiers = {**self.purifiers, **(purifiers or {})}
        return Hasher(encoders, dict(self.heads), self.spec, self.declared, purifiers, self.sides)

    def bare(self) -> Hasher:
        """The same encoders and heads without purifiers: what an oblivious attack differentiates."""
        if not self.purifiers:
            return self
        return Hasher(dict(self.encoders), dict(self.heads), self.spec, self.declared)

    def as_seen_from(self, view: View) -> Hasher:
        """The hasher for an attacker: all of it, bare (oblivious), or with purifiers as the identity."""
        if view == "white-box":
            return self
        if not self.purifiers:
            raise ValueError(f"a {view} attack needs a purifier to overlook, and this hasher has none")
        if view == "oblivious":
            return self.bare()
        return self.with_parts(purifiers={name: ProxyBackward(p) for name, p in self.purifiers.items()})

    def for_database(self) -> Hasher:
        """The hasher of database items: itself, or without purifiers where those are for queries only."""
        return self.bare() if self.sides == "query" else self

    def save_pretrained(
        self,
        directory: str | Path,
        size: int | None = None,
        about: HubCard | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``README.md``, as the Hugging Face hub has them.

        Args:
            size: pixels a side of the images that it was trained on; by default ``side``.
            about: facts of the model card: data, licence, measured values.
            overwrite: replace another model, and a model card, in that folder.

        Raises:
            FileExistsError: the folder holds something else, or another model.
            ValueError: a wrapped net, or images of unknown size.
        """
        from robusthash.models.hub_folder import facts_of, save_folder

        save_folder(Path(directory), self, facts_of(self, size), about, overwrite)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, token: str | None = None
    ) -> Hasher:
        """The hasher of a saved folder, or of the hub; on the CPU, in eval mode.

        Args:
            source: a folder, or ``user/name`` of the hub, which alone opens a connection.
            revision: branch, tag or commit of the hub.

        Raises:
            RunError: damaged or truncated files, tensors that do not fit, code that is not of this package;
                one line. No pickle is opened.
        """
        from robusthash.models.hub_folder import load_folder

        return load_folder(source, revision, token)

    def push_to_hub(
        self,
        repository: str,
        size: int | None = None,
        about: HubCard | None = None,
        private: bool = True,
        token: str | None = None,
    ) -> str:
        """Upload what ``save_pretrained`` writes to ``user/name`` of the hub; the address.

        Args:
            private: visible to its owner alone, which is the default here.
            token: of the hub; by default the one that you logged in with.

        Raises:
            RunError: no such id, or what the hub refuses.
        """
        from robusthash.models.hub_folder import facts_of, push

        return push(self, repository, facts_of(self, size), about, private, token)

    def forward(self, inputs: Inputs) -> Outputs:
        """Hash any subset of the modalities; ``aux`` has the input behind a purifier as ``pure``.

        Encoders and purifiers get copies: what one of them writes into its input would change the caller's.
        """
        outputs = {}
        for modality, values in inputs.items():
            if modality not in self.encoders:
                raise ValueError(f"this hasher knows {list(self.modalities)}, not {modality!r}")
            if modality in self.purifiers:
                pure, aux = self.purifiers[modality](values.clone(), partial(self._hash, modality))
                output = self._hash(modality, pure)
                outputs[modality] = replace(output, aux={**output.aux, **aux, "pure": pure})
            else:
                outputs[modality] = self._hash(modality, values)
        return outputs

    def _hash(self, modality: str, values: Tensor) -> HashOutput:
        features, aux = self.encoders[modality](values.clone())
        logits, code, scale = self.heads[modality](features)
        # under autocast these are bf16; codes are decided, and compared with references, in torch's default
        # dtype: float32, unless somebody wants the digits that finite differences need
        logits, code = (values.to(torch.get_default_dtype()) for values in (logits, code))
        return HashOutput(logits, code, features, aux, scale)


@contextlib.contextmanager
def frozen(victim: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; mode and flags of all parts are restored.

    Raises:
        ValueError: weights that were made inside ``torch.inference_mode``, and are used outside of it.
    """
    if not torch.is_inference_mode_enabled() and any(p.is_inference() for p in victim.parameters()):
        raise ValueError(
            "the net was made inside torch.inference_mode(): no gradient goes through; make it outside"
        )
    modes = [(module, module.training) for module in victim.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in victim.parameters()]
    victim.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def build_hasher(
    *,
    bits: int,
    image: Component | None = "small",
    text: Component | None = None,
    head: Component = "tanh",
    seed: int = 0,
    declared: str = "plain",
    vocabulary: int | None = None,
    purifiers: Mapping[str, Component] | None = None,
    sides: Sides = "both",
) -> Hasher:
    """A hasher from registered encoders and heads, with weights drawn from ``seed``.

    Args:
        bits: code length K, at least 1.
        image, text, head: names or settings of ``image-encoder``, ``text-encoder`` (or None) and ``head``,
            such as ``{"name": "alexnet", "weights": "alexnet.pth"}``.
        vocabulary: width V of the bags of words, which a text encoder needs to know.
        purifiers: modality -> a ``purifier`` name or settings.
        sides: the sides that they purify.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
        raise ValueError(f"bits must be a positive whole number, got {bits!r}")
    if image is None and text is None:
        raise ValueError("a hasher needs an image or a text encoder")
    seed_everything(seed)
    encoders: dict[str, Encoder] = {}
    if image is not None:
        encoders["image"] = build("image-encoder", image)
    if text is not None:
        if vocabulary is None:
            raise ValueError("a text encoder needs data with texts (is texts: true set?)")
        encoders["text"] = build("text-encoder", text, vocabulary=vocabulary)
        if options := encoders["text"].resolved_options:
            text = {**({"name": text} if isinstance(text, str) else text), **options}
    heads = _build_heads(encoders, head, bits)
    for encoder in encoders.values():
        if declared == "plain":
            declared = encoder.declares
    spec = {"bits": bits, "image": image, "text": text, "head": head}
    spec |= {"declared": declared, "vocabulary": vocabulary}
    # channels-last was measured 1.3 times faster in float32 on a CPU, and is what tensor cores want
    hasher = Hasher(encoders, heads, spec, declared).to(memory_format=torch.channels_last)
    return purified(hasher, purifiers, sides, seed) if purifiers else hasher


def _build_heads(encoders: Mapping[str, nn.Module], head: Component, bits: int) -> dict[str, nn.Module]:
    return {name: build("head", head, width=encoder.width, bits=bits) for name, encoder in encoders.items()}


def with_new_heads(hasher: Hasher, bits: int, head: Component, seed: int = 0) -> Hasher:
    """The encoders of a hasher, shared, under heads that are drawn from ``seed``; purifiers are kept."""
    seed_everything(seed)
    spec, heads = {**hasher.spec, "bits": bits, "head": head}, _build_heads(dict(hasher.encoders), head, bits)
    purifiers = dict(hasher.purifiers)
    return Hasher(dict(hasher.encoders), heads, spec, hasher.declared, purifiers, hasher.sides)


def purified(
    hasher: Hasher, purifiers: Mapping[str, Component], sides: Sides = "both", seed: int = 0
) -> Hasher:
    """The same hasher, its modules shared, with new purifiers (by modality) before its encoders."""
    seed_everything(seed)
    context = {"vocabulary": hasher.spec.get("vocabulary"), "bits": hasher.bits}
    parts = {}
    for modality, settings in purifiers.items():
        _require_purifier_of(modality, settings)
        parts[modality] = build("purifier", settings, **context)
    declared = hasher.declared
    if declared in ("plain", "adversarial"):
        declared = next(iter(parts.values())).declares
    spec = {**hasher.spec, "purifiers": dict(purifiers), "sides": sides, "declared": declared}
    result = Hasher(dict(hasher.encoders), dict(hasher.heads), spec, declared, parts, sides)
    return result.to(hasher.device).to(memory_format=torch.channels_last)


def _require_purifier_of(modality: str, settings: Component) -> None:
    """Refuse a purifier that is registered for the other modality; of no modality it fits both."""
    entry, _ = check("purifier", settings)
    if entry.modality not in ("image", "text") or entry.modality == modality:
        return
    fits = (card for card in catalogue("purifier") if card.modality == modality and card.paper)
    other = next((card.name for card in fits if card.paper == entry.paper), None)
    remedy = f"for {modality}s take {other}" if other else f"leave it out for {modality}s"
    raise ValueError(f"{entry.name} is for {entry.modality}s; {remedy}")
