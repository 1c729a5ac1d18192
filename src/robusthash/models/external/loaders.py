"""External models from a dotted Python path, a TorchScript or ONNX file, and well-known perceptual hashes.

All but the last are programs: a Python path runs the module it names, and model files run their own graph.
Audit only what you would run anyway. Pickled modules are never opened.
"""

from __future__ import annotations

import importlib
import inspect
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from robusthash.core.registry import nearest
from robusthash.data.transforms import to_pixels
from robusthash.models.external.model_answers import Call
from robusthash.models.external.smooth_hashes import exact_logits

_AGREE = 0.99  # share of bits on which a converted model must agree with the runtime of its format
_BLACK_BOX = "The ONNX file is used as a black box through onnxruntime: {}."


def load_python(path: str) -> Call:
    """``module:name`` -> a callable from images to codes.

    An ``nn.Module`` or a function that needs an argument is the model itself; a class of modules, or a
    function that needs no argument, is a factory, called once without arguments.

    Raises:
        ImportError: no such module.
        ValueError: no such name in it, or nothing callable.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module is there, and something that it imports is not
        remedy = "run from the folder that holds it, or install it"
        raise ImportError(f"no Python module {module_name!r} (wanted by {path!r}); {remedy}") from error
    model: Any = module
    for part in name.split("."):
        if not hasattr(model, part):
            known = [known for known in vars(module) if known[0] != "_"]
            raise ValueError(f"{module_name} has no {part!r}{nearest(part, known)}")
        model = getattr(model, part)
    if _is_factory(model):
        model = model()
    if not callable(model):
        raise ValueError(f"{path} is a {type(model).__name__}, which cannot be called with images")
    call: Call = model
    return call


def _is_factory(model: Any) -> bool:
    if isinstance(model, nn.Module) or not callable(model):
        return False
    if inspect.isclass(model):
        return True
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model).parameters.values()
    return all(each.default is not each.empty or each.kind in free for each in parameters)


def load_torchscript(path: Path) -> Call:
    """A TorchScript file, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TorchScript, such as a pickle of weights, which is not opened.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    names: list[str] = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if not any("/code/" in name for name in names):  # TorchScript brings code; torch.save does not
        raise ValueError(
            f"{path} is no TorchScript file; weights or a pickled module are not opened. Save the whole "
            "model with torch.jit.trace(model.eval(), images).save(...), or name its Python path, module:name"
        )
    module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu").eval()
    return module


