"""Small data, small victims and counters that many tests share. Everything is generated; nothing is read from
disk."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from robusthash.core.types import Batch, HashOutput, Outputs, Reference
from robusthash.data import ArraySource, RetrievalData, Split
from robusthash.data.photos import photos
from robusthash.data.transforms import to_pixels
from robusthash.models import Hasher, build_hasher, encode_split
from robusthash.objectives import DPSH, CodeMemory, HashObjective, TrainFacts
from robusthash.objectives.base import share_similar
from robusthash.training import HashingRecipe, OptimConfig, Schedule, TrainConfig, fit

CLASSES = 3


def make_split(
    name: str, items: int, seed: int, *, size: int = 12, classes: int = CLASSES, multi: bool = False
) -> Split:
    """Images with one coloured pattern per class and noise; with ``multi`` every third item has two
    classes."""
    patterns = torch.rand(classes, 3, size, size, generator=torch.Generator().manual_seed(7)) > 0.5
    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(items) % classes
    labels = torch.nn.functional.one_hot(first, classes).float()
    if multi:
        labels[::3, :] = torch.maximum(labels[::3], labels.roll(1, 1)[::3])
    signal = torch.einsum("nc,cxhw->nxhw", labels / labels.sum(1, keepdim=True), patterns.float())
    noise = torch.rand(items, 3, size, size, generator=generator)
    pixels = (255 * (0.2 + 0.2 * signal + 0.5 * noise).clamp(0, 1)).to(torch.uint8)
    source = ArraySource({"image": pixels})
    return Split(name, source, torch.arange(items), labels, source.hashes())


def make_data(
    *, train: int = 48, query: int = 12, database: int = 36, size: int = 12, multi: bool = False
) -> RetrievalData:
    """Three disjoint splits of the same three classes."""
    sizes = {"train": train, "query": query, "database": database}
    splits = {
        n: make_split(n, count, seed, size=size, multi=multi) for seed, (n, count) in enumerate(sizes.items())
    }
    return RetrievalData("tiny", **splits, label_names=tuple("abc"))


def small_hasher(bits: int = 8, seed: int = 0, width: int = 4, **options: Any) -> Hasher:
    """The small net at its narrowest."""
    return build_hasher(bits=bits, image={"name": "small", "width": width, "grid": 1}, seed=seed, **options)


def train_config(epochs: int = 3, lr: float = 0.05, **options: Any) -> TrainConfig:
    """SGD without weight decay on the CPU, 16 items a batch."""
    optim = {"hasher": OptimConfig("sgd", lr, momentum=0.9, weight_decay=0.0)}
    options = {"batch_size": 16, "schedule": Schedule("constant"), "device": "cpu", **options}
    return TrainConfig(epochs=epochs, optim=optim, **options)


def trained_hasher(data: RetrievalData, bits: int = 8, epochs: int = 12, width: int = 4) -> Hasher:
    """A victim that has learned ``data``."""
    hasher = small_hasher(bits, width=width)
    fit(HashingRecipe(hasher, DPSH()), data, train_config(epochs))
    return hasher


def jolted(hasher: Hasher, seed: int = 0, size: float = 0.3) -> Hasher:
    """The same hasher with all parameters moved, so that gates and masks depend on the input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hasher.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return hasher.eval()


def reference_of(hasher: Hasher, split: Split) -> Reference:
    """What an attacker at W1 or W2 knows of ``split``."""
    codes = encode_split(hasher, split)
    return Reference({name: value.signs().float() for name, value in codes.items()}, split.labels)


