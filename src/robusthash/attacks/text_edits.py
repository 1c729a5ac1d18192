"""Greedy edits of texts: words inserted into or removed from bags of words, tokens swapped for near ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robusthash.attacks.base import Attack, Score, Search, SearchResult, Select, Start
from robusthash.attacks.budgets import Candidates, Edits, Swaps
from robusthash.attacks.pgd import Selection, ascend, no_gradient, starting_point
from robusthash.attacks.threat_model import Threat, edit_threat
from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher
from robusthash.objectives.base import HashObjective

_TEXTS = 4096  # training texts read at a time
_TOKENS = 1024  # compared with all others at a time

Gains = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""(texts, progress) -> (B,) score, (B, K) logits, (B, M) first-order gain of edits, -inf if not allowed."""


def greedy(
    score: Score,
    x: Tensor,
    gains: Gains,
    edit: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    width: int,
    select: Select | None,
) -> SearchResult:
    """One edit a step: of the ``width`` of largest gain the one of highest score, where it raises the score.

    Args:
        x: (B, ...) texts to start from.
        edit: (texts, (B,) numbers of edits) -> edited texts, a new tensor.
    """
    rows = torch.arange(len(x), device=x.device)
    trace, selection = [], Selection(select)
    for step in range(steps):
        progress = step / steps
        value, logits, gain = gains(x, progress)
        trace.append(value.mean())
        selection.offer(logits, {"text": x})
        order = gain.argsort(dim=1, descending=True, stable=True)[:, :width]
        highest, best = value, x
        for column in order.T:
            edited = edit(x, column)
            with torch.no_grad():
                reached = score({"text": edited}, progress)[0]
            better = (reached > highest) & gain[rows, column].isfinite()
            highest = torch.where(better, reached, highest)
            best = torch.where(better[:, None], edited, best)
        x = best
    inputs, extra = selection.conclude(score, {"text": x})
    return SearchResult(inputs, torch.stack(trace), steps * (1 + width) + extra, steps)


