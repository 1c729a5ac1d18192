"""Attackers of the database: some of its items are changed to be found no more, or new ones put in to be
found often.

The queries stay clean. Items are encoded as the database is, by ``victim.for_database()``, and that is what
an attack differentiates. As with attacked queries, the evaluator projects, verifies and encodes anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Guide, Select
from robusthash.core.hamming import distance, pack, sign
from robusthash.core.identity import marked_identity
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, Goal, Guidance, Reference
from robusthash.data.base import Split
from robusthash.evaluation.attack_block import in_8bit
from robusthash.evaluation.context import EvaluationContext, Progress, silent
from robusthash.evaluation.evaluate import as_codes, score_clean, setting_of
from robusthash.metrics.average_precision import share as ratio
from robusthash.metrics.distance_histogram import prepared_profile
from robusthash.metrics.results import Cost, EvalResult, Setting
from robusthash.metrics.statistics import intervals
from robusthash.models.hasher import Hasher, frozen

_ASKED = 2000  # database codes that stand in for queries where inserted items are aimed
_AIMS = 2000  # database codes that they may be aimed at


def perturb_database(
    context: EvaluationContext, attack: Attack, share: float = 0.1, *, progress: Progress = silent
) -> EvalResult:
    """The clean queries against a database of which a share was attacked (``db-perturb``).

    Of N items round(share * N), at least one, are drawn by the bench's seed. Each is attacked away from its
    own labels; where the attack selects, it keeps the point whose code, asked as a query, has the lowest
    exact AP. In the direction T2I this is what "text queries under image attack" means; an attacker who knows
    codes there knows those of images and texts, since it is texts that ask.

    Args:
        attack: untargeted, on the searched modality alone, such as ``guided-apgd`` or ``dsarh``.
        share: of the database, in (0, 1].

    Returns:
        The measures of the protocol, ``MAP/8bit`` (the changes rounded towards zero to multiples of 1/255),
        ``drop`` of the headline, ``items`` attacked and ``item flips``, their mean number of changed bits;
        ``reference["clean"]`` is the value before.

    Raises:
        ValueError: a share outside (0, 1], or an attack that is targeted or changes another modality.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of attacked items must lie in (0, 1], got {share:g}")
    if attack.targeted:
        raise ValueError(f"{attack.name!r} is targeted; items are attacked away from their own labels")
    _check(context, attack)
    started = time.perf_counter()
    across = context.direction[0] != context.direction[1]
    attack = context.fitted(attack, across)
    known, draws = context.known(attack, across), Draws(context.seed, ("db-perturb",))
    count = max(1, round(share * len(context.database)))
    chosen = torch.randperm(len(context.database), generator=draws.generator())[:count].sort().values

    def goal(batch: Batch) -> tuple[Goal, Select | None]:
        if batch.labels is None:
            raise ValueError("the database has no labels, so its items have nothing to be moved away from")
        return Goal(batch.labels, -1), context.select(batch.labels, -1) if attack.selects else None

    changed = _attack_items(context, attack, context.data.database, chosen, goal, known, draws, progress)
    scored = [
        score_clean(_with_items(context, chosen, signs)) for signs in (changed.signs, changed.codes_8bit)
    ]
    headline, clean = context.protocol.headline, score_clean(context)
    drop = clean.per_query[headline] - scored[0].per_query[headline]
    codes_8bit = scored[1].per_query[headline]
    per_query = {**scored[0].per_query, f"{headline}/8bit": codes_8bit, "drop": drop}
    flips = (context.database.signs()[chosen] != changed.signs).sum(1).to(torch.float64)
    made = {
        f"{headline}/8bit": scored[1].values[headline],
        "drop": clean.values[headline] - scored[0].values[headline],
        "items": float(count),
        "item flips": float(flips.mean()),
    }
    return replace(
        scored[0],
        setting=_named(scored[0].setting, attack, "db-perturb", f"{count} of {len(context.database)} items"),
        values={**scored[0].values, **made},
        per_query=per_query,
        interval=intervals(per_query),
        reference={**scored[0].reference, "clean": clean.values[headline]},
        perceptibility=changed.seen,
        cost=_cost(changed, started),
    )


