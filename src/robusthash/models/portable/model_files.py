"""ONNX and TorchScript files of a hasher, with facts inside that say how to use them."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from robusthash.core.limited_files import parse_json
from robusthash.core.out_of_memory import out_of_memory
from robusthash.models.encoding import plain_attention
from robusthash.models.portable.portable_hasher import Pixels, PortableHasher

SCHEMA, KEY = "robusthash.portable/1", "robusthash"
OPSET = 17  # of ONNX, read by onnxruntime 1.12 and later
FileKind = Literal["onnx", "torchscript"]

_MEMBER = f"{KEY}.json"
_OUTPUTS = ("codes", "logits")


@dataclass(frozen=True)
class FileFacts:
    """The facts that a model file holds about itself.

    Args:
        name: of the model.
        bits: K.
        modality: ``image`` or ``text``.
        input: name, type and shape of the input, what its numbers are, and how images come to that size.
        size: pixels a side of images; None of texts and features.
        digest: of the weights, as codes of the run carry it.
        declared: defense class.
        purifier: True where a purifier is inside.
        scale: mean size of the logits, which attacks divide by (``HashOutput.scale``).
        finds_copies: whether the codes were made to find copies; None where nobody says.
        texts: the form of texts, by which they become inputs.
        check: numbers of the check: images, equal codes, bits in all, equal bits.
        versions: of the software that wrote the file.
    """

    name: str
    bits: int
    modality: str
    input: dict[str, Any]
    size: int | None = None
    digest: str = ""
    declared: str = "plain"
    purifier: bool = False
    scale: float = 1.0
    finds_copies: bool | None = None
    texts: dict[str, Any] | None = None
    check: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """JSON, as a file holds it."""
        packing = "bit 1 where the logit is at least 0; first bit highest; zeros pad the end"
        return json.dumps(
            {"schema": SCHEMA, **asdict(self), "outputs": list(_OUTPUTS), "packing": packing},
            ensure_ascii=False,
        )

    @classmethod
    def read(cls, text: str | bytes, where: str) -> FileFacts:
        """The facts of a file.

        Raises:
            ValueError: another schema, or a field that cannot be what it says.
        """
        plain = parse_json(text, f"the facts of {where}")
        if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
            schema = plain.get("schema") if isinstance(plain, dict) else None
            raise ValueError(f"{where} holds facts of schema {schema!r}, and this version reads {SCHEMA!r}")
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        for name, fits in _FITS.items():
            if not fits(known.get(name)):
                raise ValueError(f"{where} says {name}: {str(known.get(name))[:60]!r}; export it again")
        return cls(**known)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20


_FITS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "bits": _is_whole,
    "modality": lambda value: value in ("image", "text"),
    "input": lambda value: isinstance(value, dict),
    "size": lambda value: value is None or _is_whole(value),
    "scale": lambda value: isinstance(value, int | float) and 0 < value < math.inf,
    "finds_copies": lambda value: value in (None, True, False),
}


@dataclass(frozen=True)
class WrittenModel:
    """The content of a model file, and codes and logits that it gives, computed by its own runtime."""

    content: Callable[[FileFacts], bytes]  # with facts inside
    run: Callable[[Tensor], tuple[np.ndarray, np.ndarray]]


def write_model(net: PortableHasher, example: Tensor, to: FileKind) -> WrittenModel:
    """A net as the content of a file, for any batch of inputs of the size of ``example`` (2, ...).

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ValueError: operators that the format does not have.
    """
    try:
        with torch.no_grad(), plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants that are constant on purpose: the size of images
            return _onnx(net, example) if to == "onnx" else _torchscript(net, example)
    except ImportError:
        raise
    except Exception as error:  # exporters have errors of several families
        if out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise ValueError(
            f"this model cannot be written as {to}: {reason}; --to torch writes every model"
        ) from None


def _torchscript(net: PortableHasher, example: Tensor) -> WrittenModel:
    traced = torch.jit.trace(net, (example,), check_trace=False)

    def content(facts: FileFacts) -> bytes:
        stream = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch prefers torch.export, which fixes batches
            torch.jit.save(traced, stream, _extra_files={_MEMBER: facts.text().encode()})
        return stream.getvalue()

    plain = FileFacts("", net.bits, "image", {})
    loaded = torch.jit.load(io.BytesIO(content(plain)), map_location="cpu").eval()

    def run(inputs: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            codes, logits = loaded(inputs)
        return codes.numpy(), logits.numpy()

    return WrittenModel(content, run)


def _onnx(net: PortableHasher, example: Tensor) -> WrittenModel:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"ONNX files need an extra: pip install 'robusthash[onnx]' ({error})") from error
    name, log = "images" if example.ndim == 4 else "inputs", logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback(log.setLevel, level)
        stack.enter_context(_quiet())
        file = Path(folder) / "model.onnx"
        # by tracing: the exporter by torch.export was measured 10 to 50 times slower, for the same graphs
        torch.onnx.export(
            net,
            (example,),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=[name],
            output_names=list(_OUTPUTS),
            dynamic_axes={each: {0: "batch"} for each in (name, *_OUTPUTS)},
        )
        graph = file.read_bytes()
    model = onnx.load_from_string(graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def content(facts: FileFacts) -> bytes:
        onnx.helper.set_model_props(model, {KEY: facts.text()})
        content: bytes = model.SerializeToString()
        return content

    def run(inputs: Tensor) -> tuple[np.ndarray, np.ndarray]:
        codes, logits = session.run(list(_OUTPUTS), {name: inputs.numpy()})
        return codes, logits

    return WrittenModel(content, run)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout inside, where torch's own code prints the graph of an export that fails."""
    sys.stdout.flush()
    usual, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(usual, 1)
        os.close(usual)
        os.close(nothing)


