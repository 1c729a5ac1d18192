"""Models from elsewhere as victims: functions from images to codes or numbers, checked before use.

An external model gets (B, 3, H, W) float images in [0, 1] and answers with (B, K): real numbers whose sign is
the bit, numbers in [0, 1] that are cut at 0.5, bits as bool, 0/1, -1/+1 or packed bytes, or an embedding that
is searched by the distance of its numbers. The form is found once, on real images, and held to afterwards.
Normalisation belongs inside the model. It gets copies: what it writes into its input stays with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusthash.core.embeddings import Distance, distances
from robusthash.core.hamming import sign
from robusthash.models.encoding import as_searched, encode_signs
from robusthash.models.external.model_answers import (
    AS_IT_IS,
    AnswerReading,
    Broken,
    Call,
    Form,
    answered,
    as_logits,
    checked_form,
    other_width,
    reading_text,
)
from robusthash.models.hasher import Encoder, Hasher
from robusthash.models.image_encoders import IMAGENET

_ROUNDING = 0.01  # share of bits that may depend on the rest of the batch, as float rounding makes them


@dataclass(frozen=True)
class ExternalModel:
    """An external model as a victim, with what was observed of it."""

    hasher: Hasher
    form: Form
    gradients: bool  # an attacker can differentiate it
    remarks: tuple[str, ...]  # sentences for the reader


class ExternalEncoder(Encoder):
    """The image encoder of an external victim: its features are its logits.

    Args:
        call: the model.
        form: of its answers.
        bits: K; every answer must have it.
        name: for messages.
        output: which of several outputs.
    """

    def __init__(self, call: Call, form: Form, bits: int, name: str, output: str | None = None) -> None:
        super().__init__()
        self.call = call  # a module becomes a child, so that device, eval mode and frozen weights reach it
        self.form, self.bits, self.name, self.output = form, bits, name, output

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, H, W) -> (B, K) logits, and nothing else."""
        logits = as_logits(answered(self.call, images, self.name, self.output), self.form, self.name)
        if logits.shape[1] != self.bits:
            what = "numbers" if self.form == "embedding" else "bits"
            change = f"{logits.shape[1]} {what}, and {self.bits} before"
            raise Broken(f"{self.name} answered {change}: its width must not vary")
        return logits.to(images.device), {}


class AsIs(nn.Module):
    """The head of an external victim: the model has made its bits, or its embedding, already.

    Args:
        bits: K, the width of the answers.
        distance: by which its users search.
        scale: mean size of its logits, where it is known and attacks divide by it.
    """

    def __init__(self, bits: int, distance: Distance = "hamming", scale: float = 1.0) -> None:
        super().__init__()
        self.bits, self.distance, self.scale = bits, distance, scale

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        return features, torch.tanh(features), self.scale


def foreign(
    call: Call, images: Tensor, name: str, bits: int | None = None, reading: AnswerReading = AS_IT_IS
) -> ExternalModel:
    """Observe a model on a few real images, and make it a victim.

    Args:
        call: the model.
        images: (n, 3, H, W) float in [0, 1], n at least 2; eight are plenty.
        bits: K, where it is known; that of the answers by default.
        reading: of its answers; found out by default.

    Raises:
        Broken: it fails, also on one image alone; answers NaN, another width or shape; gives other codes to
            the same images, or to an image among others; does not answer what ``reading`` says.
    """
    if len(images) < 2:
        raise ValueError(f"a model is looked at on at least 2 images, got {len(images)}")
    if isinstance(call, nn.Module):
        call.eval()
    if isinstance(call, torch.jit.ScriptModule):
        for parameter in call.parameters():
            parameter.requires_grad_(False)
        call = call.forward  # no child: scripted modules refuse what is done to ordinary ones

    def answers(images: Tensor) -> Tensor:
        return answered(call, images, name, reading.name)

    with torch.no_grad():
        first = answers(images)
        form = checked_form(first, name, reading.declared)
        logits = as_logits(first, form, name)
        width = logits.shape[1]
        if bits is not None and bits != width:
            raise Broken(other_width(name, form, width, bits))
        again, alone = as_logits(answers(images), form, name), as_logits(answers(images[:1]), form, name)
    distance: Distance = reading.distance if form == "embedding" else "hamming"
    check = _check_same_vectors if form == "embedding" else _check_same
    check(name, logits, again, 0.0, "asked twice about the same images")
    how = "asked about an image alone and among others (is it in training mode?)"
    check(name, logits[:1], alone, _ROUNDING, how)
    encoder = ExternalEncoder(call, form, width, name, reading.name)
    hasher = Hasher({"image": encoder}, {"image": AsIs(width, distance)}, {"foreign": name})
    gradients = _has_gradients(hasher, images[:2])
    on_gradients = (
        "It can be differentiated, so attacks that know its weights were run."
        if gradients
        else "It gives no gradients, so attacks that follow the weights are impossible and only others were "
        "run. That is a limit of this audit, not a protection."
    )
    return ExternalModel(hasher, form, gradients, (reading_text(first, form, width, reading), on_gradients))


def _check_same_vectors(name: str, first: Tensor, second: Tensor, allowed: float, how: str) -> None:
    """Refuse vectors that differ by more than a share ``allowed`` of their length, or than rounding."""
    if first.shape != second.shape:
        raise Broken(f"{name} answered {first.shape[1]} and then {second.shape[1]} numbers when {how}")
    moved = float((first - second).norm(dim=1).max())
    length = float(first.norm(dim=1).max())
    if moved > (allowed or 1e-5) * max(length, 1e-12):
        raise Broken(
            f"{name} changes its answers: by {moved / max(length, 1e-12):.1%} of their length when {how}; a "
            "search cannot work on that. Call .eval() in your factory, and fix the seed of anything random"
        )


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
    plain = _share_retrieved(hasher, images, changed)
    undone = _share_retrieved(hasher, images * deviation + mean, changed * deviation + mean)
    done = _share_retrieved(hasher, (images - mean) / deviation, (changed - mean) / deviation)
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


def _share_retrieved(hasher: Hasher, images: Tensor, changed: Tensor) -> float:
    """Share of images whose changed copy has its own original as the one nearest."""
    apart = distances(
        *(as_searched(encode_signs(hasher, "image", part), hasher) for part in (changed, images))
    )
    own, itself = apart.diagonal(), torch.eye(len(apart), dtype=torch.bool)
    return float((own < apart.double().masked_fill(itself, torch.inf).amin(1)).float().mean())
