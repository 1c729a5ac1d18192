"""Foreign models from where people keep them: a dotted Python path, a TorchScript file, an ONNX file.

Each is a program: a Python path runs the module it names, and model files run their own graph, with whatever
that graph does. Audit only what you would run anyway. Pickled modules are never opened.
"""

from __future__ import annotations

import importlib
import inspect
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robusthash.core.registry import nearest
from robusthash.models.external.wrapper import Call

_AGREE = 0.99  # share of bits on which a converted model must agree with the runtime of its format


def load_python(path: str) -> Call:
    """``module:name`` -> a callable from images to codes.

    What ``name`` is decides: an ``nn.Module`` or a function that needs an argument is the model itself; a
    class of modules, or a function that needs no argument, is a factory, called once without arguments.

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
        raise ImportError(
            f"no Python module {module_name!r} (wanted by {path!r}); run from the folder that holds it, or install it"
        ) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"{module_name} has no {part!r}{nearest(part, [n for n in vars(module) if n[0] != '_'])}"
            )
        found = getattr(found, part)
    if _is_factory(found):
        found = found()
    if not callable(found):
        raise ValueError(f"{path} is a {type(found).__name__}, which cannot be called with images")
    model: Call = found
    return model


def _is_factory(found: Any) -> bool:
    if isinstance(found, nn.Module) or not callable(found):
        return False
    if inspect.isclass(found):
        return True
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    asked = inspect.signature(found).parameters.values()
    return all(each.default is not each.empty or each.kind in free for each in asked)


def load_torchscript(path: Path) -> Call:
    """A TorchScript file, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TorchScript, such as a pickle of weights, which is not opened.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    wrong = ValueError(
        f"{path} is no TorchScript file; weights or a pickled module are not opened. Save the whole model with "
        "torch.jit.trace(model.eval(), images).save(...), or name it by its Python path, module:name"
    )
    if not zipfile.is_zipfile(path):
        raise wrong
    with zipfile.ZipFile(path) as archive:  # TorchScript brings code; torch.save does not
        if not any("/code/" in name for name in archive.namelist()):
            raise wrong
    module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu").eval()
    return module


def load_onnx(path: Path, images: Tensor) -> tuple[Call, str]:
    """An ONNX file as a differentiable module where it can be converted, else as a black box, with a sentence
    on it.

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
    blackbox = _Session(session, path)
    try:
        converted = _Resized(onnx2torch.convert(onnx.load(str(path))).eval(), blackbox.size, blackbox.batch)
        with torch.no_grad():
            ours, theirs = converted(images), torch.from_numpy(np.array(blackbox(images)))
    except Exception as error:
        return blackbox, _BLACK.format(
            f"it could not be converted ({type(error).__name__}: {str(error)[:160]})"
        )
    agree = float(((ours >= 0) == (theirs >= 0)).float().mean()) if ours.shape == theirs.shape else 0.0
    if agree < _AGREE:
        return blackbox, _BLACK.format(f"its conversion agrees on {agree:.1%} of the bits only")
    return (
        converted,
        f"The ONNX file was converted so that it can be differentiated; {agree:.1%} of the bits agree.",
    )


_BLACK = "The ONNX file is used as a black box through onnxruntime: {}."


class _Session:
    """An onnxruntime session as a callable; a fixed batch of one is asked image by image."""

    def __init__(self, session: Any, path: Path) -> None:
        inputs = session.get_inputs()
        shapes = [list(each.shape) for each in inputs]
        if len(shapes) != 1 or len(shapes[0]) != 4 or (isinstance(shapes[0][1], int) and shapes[0][1] != 3):
            raise ValueError(
                f"{path} must take one input (B, 3, H, W), it takes {shapes}; export it so, or wrap it"
            )
        self.session, self.name, shape = session, inputs[0].name, inputs[0].shape
        if isinstance(shape[0], int) and shape[0] != 1:
            raise ValueError(
                f"{path} has a fixed batch of {shape[0]}; export it with a free batch axis, or with 1"
            )
        self.batch: int | None = 1 if shape[0] == 1 else None
        fixed = isinstance(shape[2], int) and isinstance(shape[3], int)
        self.size: tuple[int, int] | None = (shape[2], shape[3]) if fixed else None

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
    return functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False).clamp(
        0, 1
    )
