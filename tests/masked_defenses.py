"""Deliberately masked toy defenses, made from any hasher, each with the check that must catch it.

A check that has never been seen to fire is no check. ``calibrate`` breaks a working victim in every way
listed here and says whether the check meant for it turned red. The table of ``docs/checks.md`` is the output of

    python tests/masked_defenses.py
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from robusthash.attacks.base import Attack, Loss, Probe, Score, Search, SearchResult, Select
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import Agreement, ScaleFree
from robusthash.attacks.published import mainstay
from robusthash.attacks.threat_model import Threat, threat_on
from robusthash.core.hamming import pack
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, Goal, Guidance, Inputs
from robusthash.data import load_data
from robusthash.data.base import RetrievalData, Split
from robusthash.defenses.adversarial_training import AdversarialTraining
from robusthash.defenses.outer_losses import SAATOuter
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.metrics.results import Flag
from robusthash.models.hasher import Hasher, build_hasher
from robusthash.models.image_encoders import IMAGENET, Normalise
from robusthash.models.surrogate_gradients import keyed_noise
from robusthash.objectives.centers import CSQ
from robusthash.robustness.checks.model_checks import model_checks
from robusthash.training.loop import OptimConfig, TrainConfig, fit
from robusthash.training.recipe import HashingRecipe


@dataclass(frozen=True)
class Masked:
    """One way to get a robustness number that means nothing.

    Args:
        meant: the check that must turn red.
        apply: the context of an honest victim -> the context of the masked one.
        loss: what its attack ascends, the house objective by default.
    """

    name: str
    meant: str
    apply: Callable[[EvaluationContext], EvaluationContext]
    loss: Loss | None = None


@dataclass(frozen=True)
class Calibrated:
    """What became of one member of the zoo."""

    name: str
    meant: str
    value: float
    threshold: float
    caught: bool
    also: tuple[str, ...]  # other checks that turned red
    remedy: str


# ---------------------------------------------------------------------------------------------- parts of the
# masks


class Before(nn.Module):
    """An encoder with a layer before it, which no declaration mentions."""

    def __init__(self, layer: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features, aux = self.encoder(self.layer(x))
        return features, aux


class Bent(nn.Module):
    """A head whose logits are changed afterwards."""

    def __init__(self, head: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head = head
        self.bits = head.bits
        self.change = change

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.change(self.head(features)[0])
        return logits, torch.tanh(logits), 1.0


class Mapped(nn.Module):
    """A function of the input as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class WakefulDropout(nn.Dropout):
    """Dropout that eval() does not put to sleep."""

    def train(self, mode: bool = True) -> WakefulDropout:
        super().train(True)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, self.p, training=True)


def rounded(x: Tensor, levels: int = 16) -> Tensor:
    """Few grey levels: the gradient is 0 everywhere."""
    return torch.round(x * levels) / levels


def gated(x: Tensor) -> Tensor:
    """A gate that follows the input, but not in the graph."""
    gate = torch.sigmoid(20.0 * (blurred(x) - x))
    return x * gate.detach()


