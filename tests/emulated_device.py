"""A device that any machine has: tensors that are kept apart from those of the CPU, as an accelerator keeps its own.

Numbers are computed by the CPU; what an accelerator refuses is refused: to mix its tensors with others, to
be read by NumPy, or to draw from a generator of the CPU. It goes by the name of ``meta``, torch's device without
memory, which has autograd everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
_ACROSS = (aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_)
"""Operations that take tensors of the CPU beside those of the device: copies, and positions to index by."""


class OnDevice(Tensor):
    """A tensor of the emulated device; ``held`` are its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE, **layout)
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class EmulatedDevice(TorchDispatchMode):
    """Inside, ``meta`` is the emulated device; ``operations`` counts what was computed there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _computed(func, args, kwargs or {})
        self.operations += any(isinstance(value, OnDevice) for value in tree_flatten(result)[0])
        return result


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, OnDevice)]
    place = kwargs.get("device")
    to_device = bool(there) if place is None else torch.device(place).type == DEVICE.type
    others = [value for value in tensors if not isinstance(value, OnDevice) and value.dim() > 0]
    if there and others and func.overloadpacket not in _ACROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of the device and the CPU")
    if there and func.overloadpacket in _ACROSS[2:] and not isinstance(args[0], OnDevice):
        raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
    if to_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a generator of the device for {func}, but found one of the CPU")
    if place is not None and to_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    plain_args, plain_kwargs = tree_map_only(OnDevice, lambda value: value.held, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and isinstance(result, Tensor):  # in place: the argument itself
        changed = kwargs.get("out", args[0] if args else None)
        assert changed.shape == result.shape, f"{func} changes the shape in place, which is not emulated"
        return changed
    if not to_device:
        return result
    return tree_map_only(Tensor, _placed, result)


def _placed(value: Tensor) -> OnDevice:
    """A result on the device; its numbers as they are, since it could not say that a view negates them."""
    return value if isinstance(value, OnDevice) else OnDevice(value.resolve_conj().resolve_neg())


@contextlib.contextmanager
def emulated_device(patch: pytest.MonkeyPatch) -> Iterator[EmulatedDevice]:
    """The emulated device as the one that every configuration names; autocast on it is that of the CPU."""
    autocast = torch.autocast
    patch.setattr(
        torch,
        "autocast",
        lambda kind, *args, **options: autocast("cpu" if kind == DEVICE.type else kind, *args, **options),
    )
    optimizer = import_module("torch.optim.optimizer")  # torch.optim hides it
    fused = optimizer._get_fused_kernels_supported_devices
    patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), DEVICE.type])
    patch.setattr("robusthash.training.loop.choose_device", lambda name: DEVICE)
    with EmulatedDevice() as device:
        yield device
