"""A step of adversarial training (SAAT on CSQ, 7 inner steps) beside two loops written by hand.

``bare`` does the same passes of the same net in plain PyTorch: attack with gradients to the input alone, one
pass of attacked and one of clean items, loss, SGD. ``reencoding`` is the straightforward loop of released
codes: the attack calls ``backward()``, which makes gradients of all parameters too, the net lies as PyTorch
makes it (channels first), and a batch goes through it three times: encoded for the memory, attacked, clean.

Ours is ``fit`` itself with all that it does; after each of its steps the two others take theirs, so that
whatever else the machine does falls on all. Ratios are medians over the steps of processor time. Before that,
``bare`` must come to the weights of ``fit``. Run it on one thread, on the CPU. Images and labels are random.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from _timing import StepLog, seconds
from defense_cost import random_data
from torch import Tensor, nn
from torch.nn.functional import softplus

from robusthash.core.labels import cosine
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.data import RetrievalData
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import CSQ
from robusthash.objectives.centers import hadamard_centers
from robusthash.training import OptimConfig, Schedule, TrainConfig, fit

BITS, CLASSES, STEPS = 32, 10, 7
EPS, STEP = 8 / 255, 2 / 255
OPTIM = OptimConfig("sgd", 1e-3)
TARGETS = {"bare": 1.05, "reencoding": 0.60}


class Net(nn.Module):
    """The net of a hasher without anything around it."""

    def __init__(self, hasher: Hasher) -> None:
        super().__init__()
        hasher = copy.deepcopy(hasher)
        self.encoder, self.head = hasher.encoders["image"], hasher.heads["image"].linear

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images)[0])


class ByHand:
    """State and losses of a loop written by hand: net, optimiser, memory of codes, centers."""

    def __init__(self, hasher: Hasher, data: RetrievalData, batch: int, random_start: bool = True) -> None:
        self.net, self.random_start = Net(hasher), random_start
        self.pixels, self.labels, self.batch = data.train.source.arrays["image"], data.train.labels, batch
        self.optimiser = torch.optim.SGD(self.net.parameters(), OPTIM.lr, momentum=0.9, weight_decay=5e-4)
        self.centers = hadamard_centers(CLASSES, BITS, Draws(0, ("csq",)))
        self.net.eval()
        with torch.no_grad():
            self.memory = torch.cat([torch.tanh(self.net(part / 255)) for part in self.pixels.split(batch)])
        self.memory = self.memory[: len(self.labels)]
        self.order: list[Tensor] = []
        self.epoch = 0

    def rows(self) -> Tensor:
        """Rows of the next batch, in the order in which ``fit`` takes them."""
        if not self.order:
            draws = Draws(0, ("train",)).within(self.epoch, "order")
            order = torch.randperm(len(self.labels), generator=draws.generator())
            self.order, self.epoch = list(order.split(self.batch)), self.epoch + 1
        return self.order.pop(0)

    def mainstay(self, labels: Tensor) -> Tensor:
        similarity, codes = cosine(labels, self.labels), torch.where(self.memory >= 0, 1.0, -1.0)
        positive = (similarity > 0).float()
        towards = similarity @ codes / similarity.sum(1, keepdim=True)
        away = (1 - positive) @ codes / (1 - positive).sum(1, keepdim=True)
        return torch.where(towards - away >= -1e-6, 1.0, -1.0)

    def start(self, images: Tensor) -> Tensor:
        noise = EPS * (2 * torch.rand_like(images) - 1) if self.random_start else torch.zeros_like(images)
        return (images + noise).clamp(0, 1)

    def loss(self, clean: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
        similarity = softplus(-2 * labels @ self.centers * clean).mean()
        spread, robust = (torch.tanh(clean).abs() - 1).square().mean(), torch.tanh(attacked)
        adversarial = -(robust * self.mainstay(labels)).mean()
        return similarity + 1e-4 * spread + adversarial + 1e-4 * (robust.abs() - 1).square().mean()

    def update(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


class Bare(ByHand):
    """The passes of ``fit``, and nothing else."""

    def step(self) -> None:
        rows = self.rows()
        images, labels = self.pixels[rows].float() / 255, self.labels[rows]
        codes = self.mainstay(labels)
        self.net.eval().requires_grad_(False)
        x = self.start(images)
        for _ in range(STEPS):
            x = x.detach().requires_grad_(True)
            score = -(torch.tanh(self.net(x)) * codes).mean(1).sum()
            (grad,) = torch.autograd.grad(score, x)
            ahead = x.detach() + STEP * grad.sign()
            x = torch.clamp(torch.clamp(ahead, images - EPS, images + EPS), 0, 1)
        self.net.train().requires_grad_(True)
        attacked, clean = self.net(x), self.net(images)
        self.memory[rows] = torch.tanh(clean).detach()
        self.update(self.loss(clean, attacked, labels))


class Reencoding(ByHand):
    """The straightforward loop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.net.to(memory_format=torch.contiguous_format)

    def step(self) -> None:
        rows = self.rows()
        images, labels = self.pixels[rows].float() / 255, self.labels[rows]
        self.net.eval()
        with torch.no_grad():
            self.memory[rows] = torch.tanh(self.net(images))
        codes = self.mainstay(labels)
        x = self.start(images)
        for _ in range(STEPS):
            x = x.detach().requires_grad_(True)
            score = -(torch.tanh(self.net(x)) * codes).mean(1).sum()
            score.backward()
            ahead = x.detach() + STEP * x.grad.sign()
            x = torch.clamp(torch.clamp(ahead, images - EPS, images + EPS), 0, 1)
        self.net.train()
        self.update(self.loss(self.net(images), self.net(x), labels))


