"""The hasher: one encoder and one hash head per modality. Image-only is the case with one key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from robusthash.core.registry import build
from robusthash.core.runtime import seed_everything
from robusthash.core.types import HashOutput, Inputs, Outputs

Defense = Literal["plain", "adversarial", "gate", "mask", "purifier", "randomised", "detector"]


class Hasher(nn.Module):
    """Encoders and heads by modality.

    Args:
        encoders: modality -> module; ``(B, ...)`` inputs -> ``(features (B, D), aux)``.
        heads: modality -> module; ``features`` -> ``(logits (B, K), code (B, K), scale)``.
        spec: the settings it was built from, saved beside the weights so that it can be built again.
        declared: its defense class; selects the adaptive attacks and is saved with the weights.

    Raises:
        ValueError: modalities of encoders and heads differ, or heads of different bits.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        spec: Mapping[str, Any] | None = None,
        declared: Defense = "plain",
    ) -> None:
        super().__init__()
        if set(encoders) != set(heads):
            raise ValueError(f"encoders for {sorted(encoders)} but heads for {sorted(heads)}")
        bits = {int(head.bits) for head in heads.values()}  # type: ignore[arg-type]
        if len(bits) != 1:
            raise ValueError(f"heads of different bits: {sorted(bits)}")
        self.encoders = nn.ModuleDict(encoders)
        self.heads = nn.ModuleDict(heads)
        self.bits = bits.pop()
        self.spec = dict(spec or {})
        self.declared = declared

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.encoders)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def for_database(self) -> Hasher:
        """The victim that encodes the database: itself."""
        return self

    def forward(self, inputs: Inputs) -> Outputs:
        """Hash any subset of the modalities."""
        outputs = {}
        for modality, values in inputs.items():
            if modality not in self.encoders:
                raise ValueError(f"this hasher knows {list(self.modalities)}, not {modality!r}")
            features, aux = self.encoders[modality](values)
            logits, code, scale = self.heads[modality](features)
            # under autocast these are bf16; codes are decided, and compared with references, in float32
            outputs[modality] = HashOutput(logits.float(), code.float(), features, aux, scale)
        return outputs


@contextlib.contextmanager
def frozen(victim: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; mode and flags of every module and parameter are restored."""
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
    image: str | Mapping[str, Any] | None = "small",
    text: str | Mapping[str, Any] | None = None,
    head: str | Mapping[str, Any] = "tanh",
    seed: int = 0,
    declared: Defense = "plain",
) -> Hasher:
    """A hasher from registered encoders and heads, with weights drawn from ``seed``.

    Args:
        bits: code length K, at least 1.
        image: an ``image-encoder`` name or settings, or None.
        text: a ``text-encoder`` name or settings, or None.
        head: a ``head`` name or settings.

    Example:
        ``build_hasher(bits=32, image={"name": "alexnet", "weights": "alexnet.pth"})``
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
        raise ValueError(f"bits must be a positive whole number, got {bits!r}")
    if image is None and text is None:
        raise ValueError("a hasher needs an image or a text encoder")
    seed_everything(seed)
    encoders: dict[str, nn.Module] = {}
    if image is not None:
        encoders["image"] = build("image-encoder", image)
    if text is not None:
        encoders["text"] = build("text-encoder", text)
    heads = {name: build("head", head, width=encoder.width, bits=bits) for name, encoder in encoders.items()}
    spec = {"bits": bits, "image": image, "text": text, "head": head, "declared": declared}
    # channels-last was measured 1.3 times faster in float32 on a CPU, and is what tensor cores want
    return Hasher(encoders, heads, spec, declared).to(memory_format=torch.channels_last)