def insert_items(
    context: EvaluationContext, attack: Attack, count: int = 10, k: int = 10, *, progress: Progress = silent
) -> EvalResult:
    """Items put into the database to appear in the top k of as many queries as possible (``db-insert``).

    The carriers are training items, drawn by the bench's seed: the attacker owns them. The attacker knows the
    database codes, not the queries. So codes of the database stand in for queries: each inserted item is
    steered to the database code that adds most expected exposure to that of the items before it, and where
    the attack selects, it keeps the point of highest expected exposure on its own.

    Args:
        attack: on the searched modality alone, of knowledge W2, with a loss that follows a code; its own
            guide is replaced by the code that the item is steered to.
        count: c, items put in.
        k: ranks that count.

    Returns:
        ``exposure@k``: share of queries in whose top k an inserted item appears, in expectation over ties,
        with ``/8bit``; ``slots@k``: expected share of the top k that inserted items take. ``reference`` has
        the exposure of the same carriers unchanged (``clean``), of items at random ranks (``chance``), and of
        codes that reach their aims (``reached aims``).

    Raises:
        ValueError: count or k below 1, more items than carriers, another modality or knowledge.
    """
    carriers = context.data.train
    if k < 1 or count < 1:
        raise ValueError(f"count and k must be at least 1, got {count} and {k}")
    if count > len(carriers):
        raise ValueError(
            f"{count} items to insert and {len(carriers)} training items to carry them; insert fewer"
        )
    if attack.threat.knowledge != "W2":
        raise ValueError(
            f"items are aimed by the database codes (W2), and {attack.name!r} is {attack.threat.knowledge}"
        )
    _check(context, attack)
    started, draws = time.perf_counter(), Draws(context.seed, ("db-insert",))
    asked, table = _stand_ins(context, k, draws)
    aims = _aims(context.database, asked, table, count, draws)
    guide = Steered(context.database.signs()[aims].float().to(context.victim.device))
    steered = context.fitted(replace(attack, guide=guide))
    chosen = torch.randperm(len(carriers), generator=draws.within("carriers").generator())[:count]

    def exposed(signs: Tensor) -> Tensor:
        return table.gather(1, distance(asked, pack(signs)).long()).mean(0).to(signs.device)

    def goal(batch: Batch) -> tuple[Goal, Select | None]:
        return Goal(None, 1), exposed if attack.selects else None

    changed = _attack_items(context, steered, carriers, chosen, goal, context.known(attack), draws, progress)
    found = {
        name: exposure(context, as_codes(signs), k)
        for name, signs in (
            ("", changed.signs),
            ("/8bit", changed.codes_8bit),
            ("clean", changed.clean),
            ("aims", context.database.signs()[aims]),
        )
    }
    per_query = {
        f"exposure@{k}": found[""][0],
        f"exposure@{k}/8bit": found["/8bit"][0],
        f"slots@{k}": found[""][1],
    }
    counts = torch.tensor([[len(context.database)]]), torch.tensor([[count]])
    return EvalResult(
        setting=_named(setting_of(context), attack, "db-insert", f"{count} items"),
        values={name: float(values.mean()) for name, values in per_query.items()},
        per_query=per_query,
        interval=intervals(per_query),
        reference={
            "clean": float(found["clean"][0].mean()),
            "chance": float(at_least_one(*counts, k)[0]),
            "reached aims": float(found["aims"][0].mean()),
        },
        perceptibility=changed.seen,
        cost=_cost(changed, started),
    )


# ---------------------------------------------------------------------------------------------- exposure


def at_least_one(items: Tensor, inserted: Tensor, k: int) -> Tensor:
    """(Q,) probability that an inserted item is among the k nearest, over all orders within equal distance.

    In the group that the cut splits, with n items of the database, a inserted ones and m places, none of the
    a is taken with the probability C(n, m) / C(n + a, m) = prod_{j=1..a} (n - m + j) / (n + j).

    Args:
        items: (Q, groups) int64, items of the database by group, nearest first.
        inserted: (Q, groups) int64, inserted ones.
    """
    both = items + inserted
    before = both.cumsum(1) - both
    places = (k - before).clamp(min=0).minimum(both)
    missed = torch.ones(len(items), dtype=torch.float64)
    for number in range(1, int(inserted.max()) + 1):
        left = ((items - places + number).clamp(min=0)).to(torch.float64) / (items + number)
        missed *= torch.where((inserted >= number) & (places > 0), left, 1.0).prod(1)
    return 1.0 - missed


def exposure(context: EvaluationContext, inserted: Codes, k: int) -> tuple[Tensor, Tensor]:
    """(Q,) probability that an inserted item is in the top k of each query, and (Q,) expected share of it
    they take."""
    items = prepared_profile(context.query, context.query_labels, context.prepared).items
    near = distance(context.query.packed, inserted.packed).long()
    extra = torch.zeros_like(items).scatter_add_(1, near, torch.ones_like(near))
    both = items + extra
    places = (k - (both.cumsum(1) - both)).clamp(min=0).minimum(both)
    slots = (ratio(extra, both) * places).sum(1) / min(k, int(both[0].sum()))
    return at_least_one(items, extra, k), slots


