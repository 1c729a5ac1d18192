"""A user's own net as a hasher: attacked, measured and trained like one that was built here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusthash.core.embeddings import METRICS, Metric
from robusthash.models.external.wrapper import AsIs
from robusthash.models.hasher import Encoder, Hasher

Output = Literal["logits", "signs", "float"]


def wrap(
    module: nn.Module,
    *,
    bits: int,
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    output: Output = "logits",
    metric: Metric = "cosine",
    declared: str = "plain",
) -> Hasher:
    """Your own net as a hasher, for ``evaluate``, ``assess`` and ``audit``, and to be trained on by ``fit``.

    The module is used as it is, not copied: training changes its weights. It is given images in its own
    range, and attacks differentiate the change of range too, so that their budgets stay in pixels of [0, 1].

    Args:
        module: (B, 3, H, W) float -> (B, ``bits``); or of (B, V) features, without bounds, mean and std.
        bits: K, the width of its answers.
        bounds: the range of pixels that it takes, such as (0, 255) or (-1, 1).
        mean, std: subtracted, and then divided by, in that range: numbers, or one for each channel.
        output: ``logits``, real numbers whose sign is the bit (0 counts as +1); ``signs``, bits as -1 and +1,
            0 and 1, or bool; ``float``, an embedding that is searched by ``metric``.
        metric: of ``float`` alone, ``cosine`` or ``euclidean``.
        declared: its defense class, for ``assess``: ``randomised``, ``purifier``, ``gate``, ...

    Raises:
        ValueError: bounds, mean or std that scale nothing, or another output.

    Example:
        >>> import torch, robusthash as rh
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 24))
        >>> victim = rh.wrap(net, bits=24, bounds=(-1, 1))
        >>> rh.evaluate(victim, rh.load_data("synthetic", query=8))["MAP"] > 0
        True
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"wrap takes an nn.Module, got {type(module).__name__}; put a function into one")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("a TorchScript module cannot be trained on; audit its file: robusthash audit FILE")
    if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
        raise ValueError(f"bits must be a positive whole number, got {bits!r}")
    if output not in ("logits", "signs", "float"):
        raise ValueError(f"output must be 'logits', 'signs' or 'float', got {output!r}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    encoder = OwnEncoder(module, bits, output, *_scaling(bounds, mean, std))
    head = AsIs(bits, metric if output == "float" else "hamming")
    return Hasher({"image": encoder}, {"image": head}, {"foreign": type(module).__name__}, declared)


def require_hasher(victim: Any) -> None:
    """ValueError for a net that is no hasher yet, with the remedy."""
    if not hasattr(victim, "modalities"):
        remedy = "wrap a net of your own: robusthash.wrap(net, bits=...)"
        remedy = "give its .hasher" if hasattr(victim, "hasher") else remedy
        raise ValueError(f"a {type(victim).__name__} is no hasher; {remedy}")


class OwnEncoder(Encoder):
    """The image encoder of a wrapped module: its features are its logits.

    Args:
        scale, offset: (3,) or (1,); the module is given ``images * scale + offset``.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, module: nn.Module, bits: int, output: Output, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.module, self.output, self.width = module, output, bits
        # buffers: part of its identity, of its device and of its precision
        like = next((each for each in module.parameters() if each.is_floating_point()), scale)
        self.register_buffer("scale", scale.view(-1, 1, 1).to(like))
        self.register_buffer("offset", offset.view(-1, 1, 1).to(like))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, H, W) in [0, 1], or (B, V) features -> (B, K) logits, and nothing else."""
        if images.ndim == 2 and not (bool((self.scale == 1).all()) and bool((self.offset == 0).all())):
            raise ValueError(
                f"bounds, mean and std are of pixels, and these are vectors {tuple(images.shape)}"
            )
        # a copy: the module may write into it
        own = images * self.scale + self.offset if images.ndim > 2 else images.clone()
        rows = self.module(own.to(self.scale.dtype))
        name, shape = type(self.module).__name__, (len(images), self.width)
        if not isinstance(rows, Tensor) or tuple(rows.shape) != shape:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            raise ValueError(
                f"{name} answered {got} to {len(images)} images, and bits={self.width} needs a tensor {shape}"
            )
        cut = self.output == "signs" or not rows.requires_grad  # of a sign the gradient is 0
        if self.training and torch.is_grad_enabled() and cut:
            raise ValueError(
                f"no gradient reaches the weights of {name}, so that it cannot be trained: wrap what comes "
                "before its sign as output='logits', and set requires_grad of its parameters"
            )
        return (rows if self.output != "signs" else _plus_minus(rows, name)), {}


def _plus_minus(rows: Tensor, name: str) -> Tensor:
    """Bits of any notation as -1 and +1."""
    values = rows.to(torch.get_default_dtype())
    ones, zeros = values == 1, values == 0
    if (ones | zeros).all():
        return values * 2 - 1
    if (wrong := ~(ones | (values == -1))).any():
        raise ValueError(
            f"{name} answered {float(values[wrong][0]):g}, and output='signs' means -1 and +1, 0 and 1, or "
            "bool (torch.sign gives 0 at 0); real numbers are output='logits'"
        )
    return values


def _scaling(bounds: tuple[float, float], mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    """Factor and summand, of each channel or of all, by which pixels in [0, 1] become a module's input."""
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        problem = f"bounds are the least and the largest pixel, such as (0, 255), got {bounds!r}"
        raise ValueError(problem) from None
    centre, spread = _channels(mean, 0.0, "mean"), _channels(std, 1.0, "std")
    if not low < high < float("inf") or low == -float("inf"):
        raise ValueError(f"bounds are the least and the largest pixel, such as (0, 255), got {bounds}")
    if not (spread > 0).all():
        raise ValueError(f"std must be above 0, got {std}")
    if not ((low <= centre) & (centre <= high)).all():
        raise ValueError(
            f"mean {mean} lies outside of the bounds {bounds}; mean and std are in the range of the bounds"
        )
    return (high - low) / spread, (low - centre) / spread


def _channels(values: Any, default: float, name: str) -> Tensor:
    numbers = torch.as_tensor(default if values is None else values, dtype=torch.float32).flatten()
    if len(numbers) not in (1, 3) or not torch.isfinite(numbers).all():
        raise ValueError(f"{name} is a number or one for each of 3 channels, got {values}")
    return numbers