def input_facts(example: Tensor, pixels: Pixels) -> dict[str, Any]:
    """Name, type and shape of the inputs, what their numbers are, and how images come to that size."""
    shape, kind = ["batch", *example.shape[1:]], str(example.dtype).removeprefix("torch.")
    if example.ndim == 4:
        numbers = "RGB pixels, " + ("0 to 255" if pixels == "uint8" else "floats in [0, 1]")
        prepared = {"fit": "central square", "filter": "Pillow BICUBIC"}  # as ``read_image`` does by default
        return {"name": "images", "type": kind, "shape": shape, "numbers": numbers, **prepared}
    numbers = "token ids" if kind == "int64" else "floats"
    return {"name": "inputs", "type": kind, "shape": shape, "numbers": numbers}


def facts_in(path: Path) -> FileFacts | None:
    """The facts that a model file of this package holds; None of other files, and of none at all.

    Nothing of the file is run.

    Raises:
        ValueError: damaged facts.
    """
    if not path.is_file():
        return None
    if path.suffix == ".onnx":
        return _facts_of_onnx(path)
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            members = [each for each in archive.infolist() if each.filename.endswith(f"/extra/{_MEMBER}")]
            if not members:
                return None
            if members[0].file_size > 64 << 20:
                raise ValueError(f"{path} holds facts of {members[0].file_size} bytes; export it again")
            text = archive.read(members[0])
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is a damaged TorchScript file ({error}); save it again") from None
    return FileFacts.read(text, str(path))


def _facts_of_onnx(path: Path) -> FileFacts | None:
    try:
        import onnx
    except ImportError:
        return None  # who opens the file says what is missing
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # who opens the file says that it is damaged
        return None
    metadata = {each.key: each.value for each in model.metadata_props}
    return FileFacts.read(metadata[KEY], str(path)) if KEY in metadata else None


def with_check(facts: FileFacts, check: dict[str, int]) -> FileFacts:
    """The facts with the numbers of the check."""
    return replace(facts, check=check)
