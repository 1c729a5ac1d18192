"""Models from elsewhere as victims: functions from images to codes or numbers, checked before use.

An external model gets (B, 3, H, W) float images in [0, 1] and answers with (B, K): real numbers whose sign is
the bit, numbers in [0, 1] that are cut at 0.5, or bits as bool, 0/1, -1/+1 or packed bytes. The form is found
once, on real images, and held to afterwards. Normalisation belongs inside the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robusthash.core.hamming import distance, pack, sign, unpack
from robusthash.models.hasher import Encoder, Hasher
from robusthash.models.image_encoders import IMAGENET

Call = Callable[[Tensor], Any]
"""(B, 3, H, W) float in [0, 1] -> (B, K), a tensor or an array."""

Form = Literal["numbers", "probabilities", "zero-one", "plus-minus", "bytes"]

SAID: dict[Form, str] = {
    "numbers": "real numbers; a bit is 1 where the number is at least 0",
    "probabilities": "numbers between 0 and 1; a bit is 1 where the number is at least 0.5",
    "zero-one": "bits as 0 and 1",
    "plus-minus": "bits as -1 and +1",
    "bytes": "packed bytes of eight bits each",
}

_ROUNDING = 0.01  # share of bits that may depend on the rest of the batch, as float rounding makes them


class Broken(ValueError):
    """An external model that cannot be audited; the message has the reason and the remedy."""


@dataclass(frozen=True)
class ExternalModel:
    """An external model as a victim, with what was observed of it."""

    hasher: Hasher
    form: Form
    gradients: bool  # an attacker can differentiate it
    said: tuple[str, ...]  # sentences for the reader


class ExternalEncoder(Encoder):
    """The image encoder of an external victim: its features are its logits.

    Args:
        call: the model.
        form: of its answers.
        bits: K; every answer must have it.
        name: for messages.
    """

    def __init__(self, call: Call, form: Form, bits: int, name: str) -> None:
        super().__init__()
        self.call = call  # a module becomes a child, so that device, eval mode and frozen weights reach it
        self.form, self.bits, self.name = form, bits, name

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, H, W) -> (B, K) logits, and nothing else."""
        logits = as_logits(answered(self.call, images, self.name), self.form, self.name)
        if logits.shape[1] != self.bits:
            change = f"{logits.shape[1]} bits, and {self.bits} before"
            raise Broken(f"{self.name} answered {change}: its width must not vary")
        return logits.to(images.device), {}


