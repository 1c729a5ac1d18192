"""Answers of external models: one of several outputs, in one of a few forms, as numbers to search by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from robusthash.core.embeddings import METRICS, Metric
from robusthash.core.hamming import unpack

Call = Callable[[Tensor], Any]
"""(B, 3, H, W) float in [0, 1] -> (B, K), a tensor or an array."""

Form = Literal["embedding", "numbers", "probabilities", "zero-one", "plus-minus", "bytes"]
Output = Literal["auto", "logits", "signs", "float"]

FORM_TEXTS: dict[Form, str] = {
    "embedding": "an embedding, compared by the distance of its numbers",
    "numbers": "real numbers; a bit is 1 where the number is at least 0",
    "probabilities": "numbers between 0 and 1; a bit is 1 where the number is at least 0.5",
    "zero-one": "bits as 0 and 1",
    "plus-minus": "bits as -1 and +1",
    "bytes": "packed bytes of eight bits each",
}

_UNIT = 1e-3  # rounding of a length or a sum of 1, in half precision too
_CONSTANT = 0.9  # share of bits that no image changes, from which a cut says nothing


@dataclass(frozen=True)
class AnswerReading:
    """The reading of a model's answers.

    Args:
        output: ``logits``, real numbers whose sign is the bit; ``signs``, bits in any notation; ``float``, an
            embedding that is searched by ``metric``; ``auto`` finds it out and says what it took.
        metric: of an embedding, ``cosine`` (the default) or ``euclidean``; one that is named makes it one.
        name: which of several outputs, a key of a dict or the number of a place in a tuple.

    Raises:
        ValueError: another output or metric, or the metric of bits.
    """

    output: Output = "auto"
    metric: Metric | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.output not in get_args(Output):
            raise ValueError(f"output must be one of {', '.join(get_args(Output))}, got {self.output!r}")
        if self.metric not in (None, *METRICS):
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.metric and self.output in ("logits", "signs"):
            raise ValueError(
                f"bits have no {self.metric} distance; leave the metric out, or say output float"
            )

    @property
    def declared(self) -> Output:
        """The output that the user named; a metric names an embedding."""
        return "float" if self.metric else self.output

    @property
    def distance(self) -> Metric:
        """The distance of an embedding."""
        return self.metric or "cosine"


AS_IT_IS = AnswerReading()  # found out by itself


class Broken(ValueError):
    """An external model that cannot be audited; the message has the reason and the remedy."""


def answered(call: Call, images: Tensor, name: str, output: str | None = None) -> Tensor:
    """The answer of a model to a copy of the images, as a (B, K) tensor of its own.

    Args:
        output: which of several outputs; see ``AnswerReading``.

    Raises:
        Broken: it failed, or answered something that is not one row of numbers for each image.
    """
    try:
        answer = call(images.clone())
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
    answer = _select(answer, name, output)
    if not isinstance(answer, Tensor | np.ndarray):
        raise Broken(f"{name} answered a {type(answer).__name__}; it must return one (B, K) tensor or array")
    rows = torch.as_tensor(answer).clone()  # it may answer in the same memory again
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


def _select(answer: Any, name: str, output: str | None) -> Any:
    """The output that the user named, or the only one."""
    if isinstance(answer, Mapping):
        parts = {str(key): value for key, value in answer.items()}
    elif isinstance(answer, tuple | list):
        fields = getattr(answer, "_fields", range(len(answer)))  # of a named tuple
        parts = dict(zip(map(str, fields), answer, strict=True))
    elif output is None:
        return answer
    else:
        raise Broken(
            f"{name} answers one {type(answer).__name__}, no output {output!r}; leave --output-name out"
        )
    if output is None and len(parts) == 1:
        return next(iter(parts.values()))
    if output in parts:
        return parts[output]
    listed = ", ".join(f"{key} {tuple(getattr(value, 'shape', ()))}" for key, value in parts.items())
    if output is not None:
        raise Broken(f"{name} has no output {output!r}; it answers {listed}")
    raise Broken(
        f"{name} answers {len(parts)} outputs: {listed}; say which is searched with --output-name, such as "
        f"--output-name {list(parts)[-1]}"
    )


def form_of(answer: Tensor, name: str) -> Form:
    """The form of an answer, by its values alone.

    Rows of length 1, rows that sum to 1, and numbers that are never negative are no logits: a cut at 0 or 0.5
    would make nearly constant codes of them, so they are embeddings.

    Raises:
        Broken: whole numbers that are neither bits nor bytes.
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
        hint = ""
        if answer.dtype == torch.int8:
            hint = "; signed bytes become uint8 by + 128 where 128 was taken off, else by .view(uint8)"
        raise Broken(f"{name} answered whole numbers {bounds}; codes are bool, 0/1, -1/+1 or bytes{hint}")
    if no_logits(answer):
        return "embedding"
    return "probabilities" if least >= 0 else "numbers"


