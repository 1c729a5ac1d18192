"""Attacked blocks of queries: what a search found is projected, verified, encoded and measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from robusthash.attacks.base import Attack, SearchResult
from robusthash.attacks.budgets import binary
from robusthash.attacks.threat_model import Threat
from robusthash.core.hamming import sign
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Inputs
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.distortion import (
    image_measures,
    legacy_matrix_norms,
    pixel_norms,
    text_measures,
    vector_norms,
)
from robusthash.metrics.measure_key import Storage
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher

_SSIM_WINDOW = 11


@dataclass(frozen=True)
class AttackedBlock:
    """Attacked queries: their codes, their changes and the cost. T goals a query: 1, or its targets.

    Codes are signs, or float32 vectors of a victim that is searched by those.

    ``codes_8bit`` are the codes of the inputs with the change rounded towards zero to multiples of 1/255;
    ``whole_words`` those of attacked bags of words rounded to 0 and 1, as a text has them.
    """

    signs: Tensor  # (B, T, K)
    codes_8bit: Tensor  # (B, T, K)
    representative: Tensor  # (B, T, K) int8 codes that the attack steers to; (B, T, 0) where it has none
    pixels: dict[str, Tensor]  # (B, T) perceptibility by measure: of pixels, or of the entries of a text
    passes: Tensor  # (B, 3) int64 forward and backward passes and oracle queries of each query, over all T
    seconds: Tensor  # (B,) share of the block's time
    inputs: Tensor  # (B, ...) float32 attacked inputs of the first goal
    whole_words: Tensor  # (B, T, K) int8; (B, T, 0) where queries are no bags of words
    fitted: Tensor  # (B,) int64 steps that the attack was fitted with to the victim, before all queries
    learned: Tensor  # (B, 2) int64 oracle queries and training items that this fit took

    @property
    def stored(self) -> dict[Storage, Tensor]:
        """Codes of the inputs as files hold them, by ``MeasureKey.storage``."""
        words: dict[Storage, Tensor] = {"rounded": self.whole_words} if self.whole_words.shape[2] else {}
        return {"8bit": self.codes_8bit, **words}

    @property
    def fit_note(self) -> tuple[str, ...]:
        """A line on what the attack was fitted with before its first query; none where nothing learns."""
        steps, (queries, items) = int(self.fitted.max()), self.learned.amax(0).tolist()
        if not steps:
            return ()
        needs = f", on {items} training items" * bool(items)
        needs += f", by {queries} oracle queries" * bool(queries)
        return (f"{'learned' if needs else 'fitted to the victim'} in {steps} steps{needs}",)

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a file."""
        plain = {f.name: getattr(self, f.name).numpy() for f in fields(self) if f.name != "pixels"}
        return {**plain, **{f"pixels/{name}": values.numpy() for name, values in self.pixels.items()}}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> AttackedBlock:
        """The inverse of ``arrays``.

        Files of earlier versions call ``codes_8bit`` eight_bit, and lack oracle queries, words, fitting
        and what it took.
        """
        plain = {name: torch.from_numpy(value) for name, value in arrays.items()}
        if "eight_bit" in plain:
            plain["codes_8bit"] = plain.pop("eight_bit")
        plain["passes"] = pad(plain["passes"], (0, 3 - plain["passes"].shape[1]))
        plain.setdefault("whole_words", plain["signs"][..., :0])
        plain.setdefault("fitted", torch.zeros(len(plain["signs"]), dtype=torch.int64))
        plain.setdefault("learned", torch.zeros(len(plain["signs"]), 2, dtype=torch.int64))
        measures = [name for name in plain if name.startswith("pixels/")]
        pixels = {name.removeprefix("pixels/"): plain.pop(name) for name in measures}
        return AttackedBlock(pixels=pixels, **plain)

    @staticmethod
    def join(blocks: Sequence[AttackedBlock]) -> AttackedBlock:
        """Blocks put end to end, with the measures that all have; older versions stored fewer."""
        bits = min(block.whole_words.shape[2] for block in blocks)  # 0 where some of them know none
        blocks = [replace(block, whole_words=block.whole_words[..., :bits]) for block in blocks]
        names = [f.name for f in fields(AttackedBlock) if f.name != "pixels"]
        joined = {name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
        shared = [name for name in blocks[0].pixels if all(name in block.pixels for block in blocks)]
        pixels = {name: torch.cat([block.pixels[name] for block in blocks]) for name in shared}
        return AttackedBlock(pixels=pixels, **joined)


def attack_block(
    context: EvaluationContext,
    attack: Attack,
    block: int,
    gradients: Hasher | None = None,
    restart: int = 0,
    start: Inputs | None = None,
) -> AttackedBlock:
    """Attack one block of queries.

    Args:
        gradients: the model that the attack differentiates: the victim by default (adaptive white box); the
            bare hasher (oblivious), a surrogate (transfer), or a view of the victim with other gradients.
        restart: keys the draws; each after the first starts at random in the budget, unless ``start`` is
            given.
        start: feasible inputs to start from, such as the solution at a smaller budget.
    """
    batch, known = context.batch(block, attack.threat.balls), context.known(attack)
    started, outputs, representative = time.perf_counter(), list[SearchResult](), []
    for number, goal in enumerate(goals(context, attack.targeted, batch)):
        draws, begin = Draws(context.seed, ("attack", str(number))), start
        if restart:
            draws = draws.within("restart", restart)
            origin = batch.only(attack.threat.balls).inputs
            begin = start or attack.threat.random_start(origin, batch.ids, draws)
        select = None
        # one pair of image and text serves every direction, so no direction's AP may choose it
        if attack.selects and goal.labels is not None and len(attack.threat.balls) == 1:
            select = context.select(goal.labels, goal.sign)
        by = gradients or context.differentiated
        if by.distance != context.victim.distance:
            raise ValueError(
                f"the gradients are of a model that is searched by {by.distance} distance, and the victim is "
                f"searched by {context.victim.distance} distance"
            )
        outputs.append(attack(by, batch, goal, known, draws=draws, select=select, start=begin))
        representative.append(_representative(context, outputs[-1], goal.sign, len(batch)))
    seconds = time.perf_counter() - started
    return finish(
        context,
        attack.threat,
        batch,
        [output.inputs for output in outputs],
        seconds,
        passes=(sum(out.forward for out in outputs), sum(out.backward for out in outputs), 0),
        representative=torch.stack(representative, 1),
        fit=(attack.fit_steps, *attack.fit_uses),
    )


def _representative(context: EvaluationContext, output: SearchResult, goal_sign: int, queries: int) -> Tensor:
    """(B, K) int8 code that the attack steers to; (B, 0) where it follows none, or no code."""
    if context.victim.distance != "hamming":
        return torch.empty(queries, 0, dtype=torch.int8)
    guidance = output.guidance
    codes = guidance.codes if guidance.weights is None else guidance.weights @ guidance.codes
    if len(codes) != queries:
        return torch.empty(queries, 0, dtype=torch.int8)
    return sign(goal_sign * codes).to("cpu", torch.int8)


def goals(context: EvaluationContext, targeted: bool, batch: Batch) -> list[Goal]:
    """Away from the query's labels, or towards each target.

    A query without a possible target keeps its labels as a stand-in; scoring leaves it out.
    """
    if not targeted:
        return [Goal(batch.labels, -1)]
    labels = context.query_labels.to(batch.ids.device)[batch.ids]
    targets = context.targets.to(batch.ids.device)[batch.ids]
    filled = torch.where(targets.sum(2, keepdim=True) > 0, targets, labels[:, None])
    return [Goal(filled[:, number], +1) for number in range(filled.shape[1])]


def finish(
    context: EvaluationContext,
    threat: Threat,
    batch: Batch,
    results: Sequence[Inputs],
    seconds: float,
    *,
    passes: tuple[int, int, int] = (0, 0, 0),
    representative: Tensor | None = None,
    fit: tuple[int, int, int] = (0, 0, 0),
) -> AttackedBlock:
    """Project, verify and encode attacked queries. Every search ends here, in the evaluator's hands.

    Codes come from fresh eval-mode passes: of the inputs as they are, in 8-bit, and of bags in whole words.

    Args:
        batch: the clean block.
        results: attacked inputs, one set for each goal, as ``goals`` orders them.
        seconds: duration of the search.
        passes: forward passes, backward passes and oracle queries of each query, over all goals.
        representative: (B, T, K) codes that the attack steers to.
        fit: steps, oracle queries and training items that the learning part of the attack was fitted with.
    """
    modality = context.direction[0]
    origin = batch.inputs[modality]
    signs, codes_8bit, whole_words, pixels = [], [], [], []
    first = origin
    for number, result in enumerate(results):
        inputs = threat.project(result, batch.inputs)
        threat.verify({**batch.inputs, **inputs}, batch.inputs)
        attacked = inputs[modality]
        signs.append(encode_signs(context.victim, modality, attacked))
        if modality == "image" and origin.ndim == 4:  # only pixels are stored in 8-bit
            codes_8bit.append(encode_signs(context.victim, modality, in_8bit(origin, attacked)))
        else:
            codes_8bit.append(signs[-1])
        whole_words.append(_of_whole_words(context.victim, modality, origin, attacked, signs[-1]))
        pixels.append(_changes(modality, origin.cpu(), attacked.cpu()))
        first = attacked if number == 0 else first
    queries = len(batch)
    if representative is None:
        representative = torch.empty(queries, len(results), 0, dtype=torch.int8)
    return AttackedBlock(
        signs=torch.stack(signs, 1),
        codes_8bit=torch.stack(codes_8bit, 1),
        representative=representative,
        pixels={name: torch.stack([p[name] for p in pixels], 1) for name in pixels[0]},
        passes=torch.tensor([passes]).repeat(queries, 1),
        seconds=torch.full((queries,), seconds / queries),
        inputs=first.cpu(),
        whole_words=torch.stack(whole_words, 1),
        fitted=torch.full((queries,), fit[0]),
        learned=torch.tensor([fit[1:]]).repeat(queries, 1),
    )


def in_8bit(clean: Tensor, attacked: Tensor) -> Tensor:
    """(B, 3, H, W) pictures whose change is rounded towards zero to whole levels of 1/255."""
    change = (attacked - clean) * 255
    # a change of 8/255 is 7.99999 in floats, and is meant to stay 8
    return clean + (change + 1e-3 * change.sign()).trunc() / 255


def _of_whole_words(victim: Hasher, modality: str, clean: Tensor, attacked: Tensor, signs: Tensor) -> Tensor:
    """(B, K) codes of attacked bags rounded to 0 and 1; (B, 0) where queries are no bags of words.

    A text has no part of a word: a change that rounding undoes attacks the representation alone.
    """
    if modality != "text" or clean.ndim != 2 or not clean.is_floating_point() or not binary(clean):
        return signs[:, :0]
    rounded = attacked.round()
    return signs if torch.equal(rounded, attacked) else encode_signs(victim, modality, rounded)


def _changes(modality: str, clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """(B,) measures of the change, by the modality's own yardsticks."""
    if modality != "image":
        return text_measures(clean, attacked)
    if clean.ndim == 2:  # features in place of pixels
        return vector_norms(clean, attacked)
    measures = image_measures if min(clean.shape[-2:]) >= _SSIM_WINDOW else pixel_norms
    return {**measures(clean, attacked), **legacy_matrix_norms(clean, attacked)}
