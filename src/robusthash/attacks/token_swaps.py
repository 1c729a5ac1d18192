"""Attacks on token ids: a few tokens of a text swapped for near ones, ranked by the gradient at their
embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robusthash.attacks.base import Attack, Found, Score, Search, Select
from robusthash.attacks.pgd import _start
from robusthash.attacks.threat_model import Threat
from robusthash.attacks.token_budget import Swaps, nearest_tokens
from robusthash.attacks.word_edits import greedy
from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Inputs
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher
from robusthash.objectives.base import HashObjective

_READ = 4096  # training texts looked at together


def embedding_of(victim: Hasher) -> nn.Module:
    """The module of a victim that looks its tokens up.

    Raises:
        ValueError: a victim without texts, or whose text encoder takes no tokens.
    """
    encoder = dict(victim.encoders).get("text")
    found = getattr(encoder, "embedding", None)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"token swaps need a text encoder that looks tokens up, such as 'transformer', and this hasher encodes "
            f"texts by {type(encoder).__name__ if encoder is not None else 'nothing'}"
        )
    return found


def usable_tokens(victim: Hasher, data: RetrievalData) -> Tensor:
    """(V,) bool: tokens inside training texts. Never padding, nor what opens or closes a text ([CLS], [SEP]).

    So neither [MASK] nor an id that no text has is ever put in.
    """
    encoder = victim.encoders["text"]
    padding, words = int(encoder.padding), int(encoder.words)  # type: ignore[arg-type]
    inside, frame = torch.zeros(words, dtype=torch.bool), torch.zeros(words, dtype=torch.bool)
    frame[padding] = True
    for rows in torch.arange(len(data.train)).split(_READ):
        ids = data.train.batch(rows).only({"text"}).inputs["text"]
        last = ((ids != padding).cumsum(1)).argmax(1)  # the first place of the full count: the last token
        inside[ids.flatten()] = True
        frame[ids[:, 0]] = True
        frame[ids.gather(1, last[:, None]).flatten()] = True
    return inside & ~frame


@register(
    "attack-search", "greedy-swaps", paper="Ebrahimi et al., ACL 2018 (HotFlip)", evidence="reconstruction"
)
@dataclass(frozen=True)
class GreedySwaps:
    """One swap a step: the gradient ranks all feasible swaps, the best few are tried, and the best of them is
    kept.

    By first order, putting c in the place of v gains grad . (e_c - e_v) at its embedding. Of the
    ``candidates`` of largest gain the one of highest true score is taken where it raises the score; otherwise
    the text stays as it is. An earlier swap may be changed or taken back. There are as many steps as swaps
    allowed; nothing is drawn, and ties go to the earlier place.

    Differs: HotFlip searches by beam over characters; here it is greedy, over the candidates of each token.

    Args:
        candidates: swaps tried exactly in each step, one forward pass each.

    Raises:
        ValueError: no candidate, a threat of other budgets, or a victim that takes no tokens.
    """

    candidates: int = 8
    edits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")

    def bound(self, threat: Threat, victim: Hasher, data: RetrievalData) -> Threat:
        """The threat with the candidates of each token, from the victim's own embeddings; itself where it has
        them."""
        swaps = _swaps(threat)
        if swaps.candidates is not None:
            return threat
        table = next(embedding_of(victim).parameters())
        found = nearest_tokens(table, usable_tokens(victim, data), swaps.k)
        return replace(threat, balls={"text": replace(swaps, candidates=found)})

    def looking(self, victim: Hasher) -> Search:
        """The search with a look at the embeddings of the victim that it is called for."""
        return partial(self._search, embedding_of(victim))

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found:
        raise ValueError(
            "greedy swaps look at the embeddings of a victim: call looking(victim) first, as Attack does"
        )

    def _search(
        self,
        embedding: nn.Module,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found:
        swaps, origin = _swaps(threat), batch.inputs["text"]
        x = threat.project(_start(batch, threat, draws, False, start), {"text": origin})["text"]
        options = torch.cat(
            [swaps.allowed(origin), origin[:, :, None]], 2
        )  # (B, L, k + 1): the last one takes back
        steps, tried = max(1, swaps.count), min(self.candidates, options[0].numel())
        rows = torch.arange(len(x), device=x.device)

        def look(x: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
            value, logits, grad = _ascend_tokens(score, embedding, x, progress)
            gain = _gains(embedding, grad, x, options).masked_fill(
                ~_feasible(x, origin, options, swaps), -torch.inf
            )
            return value, logits, gain.flatten(1)

        def swap(x: Tensor, column: Tensor) -> Tensor:
            place = column // options.shape[2]
            swapped = x.clone()
            swapped[rows, place] = options[rows, place, column % options.shape[2]]
            return swapped

        return greedy(score, x, look, swap, steps, tried, select)


def _swaps(threat: Threat) -> Swaps:
    swaps = threat.balls.get("text")
    if len(threat.balls) != 1 or not isinstance(swaps, Swaps):
        raise ValueError(f"greedy swaps search swaps of tokens alone, not {threat.name}")
    return swaps


def _ascend_tokens(
    score: Score, embedding: nn.Module, ids: Tensor, progress: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, logits and (B, L, D) gradient of the score to the embeddings of the tokens.

    Raises:
        FloatingPointError: where score or gradient is not finite.
        ValueError: where the score never looks a token up.
    """
    looked: list[Tensor] = []

    def as_leaf(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        looked.append(output.detach().requires_grad_(True))
        return looked[-1]

    handle = embedding.register_forward_hook(as_leaf)
    try:
        value, logits = score({"text": ids}, progress)
    finally:
        handle.remove()
    if not looked:
        raise ValueError(
            "the score looks no token up, so nothing can be differentiated; check the view of the victim"
        )
    # a score of several passes looks up several times, and its slope is the sum
    grad = torch.stack(torch.autograd.grad(value.sum(), looked)).sum(0)
    if not (torch.isfinite(value).all() and torch.isfinite(grad).all()):
        raise FloatingPointError("the attack's score or its gradient is NaN or infinite")
    return value.detach(), logits.detach(), grad


def _gains(embedding: nn.Module, grad: Tensor, x: Tensor, options: Tensor) -> Tensor:
    """(B, L, k + 1) first-order gain of each option; one option of all places at a time, which bounds the
    memory."""
    with torch.no_grad():
        here = (grad * embedding(x)).sum(2)
        return torch.stack([(grad * embedding(option)).sum(2) - here for option in options.unbind(2)], 2)


def _feasible(x: Tensor, origin: Tensor, options: Tensor, swaps: Swaps) -> Tensor:
    """(B, L, k + 1) bool: the option differs from what stands there, and the text stays within its budget."""
    changed = x != origin
    room = changed | (changed.sum(1, keepdim=True) < swaps.count)
    return room[:, :, None] & (options != x[:, :, None])


@register("attack", "token-swaps", modality="tokens")
def token_swaps(
    objective: HashObjective,
    like: str | Mapping[str, Any] = "mainstay",
    swaps: int = 2,
    neighbours: int = 8,
    candidates: int = 8,
) -> Attack:
    """Swap a few tokens of each text for near ones, with the guide and the loss of any other attack:
    ``like: dhta``.

    Ours. Greedy, so a lower bound on what m swaps can do. Near is near in the victim's own embedding table,
    which is no promise that the text still means the same to a reader. alpha is 1 throughout.

    Args:
        like: an attack by name or settings, whose guide, loss, goal and knowledge are taken over.
        swaps: m, tokens changed at most.
        neighbours: k, candidates of each token, found when the attack is fitted to the victim.
        candidates: swaps tried exactly for each step.
    """
    model: Attack = build("attack", like, objective=objective)
    threat = Threat({"text": Swaps(swaps, neighbours)}, model.threat.knowledge)
    return replace(model, name="token-swaps", search=GreedySwaps(candidates), threat=threat, slope="one")