def no_logits(answer: Tensor) -> str:
    """Say why numbers are no logits; "" where they may be.

    Args:
        answer: (B, K) float.
    """
    rows = answer.double()
    if rows.shape[1] > 1 and bool(((rows.norm(dim=1) - 1).abs() < _UNIT).all()):
        return "every row has length 1"
    if float(rows.min()) >= 0:
        if rows.shape[1] > 1 and bool(((rows.sum(1) - 1).abs() < _UNIT).all()):
            return "every row sums to 1"
        if float(rows.max()) > 1:
            return "none is below 0"
        on = rows >= 0.5
        if (
            float(on.double().mean()) in (0.0, 1.0)
            or float((on == on[:1]).all(0).double().mean()) > _CONSTANT
        ):
            return "a cut at 0.5 makes the same code of nearly all images"
    return ""


def as_logits(answer: Tensor, form: Form, name: str) -> Tensor:
    """(B, K) in torch's default dtype, whose signs are the bits. Gradients pass where the answer has them.

    Raises:
        Broken: the answer is not of this form.
    """
    if form in ("embedding", "numbers"):
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
        raise Broken(f"{name} answered {FORM_TEXTS[form]} before, and now {float(numbers[~allowed][0]):g}")
    return numbers * 2 - 1 if form == "zero-one" else numbers


def checked_form(answer: Tensor, name: str, output: Output) -> Form:
    """The form of an answer, which must be what the user said.

    Raises:
        Broken: it is not.
    """
    if output == "auto":
        return form_of(answer, name)
    if output == "float":
        if answer.dtype == torch.bool:
            raise Broken(f"{name} answered bits, and an embedding is numbers; say --output signs")
        return "embedding"
    least, largest = float(answer.min()), float(answer.max())
    if output == "logits":
        if not answer.is_floating_point():
            raise Broken(f"{name} answered {answer.dtype}, and logits are real numbers; say --output signs")
        if least >= 0 and largest > 1:
            raise Broken(
                f"{name} answered numbers from {least:g} to {largest:g}, never below 0, so that every bit "
                "would be 1; say --output float, or subtract a threshold inside the model"
            )
        return "probabilities" if least >= 0 else "numbers"
    form = form_of(answer, name)
    if form in ("embedding", "numbers", "probabilities"):
        raise Broken(
            f"{name} answered real numbers from {least:g} to {largest:g}, and signs "
            "are bool, 0/1, -1/+1 or uint8 bytes; say --output logits where the sign of a number is the bit"
        )
    return form


def other_width(name: str, form: Form, width: int, bits: int) -> str:
    """Say what is wrong where the user knows another length than that of the answers."""
    return (
        f"{name} answers {width} {'numbers' if form == 'embedding' else 'bits'}, and --bits says {bits}: "
        f"this is another model than the one of {bits}, or another of its outputs (--output-name)"
    )


def reading_text(answer: Tensor, form: Form, width: int, reading: AnswerReading) -> str:
    """Say how answers are read, and how to change it where nobody said so."""
    guessed = reading.declared == "auto"
    if form == "embedding":
        text = f"It answers {width} numbers, an embedding that is searched by {reading.distance} distance."
        remedy = "--output logits cuts them into bits, --metric euclidean takes another distance"
        why = f"Nobody said so: {no_logits(answer)}, so they are no logits ({remedy})."
        return f"{text} {why}" if guessed else text
    kind = "numbers" if form in ("numbers", "probabilities") else "bits"
    text = f"It answers {width} {kind}: {FORM_TEXTS[form]}."
    remedy = "where the numbers themselves are compared, say --output float --metric cosine"
    return f"{text} Nobody said so ({remedy})." if guessed and kind == "numbers" else text