def _stand_ins(context: EvaluationContext, k: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Packed database codes that stand in for queries, and (S, K + 1) chance of one item at each distance of
    each."""
    rows = torch.randperm(len(context.database), generator=draws.within("asked").generator())[:_ASKED]
    asked = Codes(context.database.packed[rows], context.database.bits, torch.arange(len(rows)))
    items = prepared_profile(asked, context.database_labels[rows], context.prepared).items.clone()
    items[:, 0] -= 1  # a query is no item of the database
    places = (k - (items.cumsum(1) - items)).clamp(min=0)
    return asked.packed, torch.minimum(places, items + 1) / (items + 1).to(torch.float64)


def _aims(database: Codes, asked: Tensor, table: Tensor, count: int, draws: Draws) -> Tensor:
    """(count,) rows of the database to aim at, greedily: each adds most to the expected exposure of those
    before it."""
    rows = torch.randperm(len(database), generator=draws.within("aims").generator())[:_AIMS]
    chances = table.gather(1, distance(asked, database.packed[rows]).long())  # (S, A)
    missed, chosen = torch.ones(len(asked), 1, dtype=torch.float64), []
    for _ in range(count):
        best = int((missed * chances).mean(0).argmax())
        chosen.append(int(rows[best]))
        missed = missed * (1.0 - chances[:, best : best + 1])
    return torch.tensor(chosen)


@dataclass(frozen=True, eq=False)
class Steered(Guide):
    """A guide of codes given for each item by its id."""

    codes: Tensor  # (items, K)

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        return Guidance(self.codes[batch.ids])


# ---------------------------------------------------------------------------------------------- attacking
# items


@dataclass(frozen=True)
class _Changed:
    """Attacked items of a split."""

    clean: Tensor  # (n, K) int8 codes before, after, and after with the change in eight bits
    signs: Tensor
    codes_8bit: Tensor
    seen: dict[str, float]
    forward: int
    backward: int


def _attack_items(
    context: EvaluationContext,
    attack: Attack,
    split: Split,
    positions: Tensor,
    goal: Callable[[Batch], tuple[Goal, Select | None]],
    known: Reference | None,
    draws: Draws,
    progress: Progress,
) -> _Changed:
    """Attack the items at ``positions`` block by block; ids in a batch count the attacked items from 0."""
    victim, modality = context.victim.for_database(), context.direction[1]
    codes: list[list[Tensor]] = [[], [], []]
    sizes: list[Tensor] = []
    forward = backward = 0
    blocks = torch.arange(len(positions)).split(context.batch_size)
    for number, block in enumerate(blocks):
        batch = replace(split.batch(positions[block]), ids=block).only({modality}).to(victim.device)
        wanted, select = goal(batch)
        output = attack(victim, batch, wanted, known, draws=draws, select=select)
        origin = batch.inputs
        attacked = attack.threat.project(output.inputs, origin)
        attack.threat.verify(attacked, origin)
        change = attacked[modality] - origin[modality]
        whole = modality == "image" and origin[modality].ndim == 4  # only pixels are stored in eight bits
        rounded = in_8bit(origin[modality], attacked[modality]) if whole else attacked[modality]
        for kept, inputs in zip(codes, (origin[modality], attacked[modality], rounded), strict=True):
            with frozen(victim), torch.no_grad():
                kept.append(sign(victim({modality: inputs})[modality].logits).to("cpu", torch.int8).clone())
        sizes.append(attack.threat.balls[modality].size(change).cpu())
        forward, backward = forward + output.forward * len(block), backward + output.backward * len(block)
        progress(number + 1, len(blocks), f"attacking items by {attack.name}")
    size = torch.cat(sizes).to(torch.float64)
    norm = attack.threat.balls[modality].norm
    seen = {f"{norm}/mean": float(size.mean()), f"{norm}/max": float(size.max())}
    clean, signs, codes_8bit = (torch.cat(kept) for kept in codes)
    return _Changed(clean, signs, codes_8bit, seen, forward, backward)


def _check(context: EvaluationContext, attack: Attack) -> None:
    if set(attack.threat.balls) != {context.direction[1]}:
        raise ValueError(
            f"{attack.threat.name} changes {sorted(attack.threat.balls)}, and the database is of "
            f"{context.direction[1]!r}; attack that modality alone, or choose another direction"
        )


def _with_items(context: EvaluationContext, rows: Tensor, signs: Tensor) -> EvaluationContext:
    """The bench with other codes for some items of its database."""
    packed = context.database.packed.clone()
    packed[rows] = pack(signs)
    return replace(context, database=replace(context.database, packed=packed))


def _named(setting: Setting, attack: Attack, kind: str, amount: str) -> Setting:
    """The setting with its threat, attack and budget."""
    named = attack.threat.name if attack.threat.name.startswith(kind) else f"{kind}-{attack.threat.name}"
    digests = {**setting.digests, "budget": marked_identity([amount, attack.budget_settings()])}
    return replace(
        setting, threat=named, attacks=(attack.name,), budget=f"{amount}, {attack.budget}", digests=digests
    )


def _cost(changed: _Changed, started: float) -> Cost:
    return Cost(forward=changed.forward, backward=changed.backward, seconds=time.perf_counter() - started)
