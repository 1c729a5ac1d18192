"""External models from a dotted Python path or a TorchScript file, and well-known perceptual hashes.

All but the last are programs: a Python path runs the module it names, and model files run their own graph.
Audit only what you would run anyway. Pickled modules are never opened.
"""

from __future__ import annotations

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

from robusthash.core.limited_files import check_archive
from robusthash.core.out_of_memory import out_of_memory
from robusthash.core.plugins import import_plugin
from robusthash.core.registry import nearest
from robusthash.data.transforms import to_pixels
from robusthash.models.external.model_answers import Call
from robusthash.models.external.smooth_hashes import exact_logits


def load_python(path: str) -> Call:
    """``module:name`` -> a callable from images to codes.

    An ``nn.Module`` or a function that needs an argument is the model itself; a class of modules, or a
    function that needs no argument, is a factory, called once without arguments.

    Raises:
        ImportError: no such module, or a broken one.
        ValueError: no such name in it, or nothing callable.
    """
    module, name = import_plugin(path)
    model: Any = module
    for part in name.split("."):
        if not hasattr(model, part):
            known = [known for known in vars(module) if known[0] != "_"]
            raise ValueError(f"{module.__name__} has no {part!r}{nearest(part, known)}")
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
    check_archive(path)
    try:
        return _Scripted(torch.jit.load(path, map_location="cpu").eval())
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"{path} is a damaged TorchScript file ({reason}); save it again") from None


class _Scripted(nn.Module):
    """A TorchScript module as an ordinary one, which can be copied, and moved to float64 for checks.

    It is held in a list, so that it is no child: scripted modules refuse what is done to ordinary ones.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.held = [module]

    def forward(self, images: Tensor) -> Any:
        return self.held[0](images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Scripted:
        self.held[0]._apply(fn)
        return self


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


TITLES = {
    "phash": "pHash",
    "ahash": "average hash",
    "dhash": "dHash",
    "whash": "wavelet hash",
    "pdq": "PDQ",
}
_IN_IMAGEHASH = {"ahash": "average_hash"}
NAMES = tuple(TITLES)


def perceptual(name: str) -> Perceptual:
    """``phash``, ``ahash``, ``dhash``, ``whash`` of ``imagehash`` (64 bits), or ``pdq`` of ``pdqhash`` (256).

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
        raise ImportError(f"perceptual hashes need: pip install 'robusthash[audit]' ({error})") from error
    compute: Callable[[Image.Image], Any] = getattr(imagehash, _IN_IMAGEHASH.get(name, name))
    return Perceptual(name, TITLES[name], 64, 10, lambda x: compute(Image.fromarray(x)).hash.flatten())