def blurred(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def purified_aside(x: Tensor) -> Tensor:
    """A purifier whose author was afraid of running out of memory."""
    with torch.no_grad():
        return blurred(x)


def resized(x: Tensor) -> Tensor:
    """Another size at each call, and back."""
    side = int(torch.randint(max(4, x.shape[-1] // 2), x.shape[-1], ()))
    small = interpolate(x, (side, side), mode="bilinear", antialias=True)
    return interpolate(small, x.shape[-2:], mode="bilinear")


def noisy(x: Tensor) -> Tensor:
    return x + 0.2 * torch.randn_like(x)


def jpeg(x: Tensor, quality: int = 30) -> Tensor:
    """Real JPEG files, written and read again; no gradient survives."""
    made = []
    for image in (x.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        made.append(torch.from_numpy(np.array(Image.open(file))))
    return (torch.stack(made).permute(0, 3, 1, 2).to(x) / 255).contiguous()


def descended(x: Tensor) -> Tensor:
    """Purification by a gradient step of its own on the total variation, inside the forward pass."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        roughness = (leaf.diff(dim=2) ** 2).sum() + (leaf.diff(dim=3) ** 2).sum()
        (grad,) = torch.autograd.grad(roughness, leaf)
    return x - 0.02 * grad


def broken_root(x: Tensor) -> Tensor:
    """Adds sqrt(0), whose gradient is infinite twice, with opposite signs."""
    return x + torch.sqrt(x - x)


def cancelled(logits: Tensor) -> Tensor:
    """Arithmetic that float32 does not survive."""
    size = 1e7 * logits.detach().abs().amax()
    return (logits + size) - size


def collapsed(logits: Tensor) -> Tensor:
    return logits.abs() + 1.0


def scaled(logits: Tensor) -> Tensor:
    return logits * 1e6


@dataclass(frozen=True)
class Backwards(Loss):
    """An objective that falls where the attack succeeds."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return -ScaleFree()(probe, guidance)


@dataclass(frozen=True)
class Forgetful(Search):
    """A search that steps along the gradient and forgets the ball."""

    reach: float = 4.0

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> SearchResult:
        origin = batch.only(threat.balls).inputs
        leaves = {name: value.clone().requires_grad_(True) for name, value in origin.items()}
        value, _ = score(leaves, 1.0)
        grads = dict(zip(leaves, torch.autograd.grad(value.sum(), list(leaves.values())), strict=True))
        way = threat.steepest(grads)
        beyond = {n: (v + self.reach * threat.balls[n].eps * way[n]).clamp(0, 1) for n, v in origin.items()}
        return SearchResult(beyond, value.detach().mean().reshape(1), 1, 1)


# ---------------------------------------------------------------------------------------------- the members


def rebuilt(
    context: EvaluationContext, victim: Hasher | None = None, data: RetrievalData | None = None
) -> EvaluationContext:
    """The same context of another victim or another database, encoded anew; the queries stay those of the
    context."""
    return make_context(
        victim or context.victim,
        replace(data or context.data, query=context.queries),
        context.protocol,
        direction=context.direction,
        seed=context.seed,
        batch_size=context.batch_size,
    )


def _layer(make: Callable[[], nn.Module]) -> Callable[[EvaluationContext], EvaluationContext]:
    """A layer before every image encoder."""

    def apply(context: EvaluationContext) -> EvaluationContext:
        old = context.victim
        encoders = {n: Before(make(), e) if n == "image" else e for n, e in old.encoders.items()}
        return rebuilt(context, _remade(old, encoders, dict(old.heads), old.declared))

    return apply


def _function(function: Callable[[Tensor], Tensor]) -> Callable[[EvaluationContext], EvaluationContext]:
    return _layer(lambda: Mapped(function))


def _head(change: Callable[[Tensor], Tensor]) -> Callable[[EvaluationContext], EvaluationContext]:
    def apply(context: EvaluationContext) -> EvaluationContext:
        old = context.victim
        heads: dict[str, nn.Module] = {name: Bent(head, change) for name, head in old.heads.items()}
        return rebuilt(context, _remade(old, dict(old.encoders), heads, old.declared))

    return apply


def _remade(
    old: Hasher, encoders: dict[str, nn.Module], heads: dict[str, nn.Module], declared: str
) -> Hasher:
    """A hasher that shares all other modules; in eval mode, on the same device."""
    made = Hasher(encoders, heads, old.spec, declared, dict(old.purifiers), old.sides)
    return made.to(old.device).eval()


def _misdeclared(context: EvaluationContext) -> EvaluationContext:
    old = context.victim
    claimed = "randomised" if old.declared != "randomised" else "plain"
    return replace(context, victim=_remade(old, dict(old.encoders), dict(old.heads), claimed))


def _mislabelled(context: EvaluationContext) -> EvaluationContext:
    """Queries with the labels of their neighbours, so that AP is low and an attack of the wrong sign raises
    it."""
    if context.queries.labels is None:
        raise ValueError("the queries have no labels; the zoo needs them")
    return replace(context, queries=replace(context.queries, labels=context.queries.labels.roll(1, 0)))


def _stale(context: EvaluationContext) -> EvaluationContext:
    """Clean codes of a model that is no longer there."""
    codes = -context.query.signs()
    return replace(context, query=Codes(pack(codes), context.query.bits, context.query.ids))


def _leaked(context: EvaluationContext) -> EvaluationContext:
    """The database holds the queries too, from files that were saved anew, so that their hashes differ."""
    query, database = context.data.query, context.data.database
    renamed = np.array([content[::-1] for content in query.hashes], dtype="S16")
    labels = None
    if query.labels is not None and database.labels is not None:
        labels = torch.cat([database.labels, query.labels])
    rows = torch.arange(len(database) + len(query))
    both = Split(
        "database", _Joined(database, query), rows, labels, np.concatenate([database.hashes, renamed])
    )
    return rebuilt(context, data=replace(context.data, database=both))


@dataclass(frozen=True)
class _Joined:
    """The items of two splits, one after the other."""

    first: Split
    second: Split

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def inputs(self, rows: Tensor) -> Inputs:
        late = rows >= len(self.first)
        parts = [(rows[~late], self.first), (rows[late] - len(self.first), self.second)]
        found = [split.batch(chosen).inputs for chosen, split in parts if len(chosen)]
        order = torch.cat([torch.nonzero(~late), torch.nonzero(late)]).flatten().argsort()
        return {name: torch.cat([part[name] for part in found])[order] for name in found[0]}

    def hashes(self) -> np.ndarray:
        return np.concatenate([self.first.hashes, self.second.hashes])


ZOO: tuple[Masked, ...] = (
    Masked("random resizing", "F1", _function(resized)),
    Masked("rounding layer", "F2", _function(rounded)),
    Masked("purifier under no_grad", "F2", _function(purified_aside)),
    Masked("logits times 1e6, published tanh attack", "F2", _head(scaled), Agreement()),
    Masked("gradient is NaN", "F3", _function(broken_root)),
    Masked("objective of the wrong sign", "F10", _mislabelled, Backwards()),
    Masked("real JPEG in the forward pass", "F13", _function(jpeg)),
    Masked("gate cut from the graph", "F14", _function(gated)),
    Masked("gradient steps inside the forward pass", "F15", _function(descended)),
    Masked("cancelling arithmetic", "F16", _head(cancelled)),
    Masked("collapsed codes", "F17", _head(collapsed)),
    Masked("dropout in train mode", "F19", _layer(lambda: WakefulDropout(0.3))),
    Masked("inputs normalised twice", "F20", _layer(lambda: Normalise(*IMAGENET))),
    Masked("queries leaked into the database", "F21", _leaked),
    Masked("clean codes of another model", "F22", _stale),
    Masked("noise at inference, declared plain", "F23", _function(noisy)),
    Masked("a class that it is not", "F23", _misdeclared),
)


def calibrate(
    context: EvaluationContext,
    threat: Threat,
    *,
    queries: int = 40,
    steps: int = 30,
    members: tuple[Masked, ...] = ZOO,
) -> tuple[Calibrated, ...]:
    """Mask the victim of a context in every way, and see whether the check meant for it turns red.

    The last row is the attack that forgets the ball, which no check but the evaluator's own verification
    catches.

    Raises:
        ValueError: a context whose queries are not images (B, 3, H, W); the masks are of images.
    """
    shape = context.queries.batch(torch.zeros(1, dtype=torch.int64)).inputs[context.direction[0]].shape
    if context.direction[0] != "image" or len(shape) != 4:
        raise ValueError(
            f"the zoo masks images (B, 3, H, W); these are {context.direction[0]} queries {tuple(shape)}"
        )
    context = context.some(queries)
    found = []
    for member in members:
        with keyed_noise(context.seed, context.victim.device):  # random masks take from torch's own stream
            flags = model_checks(member.apply(context), threat, member.loss, queries=queries, steps=steps)
        found.append(_calibrated(member, flags))
    return (*found, _forgetful(context, threat))


def _calibrated(member: Masked, flags: tuple[Flag, ...]) -> Calibrated:
    (meant,) = [flag for flag in flags if flag.id == member.meant]
    also = tuple(flag.id for flag in flags if flag.level == "red" and flag.id != member.meant)
    caught = meant.level == "red"
    return Calibrated(member.name, member.meant, meant.value, meant.threshold, caught, also, meant.remedy)


def _forgetful(context: EvaluationContext, threat: Threat) -> Calibrated:
    threat = Threat({"image": threat.balls["image"]}, "W2")
    attack = Attack("forgetful", Mainstay(), Agreement(), Forgetful(), threat)
    batch = context.batch(0)
    output = attack(
        context.victim, batch, Goal(batch.labels, -1), context.known(attack), draws=Draws(context.seed)
    )
    ball = threat.balls["image"]
    reached = float(ball.size(output.inputs["image"] - batch.inputs["image"]).max())
    try:
        threat.verify(output.inputs, batch.inputs)
    except ValueError as refused:
        return Calibrated("attack that forgets the ball", "verify", reached, ball.eps, True, (), str(refused))
    return Calibrated("attack that forgets the ball", "verify", reached, ball.eps, False, (), "")


def toy_context(*, bits: int = 32, width: int = 8, epochs: int = 20, hardening: int = 3) -> EvaluationContext:
    """A small model, trained by CSQ and then hardened by SAAT, on the generated world: about ten seconds.

    It is hardened for half of the budget that is attacked, so that an attack still moves its AP and can be
    judged.
    """
    data = load_data("synthetic", seed=0)
    hasher = build_hasher(bits=bits, image={"name": "small", "width": width})
    config = TrainConfig(epochs=epochs, batch_size=32, optim={"hasher": OptimConfig(lr=0.05)}, device="cpu")
    fit(HashingRecipe(hasher, CSQ()), data, config)
    inner = mainstay(eps=4 / 255, steps=2, step_size=2.67 / 255, slope="one")
    harder = TrainConfig(
        epochs=hardening, batch_size=32, optim={"hasher": OptimConfig(lr=0.02)}, device="cpu"
    )
    fit(AdversarialTraining(hasher, CSQ(), inner, SAATOuter()), data, harder)
    return make_context(hasher, data, batch_size=64)


def as_markdown(rows: tuple[Calibrated, ...]) -> str:
    """The calibration as a Markdown table."""
    lines = [
        "| masked by | check meant | value | threshold | caught | also red |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            row.name,
            row.meant,
            f"{row.value:.4g}",
            f"{row.threshold:.4g}",
            "yes" if row.caught else "**no**",
        ]
        lines.append(f"| {' | '.join([*cells, ', '.join(row.also)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    victim, budget = toy_context(), threat_on(knowledge="W2")
    sys.stdout.write(f"{as_markdown(calibrate(victim, budget, queries=32, steps=50))}\n\n")
    red = [flag.id for flag in model_checks(victim, budget, queries=32, steps=100) if flag.level == "red"]
    sys.stdout.write(f"the honest model: {', '.join(red) or 'no red check'}\n")