def load_onnx(path: Path, images: Tensor) -> tuple[Call, str]:
    """An ONNX file as a differentiable module if it can be converted, else as a black box, and a sentence.

    Images are resized to the input size that the file fixes. The conversion by ``onnx2torch`` counts only if
    its bits agree with ``onnxruntime`` on ``images``, (n, 3, H, W) in [0, 1].

    Raises:
        FileNotFoundError: no such file.
        ImportError: the extra ``onnx`` is not installed.
        ValueError: no ONNX file, or one that does not take one batch of colour images.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    try:
        import onnx
        import onnx2torch
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"ONNX files need an extra: pip install 'robusthash[onnx]' ({error})") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a family of errors of its own
        raise ValueError(f"{path} cannot be opened as an ONNX model: {error}") from error
    black_box = _Session(session, path)
    try:
        graph = onnx2torch.convert(onnx.load(str(path))).eval()
        converted = _Resized(graph, black_box.size, black_box.batch)
        with torch.no_grad():
            ours, theirs = converted(images), torch.from_numpy(np.array(black_box(images)))
    except Exception as error:
        reason = f"it could not be converted ({type(error).__name__}: {str(error)[:160]})"
        return black_box, _BLACK_BOX.format(reason)
    agree = float(((ours >= 0) == (theirs >= 0)).float().mean()) if ours.shape == theirs.shape else 0.0
    if agree < _AGREE:
        return black_box, _BLACK_BOX.format(f"its conversion agrees on {agree:.1%} of the bits only")
    sentence = f"The ONNX file was converted so that it can be differentiated; {agree:.1%} of the bits agree."
    return converted, sentence


class _Session:
    """An onnxruntime session as a callable; a fixed batch of one is run image by image."""

    def __init__(self, session: Any, path: Path) -> None:
        inputs = session.get_inputs()
        shapes = [list(each.shape) for each in inputs]
        if len(shapes) != 1 or len(shapes[0]) != 4 or (isinstance(shapes[0][1], int) and shapes[0][1] != 3):
            raise ValueError(f"{path} must take one input (B, 3, H, W), it takes {shapes}")
        batch, _, height, width = shapes[0]
        if isinstance(batch, int) and batch != 1:
            raise ValueError(f"{path} has a fixed batch of {batch}; export it with a free one, or 1")
        self.session, self.name = session, inputs[0].name
        self.batch: int | None = 1 if batch == 1 else None
        fixed = isinstance(height, int) and isinstance(width, int)
        self.size: tuple[int, int] | None = (height, width) if fixed else None

    def __call__(self, images: Tensor) -> np.ndarray:
        values = _resized(images, self.size).detach().cpu().numpy()
        parts = [values] if self.batch is None else np.split(values, len(values))
        return np.concatenate([self.session.run(None, {self.name: part})[0] for part in parts])


class _Resized(nn.Module):
    """A converted model behind the same resizing and batching."""

    def __init__(self, inner: nn.Module, size: tuple[int, int] | None, batch: int | None) -> None:
        super().__init__()
        self.inner, self.size, self.batch = inner, size, batch

    def forward(self, images: Tensor) -> Tensor:
        values = _resized(images, self.size)
        parts = [values] if self.batch is None else list(values.split(self.batch))
        answers = [self.inner(part) for part in parts]
        return torch.cat([answer[0] if isinstance(answer, tuple | list) else answer for answer in answers])


def _resized(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or tuple(images.shape[-2:]) == size:
        return images
    options: dict[str, Any] = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return functional.interpolate(images, size, **options).clamp(0, 1)


# -------------------------------------------------------------------------------- perceptual hashes


@dataclass(frozen=True)
class Perceptual:
    """A perceptual hash: (B, 3, H, W) float in [0, 1] -> (B, K) numbers.

    Their signs are the library's bits of the 8-bit images; their gradients are those of the public arithmetic
    behind the bits (``smooth_hashes``), as an attacker takes them.
    """

    name: str
    title: str
    bits: int
    radius: int  # bits that may differ between two pictures that count as the same, as its users set it
    compute: Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 -> (K,) bits

    def __call__(self, images: Tensor) -> Tensor:
        bits = np.stack([self.compute(pixels) for pixels in to_pixels(images.detach())]).astype(bool)
        return exact_logits(self.name, images, torch.from_numpy(bits))


TITLES = {"phash": "pHash", "dhash": "dHash", "whash": "wavelet hash", "pdq": "PDQ"}
NAMES = tuple(TITLES)


def perceptual(name: str) -> Perceptual:
    """``phash``, ``dhash``, ``whash`` of ``imagehash`` (64 bits each) or ``pdq`` of ``pdqhash`` (256 bits).

    The radii are customs, not laws: 10 of 64 bits, and for PDQ 31 of 256, which its authors recommend.

    Raises:
        KeyError: another name.
        ImportError: the extra ``audit`` is not installed.
    """
    if name not in NAMES:
        raise KeyError(f"no perceptual hash is called {name!r}{nearest(name, NAMES)}")
    try:
        if name == "pdq":
            import pdqhash

            return Perceptual(name, TITLES[name], 256, 31, lambda pixels: pdqhash.compute(pixels)[0])
        import imagehash
    except ImportError as error:
        raise ImportError(
            f"perceptual hashes need an extra: pip install 'robusthash[audit]' ({error})"
        ) from error
    compute: Callable[[Image.Image], Any] = getattr(imagehash, name)
    return Perceptual(name, TITLES[name], 64, 10, lambda x: compute(Image.fromarray(x)).hash.flatten())