@dataclass
class Beside(StepLog):
    """A log of training; after each step of ``fit`` it lets others take theirs, and keeps all times."""

    others: dict[str, Callable[[], None]]
    times: list[dict[str, tuple[float, float]]] = field(default_factory=list)  # (wall, processor) seconds
    began: tuple[float, float] | None = None

    def progress(self, done: int, total: int, text: str) -> None:
        now = time.perf_counter(), time.process_time()
        taken = {name: seconds(step) for name, step in self.others.items()}
        if self.began is not None:  # setup comes before the first step
            self.times.append({"ours": (now[0] - self.began[0], now[1] - self.began[1]), **taken})
        self.began = time.perf_counter(), time.process_time()

    def median(self, ours: str, clock: int, over: str | None = None) -> float:
        made = (step[ours][clock] / (step[over][clock] if over else 1.0) for step in self.times[1:])
        return statistics.median(made)


def train(hasher: Hasher, data: RetrievalData, batch: int, steps: int, log: Any, random_start: bool) -> None:
    """Train with the library."""
    objective = CSQ()
    attack = {"name": "mainstay", "steps": STEPS, "step_size": STEP, "slope": "one"}
    recipe = build(
        "recipe",
        "adversarial",
        hasher=hasher,
        objective=objective,
        attack=build("attack", {**attack, "random_start": random_start}, objective=objective),
        outer=build("outer", "saat"),
    )
    epochs = -(-steps * batch // len(data.train))
    config = TrainConfig(epochs, batch, {"hasher": OPTIM}, Schedule("constant"), device="cpu")
    fit(recipe, data, config, log)


def check_equal(image: dict[str, Any], data: RetrievalData, batch: int) -> None:
    """Two steps of ``fit`` and of the bare loop lead to the same weights, up to rounding.

    Deep nets are no use here: an attack steps by signs, and rounding turns those of the smallest gradients.
    """
    hasher = build_hasher(bits=BITS, image=image)
    bare = Bare(hasher, data, batch, False)
    train(hasher, data, batch, len(data.train) // batch, None, False)
    for _ in range(len(data.train) // batch):
        bare.step()
    for ours, theirs in zip(hasher.parameters(), bare.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def measure(net: str, image: dict[str, Any], side: int, batch: int, steps: int) -> Iterator[dict[str, Any]]:
    """Two rows: a step of ours over a bare one, and over a re-encoding one."""
    data = random_data(4 * batch, side)
    hasher = build_hasher(bits=BITS, image=image)
    sides = {"bare": Bare(hasher, data, batch), "reencoding": Reencoding(hasher, data, batch)}
    log = Beside({name: one.step for name, one in sides.items()})
    train(hasher, data, batch, steps + 2, log, True)
    for name, target in TARGETS.items():
        detail = {
            "step_ms": round(1e3 * log.median("ours", 1), 2),
            f"{name}_ms": round(1e3 * log.median(name, 1), 2),
            "wall_ratio": round(log.median("ours", 0, name), 4),
            "pixels": side,
            "batch": batch,
            "inner_steps": STEPS,
            "pairs": len(log.times) - 1,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        row = {"bench": f"adversarial-step-{net}-over-{name}", "ratio": round(log.median("ours", 1, name), 4)}
        yield {**row, "target": target, "better": "lower", "detail": detail}


def run() -> Iterator[dict[str, Any]]:
    """A small net at 32 px, and EfficientNet-Lite0 and AlexNet at 96 px."""
    small = {"name": "small", "width": 32}
    check_equal(small, random_data(128, 32), 64)
    yield from measure("small", small, side=32, batch=64, steps=14)
    lite0 = {"name": "timm", "model": "tf_efficientnet_lite0"}
    yield from measure("efficientnet-lite0", lite0, side=96, batch=8, steps=6)
    yield from measure("alexnet", {"name": "alexnet"}, side=96, batch=16, steps=12)


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row), flush=True)