class Flat(nn.Module):
    """An encoder without weights: flattened inputs, optionally through a fixed linear gate P."""

    def __init__(self, gate: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("gate", gate)

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        flat = values.flatten(1)
        return (flat if self.gate is None else flat @ self.gate.T), {}


class LinearHead(nn.Module):
    """u = W x, code tanh(u): the head whose adversarial examples are known in closed form."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bits = len(weight)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = features @ self.weight.T
        return logits, torch.tanh(logits), 1.0


def linear_hasher(weight: Tensor, gate: Tensor | None = None, modality: str = "image") -> Hasher:
    """A hasher u = W P x of plain modules; ``weight`` is (K, n)."""
    return Hasher({modality: Flat(gate)}, {modality: LinearHead(weight)})


def image_batch(values: Tensor, labels: Tensor | None = None) -> Batch:
    """(B, n) values as images of one row and one channel, ids 0..B-1."""
    return Batch({"image": values[:, None, None, :]}, labels, torch.arange(len(values)))


def output_of(logits: Tensor, scale: float = 1.0) -> HashOutput:
    """A tanh output with these logits."""
    return HashOutput(logits, torch.tanh(logits), logits, {}, scale)


def facts_of(labels: Tensor, bits: int, seed: int = 0, widths: dict[str, int] | None = None) -> TrainFacts:
    """What an objective may know of training items with these labels."""
    return TrainFacts(len(labels), bits, labels, seed, share_similar(labels), widths or {})


def memory_of(codes: dict[str, Tensor], labels: Tensor | None) -> CodeMemory:
    """A code memory filled with ``codes``."""
    some = next(iter(codes.values()))
    memory = CodeMemory(len(some), some.shape[1], labels, tuple(codes))
    with torch.no_grad():
        for name, values in codes.items():
            memory.codes[name].copy_(values)
    return memory


def total(objective: HashObjective, outputs: Outputs, batch: Batch, memory: CodeMemory) -> Tensor:
    """The loss that the loop would minimise."""
    return torch.stack(list(objective(outputs, batch, memory).values())).sum()


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that an attack must leave alone: parameters, buffers, gradients, modes and flags."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "modes": {name: child.training for name, child in module.named_modules()},
        "flags": {name: p.requires_grad for name, p in module.named_parameters()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Bit for bit."""
    assert before["modes"] == after["modes"]
    assert before["flags"] == after["flags"]
    for part in ("state", "grads"):
        assert before[part].keys() == after[part].keys()
        for name, value in before[part].items():
            other = after[part][name]
            assert (value is None) == (other is None), f"{part} of {name}"
            assert value is None or torch.equal(value, other), f"{part} of {name}"


@dataclass
class Calls:
    """How often a module ran forward, and how often a gradient came back to its outputs."""

    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def counted(victim: Hasher) -> Iterator[Calls]:
    """Count the calls of ``victim`` inside the block."""
    calls = Calls()

    def back(_: Tensor) -> None:
        calls.backward += 1

    def look(module: nn.Module, inputs: Any, outputs: Outputs) -> None:
        calls.forward += 1
        logits = next(iter(outputs.values())).logits
        if logits.requires_grad:
            logits.register_hook(back)

    handle = victim.register_forward_hook(look)
    try:
        yield calls
    finally:
        handle.remove()


class Interrupted(Exception):
    """A run was stopped on purpose."""


@dataclass
class MemoryLog:
    """A RunLog in memory that keeps checkpoints as bytes, and can stop a run after an epoch, or in one."""

    stop_after: int | tuple[int, int] | None = None
    saved: bytes | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    shares: list[tuple[int, int]] = field(default_factory=list)

    def resume(self) -> dict[str, Any] | None:
        if self.saved is None:
            return None
        return torch.load(
            io.BytesIO(self.saved), weights_only=True
        )  # no code may be needed to read a checkpoint

    def checkpoint(self, state: dict[str, Any]) -> None:
        stream = io.BytesIO()
        torch.save(copy.deepcopy(state), stream)
        self.saved = stream.getvalue()
        if self.stop_after in (state["epoch"], (state["epoch"], state["step"])):
            raise Interrupted

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def progress(self, done: int, total: int, text: str) -> None:
        self.shares.append((done, total))


def write_photographs(folder: Path, count: int, side: int = 96) -> Path:
    """Windows of the embedded photographs as ``0.jpg``, ``1.jpg``, ... in ``folder``."""
    data = photos(size=side, train=1, query=count, database=1)
    pixels = data.query.batch(torch.arange(count)).inputs["image"]
    for number, image in enumerate(to_pixels(pixels)):
        Image.fromarray(image).save(folder / f"{number}.jpg", quality=95)
    return folder
