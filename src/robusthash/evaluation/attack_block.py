"""Attack a block of queries and encode what comes back: the expensive part of an evaluation, kept block by
block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.attacks.budgets import binary
from robusthash.attacks.threat_model import Threat
from robusthash.core.hamming import sign
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Inputs
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.distortion import (
    image_measures,
    legacy_matrix_norms,
    pixel_norms,
    text_measures,
    vector_norms,
)
from robusthash.models.hasher import Hasher, frozen

_SSIM_WINDOW = 11


@dataclass(frozen=True)
class Attacked:
    """Attacked queries: their codes, what was changed and what it cost. T goals a query: 1, or its targets.

    ``codes_8bit`` are the codes of the inputs with the change rounded towards zero to multiples of 1/255;
    ``whole_words`` those of attacked bags rounded to 0 and 1, as a text has them.
    """

    signs: Tensor  # (B, T, K) int8
    codes_8bit: Tensor  # (B, T, K) int8
    representative: Tensor  # (B, T, K) int8 signed guidance codes; (B, T, 0) where the attack has none
    pixels: dict[str, Tensor]  # (B, T) perceptibility by measure: of pixels, or of the entries of a text
    passes: Tensor  # (B, 3) int64 forward and backward passes and oracle questions of the query, over all T
    seconds: Tensor  # (B,) share of the block's time
    inputs: Tensor  # (B, ...) float32 attacked inputs of the first goal
    whole_words: Tensor  # (B, T, K) int8; (B, T, 0) where queries are no bags of words
    fitted: Tensor  # (B,) int64 steps that the attack was fitted with to the victim, before all queries

    @property
    def stored(self) -> dict[str, Tensor]:
        """Codes of the inputs as pictures and texts are kept, by the ending of the measure that is taken of
        them."""
        words = {"/rounded": self.whole_words} if self.whole_words.shape[2] else {}
        return {"/8bit": self.codes_8bit, **words}

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a file."""
        plain = {f.name: getattr(self, f.name).numpy() for f in fields(self) if f.name != "pixels"}
        return {**plain, **{f"pixels/{name}": values.numpy() for name, values in self.pixels.items()}}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> Attacked:
        """The inverse of ``arrays``; files of earlier versions know no whole words and no steps of
        fitting."""
        plain = {name: torch.from_numpy(value) for name, value in arrays.items()}
        plain.setdefault("whole_words", plain["signs"][..., :0])
        plain.setdefault("fitted", torch.zeros(len(plain["signs"]), dtype=torch.int64))
        pixels = {
            name.removeprefix("pixels/"): plain.pop(name)
            for name in list(plain)
            if name.startswith("pixels/")
        }
        return Attacked(pixels=pixels, **plain)

    @staticmethod
    def join(blocks: Sequence[Attacked]) -> Attacked:
        """Blocks put end to end, with the measures that all have: a block kept by an older version has
        fewer."""
        bits = min(block.whole_words.shape[2] for block in blocks)  # 0 where some of them know none
        blocks = [replace(block, whole_words=block.whole_words[..., :bits]) for block in blocks]
        names = [f.name for f in fields(Attacked) if f.name != "pixels"]
        whole = {name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
        shared = [name for name in blocks[0].pixels if all(name in block.pixels for block in blocks)]
        pixels = {name: torch.cat([block.pixels[name] for block in blocks]) for name in shared}
        return Attacked(pixels=pixels, **whole)


@dataclass(frozen=True)
class Trial:
    """What one search over a block of queries came back with, for one goal."""

    inputs: Inputs  # attacked, by modality
    representative: Tensor  # (B, K) int8 code it steered to; (B, 0) where it followed none
    forward: int = 0  # passes of each query, and questions to an oracle
    backward: int = 0
    oracle: int = 0


def attack_block(
    context: EvaluationContext,
    attack: Attack,
    block: int,
    gradients: Hasher | None = None,
    restart: int = 0,
    start: Inputs | None = None,
) -> Attacked:
    """Attack one block of queries.

    Args:
        gradients: the model that the attack differentiates: the victim by default (adaptive white box); the
            bare hasher (oblivious), a surrogate (transfer), or a view of the victim with other gradients.
        restart: keys the draws; each after the first starts at random in the budget, unless ``start`` is
            given.
        start: feasible inputs to start from, such as the solution at a smaller budget.
    """
    batch = context.batch(block, attack.threat.balls)
    started, trials = time.perf_counter(), []
    for number, goal in enumerate(goals(context, attack.targeted, batch)):
        draws, begin = Draws(context.seed, ("attack", str(number))), start
        if restart:
            draws = draws.within("restart", restart)
            origin = batch.only(attack.threat.balls).inputs
            begin = start or attack.threat.random_start(origin, batch.ids, draws)
        # one pair of image and text serves every direction, so no direction's AP may choose it
        chooses = attack.selects and goal.labels is not None and len(attack.threat.balls) == 1
        select = context.select(goal.labels, goal.sign) if chooses and goal.labels is not None else None
        known = context.known(attack)
        output = attack(
            gradients or context.victim, batch, goal, known, draws=draws, select=select, start=begin
        )
        steered = _representative(output.guidance, goal.sign, len(batch))
        trials.append(Trial(output.inputs, steered, output.forward, output.backward))
    return finish(context, attack.threat, batch, trials, time.perf_counter() - started, attack.fit_steps)


def finish(
    context: EvaluationContext,
    threat: Threat,
    batch: Batch,
    trials: Sequence[Trial],
    seconds: float,
    fit_steps: int = 0,
) -> Attacked:
    """What the evaluator, not the attack, does with attacked queries: whatever searched for them ends here.

    It projects again, verifies the budget, and encodes in fresh eval-mode passes: as found, in eight bits,
    and bags of words in whole words.

    Args:
        batch: the clean block.
        trials: one for each goal, as ``goals`` orders them.
        seconds: that the search took.
        fit_steps: that what the attack learns was fitted with.
    """
    modality = context.direction[0]
    origin = batch.inputs[modality]
    signs, codes_8bit, whole_words, pixels = [], [], [], []
    first = origin
    for number, trial in enumerate(trials):
        attacked = threat.project(trial.inputs, batch.inputs)
        threat.verify({**batch.inputs, **attacked}, batch.inputs)
        signs.append(encode_signs(context.victim, modality, attacked[modality]))
        if modality == "image" and origin.ndim == 4:
            codes_8bit.append(encode_signs(context.victim, modality, in_8bit(origin, attacked[modality])))
        else:  # only pixels are stored in eight bits
            codes_8bit.append(signs[-1])
        whole_words.append(_of_whole_words(context.victim, modality, origin, attacked[modality], signs[-1]))
        pixels.append(_changes(modality, origin.cpu(), attacked[modality].cpu()))
        first = attacked[modality] if number == 0 else first
    passes = torch.tensor([[trial.forward, trial.backward, trial.oracle] for trial in trials]).sum(
        0, keepdim=True
    )
    return Attacked(
        torch.stack(signs, 1),
        torch.stack(codes_8bit, 1),
        torch.stack([trial.representative for trial in trials], 1),
        {name: torch.stack([p[name] for p in pixels], 1) for name in pixels[0]},
        passes.repeat(len(batch), 1),
        torch.full((len(batch),), seconds / len(batch)),
        first.cpu(),
        torch.stack(whole_words, 1),
        torch.full((len(batch),), fit_steps),
    )


def _of_whole_words(victim: Hasher, modality: str, clean: Tensor, attacked: Tensor, signs: Tensor) -> Tensor:
    """(B, K) codes of attacked bags rounded to 0 and 1; ``signs`` where they are that already; (B, 0) of no
    bags.

    A text has no part of a word: what rounding undoes is an attack on the representation alone.
    """
    if modality != "text" or clean.ndim != 2 or not clean.is_floating_point() or not binary(clean):
        return signs[:, :0]
    rounded = attacked.round()
    return signs if torch.equal(rounded, attacked) else encode_signs(victim, modality, rounded)


def in_8bit(clean: Tensor, attacked: Tensor) -> Tensor:
    """(B, 3, H, W) pictures whose change is rounded towards zero to whole levels of 1/255."""
    change = (attacked - clean) * 255
    # a change of 8/255 is 7.99999 in floats, and is meant to stay 8
    return clean + (change + 1e-3 * change.sign()).trunc() / 255


def _changes(modality: str, clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """(B,) measures of what was changed, by the modality's own yardsticks."""
    if modality != "image":
        return text_measures(clean, attacked)
    if clean.ndim == 2:  # features in place of pixels
        return vector_norms(clean, attacked)
    measures = image_measures if min(clean.shape[-2:]) >= _SSIM_WINDOW else pixel_norms
    return {**measures(clean, attacked), **legacy_matrix_norms(clean, attacked)}


def goals(context: EvaluationContext, targeted: bool, batch: Batch) -> list[Goal]:
    """Away from the own labels, or towards each target.

    A query without a possible target keeps its own labels as a stand-in, so that the batch stays whole; it is
    left out when scored.
    """
    if not targeted:
        return [Goal(batch.labels, -1)]
    own = context.query_labels.to(batch.ids.device)[batch.ids]
    targets = context.targets.to(batch.ids.device)[batch.ids]
    filled = torch.where(targets.sum(2, keepdim=True) > 0, targets, own[:, None])
    return [Goal(filled[:, number], +1) for number in range(filled.shape[1])]


def _representative(guidance: Guidance, goal_sign: int, queries: int) -> Tensor:
    """(B, K) int8 code that the attack steers to; (B, 0) where it follows none."""
    codes = guidance.codes if guidance.weights is None else guidance.weights @ guidance.codes
    if len(codes) != queries:
        return torch.empty(queries, 0, dtype=torch.int8)
    return sign(goal_sign * codes).to("cpu", torch.int8)


def encode_signs(victim: Hasher, modality: str, inputs: Tensor) -> Tensor:
    """(B, K) int8 codes of inputs of one modality, in a fresh eval-mode pass."""
    with frozen(victim), torch.no_grad():
        return sign(victim({modality: inputs})[modality].logits).to("cpu", torch.int8)