class AsIs(nn.Module):
    """The head of an external victim: the model has made its bits already."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        return features, torch.tanh(features), 1.0


def answered(call: Call, images: Tensor, name: str) -> Tensor:
    """The answer of a model as a (B, K) tensor.

    Raises:
        Broken: it failed, or answered something that is not one row of numbers for each image.
    """
    try:
        answer = call(images)
    except (Broken, OSError):
        raise
    except Exception as error:  # whatever external code raises is reported as one sentence
        shape, reason = " x ".join(map(str, images.shape)), f"{type(error).__name__}: {error}"
        if len(images) == 1:
            reason += "; it must take a batch of one as well (a BatchNorm in training mode cannot)"
        raise Broken(
            f"{name} fails on {shape} float images in [0, 1]: {reason}; "
            "--size changes the size, normalisation and resizing belong inside the model"
        ) from error
    if not isinstance(answer, Tensor | np.ndarray):
        raise Broken(f"{name} answered a {type(answer).__name__}; it must return one (B, K) tensor or array")
    rows = torch.as_tensor(answer)
    if rows.ndim != 2 or len(rows) != len(images) or rows.shape[1] == 0:
        hint = "; is it squeezed?" if len(images) == 1 and rows.ndim == 1 else ""
        raise Broken(
            f"{name} answered shape {tuple(rows.shape)} to {len(images)} images; it must be (B, K) with one "
            f"row for each image, also for a batch of one{hint}"
        )
    if rows.is_floating_point() and not torch.isfinite(rows).all():
        bad = f"{int((~torch.isfinite(rows)).sum())} of {rows.numel()} values"
        raise Broken(
            f"{name} answered {bad} that are NaN or infinite, which are no bits; look for a division by "
            "zero, a logarithm or half precision inside it"
        )
    return rows


def form_of(answer: Tensor, name: str) -> Form:
    """The form of an answer.

    Raises:
        Broken: whole numbers that are neither bits nor bytes, or numbers that are never negative.
    """
    if answer.dtype == torch.bool:
        return "zero-one"
    least, largest = float(answer.min()), float(answer.max())
    values = set(torch.unique(answer).tolist()) if answer.numel() < 1 << 22 else set()
    if values and values <= {0, 1}:
        return "zero-one"
    if values and values <= {-1, 1}:
        return "plus-minus"
    bounds = f"from {least:g} to {largest:g}"
    if not answer.is_floating_point():
        if answer.dtype == torch.uint8:
            return "bytes"
        raise Broken(f"{name} answered whole numbers {bounds}; codes are bool, 0/1, -1/+1 or uint8 bytes")
    if least >= 0 and largest <= 1:
        return "probabilities"
    if least >= 0:
        raise Broken(
            f"{name} answered numbers {bounds}, never below 0, so that every bit would be 1: these are "
            "features, not codes; subtract a threshold (their median, say) inside the model"
        )
    return "numbers"


def as_logits(answer: Tensor, form: Form, name: str) -> Tensor:
    """(B, K) in torch's default dtype, whose signs are the bits. Gradients pass where the answer has them.

    Raises:
        Broken: the answer is not of this form.
    """
    if form == "numbers":
        return answer.to(torch.get_default_dtype())
    if form == "probabilities":
        return answer.to(torch.get_default_dtype()) - 0.5
    if form == "bytes":
        if answer.dtype != torch.uint8:
            raise Broken(f"{name} answered {answer.dtype}, and packed bytes before")
        return unpack(answer, 8 * answer.shape[1]).float()
    numbers = answer.float()
    allowed = (numbers == 1) | (numbers == (0 if form == "zero-one" else -1))
    if not allowed.all():
        raise Broken(f"{name} answered {SAID[form]} before, and now {float(numbers[~allowed][0]):g}")
    return numbers * 2 - 1 if form == "zero-one" else numbers


def foreign(call: Call, images: Tensor, name: str, bits: int | None = None) -> ExternalModel:
    """Observe a model on a few real images, and make it a victim.

    Args:
        call: the model.
        images: (n, 3, H, W) float in [0, 1], n at least 2; eight are plenty.
        bits: K, where it is known; that of the answers by default.

    Raises:
        Broken: it fails, also on one image alone; answers NaN, another width or shape; gives other codes to
            the same images, or to an image among others.
    """
    if len(images) < 2:
        raise ValueError(f"a model is looked at on at least 2 images, got {len(images)}")
    if isinstance(call, nn.Module):
        call.eval()
    if isinstance(call, torch.jit.ScriptModule):
        for parameter in call.parameters():
            parameter.requires_grad_(False)
        call = call.forward  # no child: scripted modules refuse what is done to ordinary ones
    with torch.no_grad():
        first = answered(call, images, name)
        form = form_of(first, name)
        logits = as_logits(first, form, name)
        width = logits.shape[1]
        if bits is not None and bits != width:
            raise Broken(f"{name} answers {width} bits, and --bits says {bits}; leave it at auto")
        again = as_logits(answered(call, images, name), form, name)
        alone = as_logits(answered(call, images[:1], name), form, name)
    _check_same(name, logits, again, 0.0, "asked twice about the same images")
    how = "asked about an image alone and among others (is it in training mode?)"
    _check_same(name, logits[:1], alone, _ROUNDING, how)
    encoder = ExternalEncoder(call, form, width, name)
    hasher = Hasher({"image": encoder}, {"image": AsIs(width)}, {"foreign": name})
    gradients = _has_gradients(hasher, images[:2])
    kind = "numbers" if form in ("numbers", "probabilities") else "bits"
    on_gradients = (
        "It can be differentiated, so attacks that know its weights were run."
        if gradients
        else "It gives no gradients, so attacks that follow the weights are impossible and only others were "
        "run. That is a limit of this audit, not a protection."
    )
    return ExternalModel(hasher, form, gradients, (f"It answers {width} {kind}: {SAID[form]}.", on_gradients))


def _check_same(name: str, first: Tensor, second: Tensor, allowed: float, how: str) -> None:
    if first.shape != second.shape:
        raise Broken(f"{name} answered {first.shape[1]} and then {second.shape[1]} bits when {how}")
    changed = float((sign(first) != sign(second)).float().mean())
    if changed > allowed:
        raise Broken(
            f"{name} changes its codes: {changed:.1%} of the bits differ when {how}; a search cannot work on "
            "that. Call .eval() in your factory, and fix the seed of anything random"
        )


def _has_gradients(hasher: Hasher, images: Tensor) -> bool:
    """The logits move with the pixels, by a backward pass on real images."""
    leaf = images.clone().requires_grad_(True)
    with torch.enable_grad():
        logits = hasher({"image": leaf})["image"].logits
        if not logits.requires_grad:
            return False
        (grad,) = torch.autograd.grad(torch.tanh(logits).sum(), leaf, allow_unused=True)
    return grad is not None and bool(torch.isfinite(grad).all()) and bool((grad != 0).any())


# shares of photographs found: close to chance, and well; scale alone moves it by less
_CHANCE, _WELL = 0.3, 0.7


def normalisation_warning(hasher: Hasher, images: Tensor, changed: Tensor) -> str:
    """A sentence where the model seems to be normalised twice, or not at all; "" where it does not.

    A model that finds hardly any changed copy, and most of them once a normalisation is undone beforehand,
    has one too many; one that finds most of them once a normalisation is done has none.

    Args:
        images: (n, 3, H, W) in [0, 1], n at least 8, of different photographs.
        changed: the same under a harmless change.
    """
    if len(images) < 8:
        return ""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1).to(images) for values in IMAGENET)
    plain = _share_found(hasher, images, changed)
    undone = _share_found(hasher, images * deviation + mean, changed * deviation + mean)
    done = _share_found(hasher, (images - mean) / deviation, (changed - mean) / deviation)
    if plain > _CHANCE:
        return ""
    finds = f"it finds {plain:.0%} of slightly changed copies, and"
    if undone >= max(_WELL, done):
        return (
            f"The model seems to be normalised twice: {finds} {undone:.0%} once one normalisation is undone. "
            "Pixels in [0, 1] go in; normalise once, inside the model."
        )
    if done >= _WELL:
        return (
            f"The model seems to expect normalised images: {finds} {done:.0%} when they are normalised "
            "first. Pixels in [0, 1] go in; normalise inside the model."
        )
    return ""


def _share_found(hasher: Hasher, images: Tensor, changed: Tensor) -> float:
    """Share of images whose changed copy has its own original as the one nearest."""
    hasher.eval()
    with torch.no_grad():
        codes = [pack(sign(hasher({"image": part})["image"].logits)) for part in (changed, images)]
    distances = distance(*codes)
    own = distances.diagonal()
    others = distances.masked_fill(torch.eye(len(own), dtype=torch.bool), torch.iinfo(distances.dtype).max)
    return float((own < others.amin(1)).float().mean())