@register("attack-search", "greedy-flips")
@dataclass(frozen=True)
class GreedyFlips(Search):
    """One flip a step: the gradient ranks all feasible flips, and the best of the first few is taken.

    By first order a flip of entry j gains grad_j (1 - 2 x_j). Of the ``candidates`` of largest gain the one
    of highest true score is taken where it raises the score; otherwise the item stays as it is. An earlier
    flip may be taken back. There are as many steps as edits; nothing is drawn, and ties go to the earlier
    word.
    """

    candidates: int = 8
    edits = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        origin, budget = batch.inputs["text"], _words(threat, "greedy flips").count
        x = threat.project(starting_point(batch, threat, draws, start), {"text": origin})["text"]
        rows = torch.arange(len(x), device=x.device)

        def gains(x: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
            value, logits, grad = ascend(score, {"text": x}, progress)
            changed = x != origin
            feasible = changed | (changed.sum(1, keepdim=True) < budget)
            return value, logits, (grad["text"] * (1.0 - 2.0 * x)).masked_fill(~feasible, -torch.inf)

        def flip(x: Tensor, column: Tensor) -> Tensor:
            flipped = x.clone()
            flipped[rows, column] = 1.0 - flipped[rows, column]
            return flipped

        width = min(self.candidates, origin.shape[1])
        return greedy(score, x, gains, flip, max(1, budget), width, select)


@register("attack-search", "exact-flips", modality="text", evidence="own")
@dataclass(frozen=True)
class ExactFlips(Search):
    """Every word is tried and the edit of lowest AP taken; then one edit is exchanged at a time.

    For attackers who know the database and may pass any number of texts through their copy of the model. Of
    equal AP the text of higher score is taken, so that a flat metric is left behind; ties go to the earlier
    word. A search ends where no text of the block improves. Greedy, so a lower bound on what m edits can do.

    Args:
        exchanges: rounds after the edits are spent, in each of which every edit is taken back once and every
            word tried in its place.
    """

    exchanges: int = 2
    edits = True
    by_gradient = False

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        budget = _words(threat, "exact flips").count
        if select is None:
            raise ValueError("exact flips choose by the reported metric: give the attack selects=True and W2")
        origin, forward = batch.inputs["text"], 0
        x = threat.project(starting_point(batch, threat, draws, start), {"text": origin})["text"]
        trace: list[Tensor] = []

        def rated(x: Tensor) -> Tensor:
            """(B, 2) reported metric and score, compared in this order."""
            nonlocal forward
            forward += 1
            with torch.no_grad():
                value, logits = score({"text": x}, 1.0)
            return torch.stack([select(logits).double(), value.double()], 1)

        highest = rated(x)
        for number in range(budget + self.exchanges):
            bases = [x] if number < budget else [_without(x, origin, place) for place in range(budget)]
            before, best = highest, x
            for base in bases:
                for column in range(x.shape[1]):
                    candidate = base.clone()
                    candidate[:, column] = 1.0 - candidate[:, column]
                    rating = rated(candidate)
                    allowed = (candidate != origin).sum(1) <= budget
                    better = allowed & _higher(rating, highest)
                    highest = torch.where(better[:, None], rating, highest)
                    best = torch.where(better[:, None], candidate, best)
            x = best
            trace.append(highest[:, 1].mean())
            if torch.equal(highest, before):
                break
        return SearchResult({"text": x}, torch.stack(trace), forward)


def _words(threat: Threat, search: str) -> Edits:
    budget = threat.balls.get("text")
    if len(threat.balls) != 1 or not isinstance(budget, Edits):
        raise ValueError(f"{search} search edits of texts alone, not {threat.name}")
    return budget


def _without(x: Tensor, origin: Tensor, place: int) -> Tensor:
    """(B, V) texts with edit number ``place`` of each, counted from its first word, taken back."""
    changed = x != origin
    return torch.where(changed & (changed.cumsum(1) == place + 1), origin, x)


def _higher(left: Tensor, right: Tensor) -> Tensor:
    """(B,) bool: (B, 2) ratings are higher, the second column deciding between equals."""
    equal = left[:, 0] == right[:, 0]
    return (left[:, 0] > right[:, 0]) | (equal & (left[:, 1] > right[:, 1]))


@register("attack", "text-edits", modality="text")
def text_edits(
    objective: HashObjective, like: str | Mapping[str, Any] = "mainstay", edits: int = 3, candidates: int = 8
) -> Attack:
    """Edit a few words of each text, with the guide and the loss of any other attack: ``like: dhta``.

    Ours; no paper attacks the words themselves. Greedy, so a lower bound on what m edits can do; alpha is 1.

    Args:
        like: an attack by name or settings, whose guide, loss, goal and knowledge are taken over.
        edits: m, words inserted or removed at most.
        candidates: flips tried exactly for each edit.
    """
    model: Attack = build("attack", like, objective=objective)
    threat = edit_threat(edits, model.threat.knowledge)
    return replace(model, name="text-edits", search=GreedyFlips(candidates), threat=threat, slope="one")


def embedding_of(victim: Hasher) -> nn.Module:
    """The module of a victim that looks its tokens up."""
    encoder = dict(victim.encoders).get("text")
    embedding = getattr(encoder, "embedding", None)
    if not isinstance(embedding, nn.Module):
        kind = type(encoder).__name__ if encoder is not None else "nothing"
        raise ValueError(
            "token swaps need a text encoder that looks tokens up, such as 'transformer', and this hasher "
            f"encodes texts by {kind}"
        )
    return embedding


def usable_tokens(victim: Hasher, data: RetrievalData) -> Tensor:
    """(V,) bool: tokens inside training texts; never padding, [CLS] or [SEP]."""
    encoder = victim.encoders["text"]
    padding, words = int(encoder.padding), int(encoder.words)  # type: ignore[arg-type]
    inside, frame = torch.zeros(words, dtype=torch.bool), torch.zeros(words, dtype=torch.bool)
    frame[padding] = True
    for rows in torch.arange(len(data.train)).split(_TEXTS):
        ids = data.train.batch(rows).only({"text"}).inputs["text"]
        last = ((ids != padding).cumsum(1)).argmax(1)  # the first place of the full count: the last token
        inside[ids.flatten()] = True
        frame[ids[:, 0]] = True
        frame[ids.gather(1, last[:, None]).flatten()] = True
    return inside & ~frame


def nearest_tokens(embedding: Tensor, usable: Tensor, k: int = 8) -> Candidates:
    """The ``k`` nearest usable tokens of each usable token by cosine; ties go to the lower id.

    Args:
        embedding: (V, D) the model's own table.
        usable: (V,) bool; the other tokens are neither replaced nor put in.
    """
    count = int(usable.sum())
    if not 1 <= k < count:
        raise ValueError(f"{k} candidates a token need more than {max(k, 1)} usable tokens, not {count}")
    unit = nn.functional.normalize(embedding.detach().to("cpu", torch.float64), dim=1)
    ids = torch.nonzero(usable.cpu()).flatten()
    table = torch.arange(len(embedding))[:, None].repeat(1, k)
    for rows in ids.split(_TOKENS):
        alike = unit[rows] @ unit[ids].T
        alike[rows[:, None] == ids[None]] = -torch.inf
        table[rows] = ids[alike.argsort(dim=1, descending=True, stable=True)[:, :k]]
    return Candidates(table)


@register(
    "attack-search", "greedy-swaps", paper="Ebrahimi et al., ACL 2018 (HotFlip)", evidence="reconstruction"
)
@dataclass(frozen=True)
class GreedySwaps(Search):
    """One swap a step: the gradient ranks all feasible swaps, and the best of the first few is taken.

    By first order, putting c in the place of v gains grad . (e_c - e_v) at its embedding. Otherwise as
    ``GreedyFlips``; an earlier swap may be changed or taken back.

    Differs: HotFlip searches by beam over characters; here it is greedy, over the candidates of each token.

    Args:
        victim: whose embeddings are differentiated; set by ``with_victim``, and no part of the identity.
    """

    candidates: int = 8
    victim: Hasher | None = field(default=None, compare=False, repr=False)
    edits = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")

    def bound(self, threat: Threat, victim: Hasher, data: RetrievalData) -> Threat:
        """The threat with the candidates of each token, from the victim's own embeddings."""
        swaps = _swaps(threat)
        if swaps.candidates is not None:
            return threat
        table = next(embedding_of(victim).parameters())
        candidates = nearest_tokens(table, usable_tokens(victim, data), swaps.k)
        return replace(threat, balls={"text": replace(swaps, candidates=candidates)})

    def with_victim(self, victim: Hasher) -> GreedySwaps:
        """The search that differentiates at the embeddings of this victim."""
        return replace(self, victim=victim)

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        if self.victim is None:
            raise ValueError("greedy swaps need a victim's embeddings: call with_victim(victim) first")
        embedding, swaps, origin = embedding_of(self.victim), _swaps(threat), batch.inputs["text"]
        x = threat.project(starting_point(batch, threat, draws, start), {"text": origin})["text"]
        options = torch.cat(
            [swaps.allowed(origin), origin[:, :, None]], 2
        )  # (B, L, k + 1), the last takes back
        rows = torch.arange(len(x), device=x.device)

        def gains(x: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
            value, logits, grad = _ascend_tokens(score, embedding, x, progress)
            changed = x != origin
            room = changed | (changed.sum(1, keepdim=True) < swaps.count)
            feasible = room[:, :, None] & (options != x[:, :, None])
            with torch.no_grad():  # one option of all places at a time, which bounds the memory
                here = (grad * embedding(x)).sum(2)
                gain = [(grad * embedding(option)).sum(2) - here for option in options.unbind(2)]
            return value, logits, torch.stack(gain, 2).masked_fill(~feasible, -torch.inf).flatten(1)

        def swap(x: Tensor, column: Tensor) -> Tensor:
            place = column // options.shape[2]
            swapped = x.clone()
            swapped[rows, place] = options[rows, place, column % options.shape[2]]
            return swapped

        width = min(self.candidates, options[0].numel())
        return greedy(score, x, gains, swap, max(1, swaps.count), width, select)


def _swaps(threat: Threat) -> Swaps:
    swaps = threat.balls.get("text")
    if len(threat.balls) != 1 or not isinstance(swaps, Swaps):
        raise ValueError(f"greedy swaps search swaps of tokens alone, not {threat.name}")
    return swaps


def _ascend_tokens(
    score: Score, embedding: nn.Module, ids: Tensor, progress: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, logits and (B, L, D) gradient of the score to the embeddings of the tokens."""
    leaves: list[Tensor] = []

    def as_leaf(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handle = embedding.register_forward_hook(as_leaf)
    try:
        value, logits = score({"text": ids}, progress)
    finally:
        handle.remove()
    if not leaves:
        raise ValueError("the score looks no token up, so nothing can be differentiated")
    if not value.requires_grad:
        raise no_gradient("text")
    # a score of several passes looks up several times, and its slope is the sum
    grad = torch.stack(torch.autograd.grad(value.sum(), leaves)).sum(0)
    if not (torch.isfinite(value).all() and torch.isfinite(grad).all()):
        raise FloatingPointError("the attack's score or its gradient is NaN or infinite")
    return value.detach(), logits.detach(), grad


@register("attack", "token-swaps", modality="tokens")
def token_swaps(
    objective: HashObjective,
    like: str | Mapping[str, Any] = "mainstay",
    swaps: int = 2,
    neighbours: int = 8,
    candidates: int = 8,
) -> Attack:
    """Swap a few tokens of each text, with the guide and the loss of any other attack: ``like: dhta``.

    Ours. Greedy, so a lower bound on what m swaps can do; alpha is 1. Near in the victim's own embedding
    table does not promise that the text still means the same to a reader.

    Args:
        like: an attack by name or settings, whose guide, loss, goal and knowledge are taken over.
        swaps: m, tokens changed at most.
        neighbours: k, candidates of each token, found when the attack is fitted to the victim.
        candidates: swaps tried exactly for each step.
    """
    model: Attack = build("attack", like, objective=objective)
    threat = Threat({"text": Swaps(swaps, neighbours)}, model.threat.knowledge)
    return replace(model, name="token-swaps", search=GreedySwaps(candidates), threat=threat, slope="one")
