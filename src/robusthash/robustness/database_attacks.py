"""Attacks on the database: items are changed not to be found, or inserted to be found often.

The queries stay clean. Items are encoded as the database is, by ``victim.for_database()``, and that is what
an attack differentiates. As with attacked queries, the evaluator projects, verifies and encodes again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Guide, Select
from robusthash.core.hamming import distance, pack
from robusthash.core.identity import marked_identity
from robusthash.core.runtime import Draws, Progress, silent
from robusthash.core.types import Batch, Codes, Goal, Guidance, Reference
from robusthash.data.base import Split
from robusthash.evaluation.attack_block import AttackedBlock, finish
from robusthash.evaluation.code_measures import as_codes
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import score_clean, setting_of
from robusthash.metrics.average_precision import share as ratio
from robusthash.metrics.distance_histogram import prepared_profile
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import Cost, EvalResult, Setting
from robusthash.metrics.statistics import intervals
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher

_PROXIES = 2000  # database codes that stand in for queries where inserted items are aimed
_AIMS = 2000  # database codes that they may be aimed at


def perturb_database(
    context: EvaluationContext, attack: Attack, share: float = 0.1, *, progress: Progress = silent
) -> EvalResult:
    """The clean queries against a database of which a share was attacked (``db-perturb``).

    Of N items round(share * N), at least one, are drawn by the context's seed. Each is attacked away from its
    own labels; where the attack selects, it keeps the point whose code, as a query, has the lowest exact AP.
    In the direction T2I this is what "text queries under image attack" means; an attacker who knows codes
    there knows those of images and texts, since texts are the queries.

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
    attack, draws = context.fitted(attack, across), Draws(context.seed, ("db-perturb",))
    known, size = context.known(attack, across), len(context.database)
    count = max(1, round(share * size))
    rows = torch.randperm(size, generator=draws.generator())[:count].sort().values

    def goal(batch: Batch) -> tuple[Goal, Select | None]:
        if batch.labels is None:
            raise ValueError("the database has no labels, so its items have nothing to be moved away from")
        return Goal(batch.labels, -1), context.select(batch.labels, -1) if attack.selects else None

    items, _, perceptibility = _attack_items(
        context, attack, context.data.database, rows, goal, known, draws, progress
    )
    signs = items.signs[:, 0]
    headline, clean = context.protocol.headline, score_clean(context)
    result = score_clean(_with_items(context, rows, signs))
    rounded = score_clean(_with_items(context, rows, items.codes_8bit[:, 0]))
    drop = clean.per_query[headline] - result.per_query[headline]
    codes_8bit, stored = rounded.per_query[headline], MeasureKey(headline).name(storage="8bit")
    per_query = {**result.per_query, stored: codes_8bit, "drop": drop}
    flips = (context.codes.signs()[rows] != signs).sum(1).to(torch.float64)
    values = {
        **result.values,
        stored: rounded.values[headline],
        "drop": clean.values[headline] - result.values[headline],
        "items": float(count),
        "item flips": float(flips.mean()),
    }
    return replace(
        result,
        setting=_named(result.setting, attack, "db-perturb", f"{count} of {size} items"),
        values=values,
        per_query=per_query,
        interval=intervals(per_query),
        reference={**result.reference, "clean": clean.values[headline]},
        perceptibility=perceptibility,
        cost=_cost(items, started),
    )


def insert_items(
    context: EvaluationContext, attack: Attack, count: int = 10, k: int = 10, *, progress: Progress = silent
) -> EvalResult:
    """Items put into the database to appear in the top k of as many queries as possible (``db-insert``).

    The carriers are training items, drawn by the context's seed: the attacker owns them. The attacker knows
    the database codes, not the queries, so codes of the database stand in for them: each item is steered to
    the database code that adds most expected exposure to that of the items before it, and where the attack
    selects, it keeps the point of highest expected exposure on its own.

    Args:
        attack: on the searched modality alone, of knowledge W2, with a loss that follows a code; its own
            guide is replaced by the code that the item is steered to.
        count: items put in.
        k: ranks that count.

    Returns:
        ``exposure@k``: share of queries in whose top k an inserted item appears, in expectation over ties,
            with ``/8bit``; ``slots@k``: expected share of the top k that inserted items take. ``reference``
            has the exposure of the same carriers unchanged (``clean``), of items at random ranks
            (``chance``), and of codes that reach their aims (``reached aims``).

    Raises:
        ValueError: count or k below 1, more items than carriers, another modality or knowledge.
    """
    carriers = context.data.train
    if k < 1 or count < 1:
        raise ValueError(f"count and k must be at least 1, got {count} and {k}")
    if count > len(carriers):
        raise ValueError(f"{count} items to insert and {len(carriers)} training items to carry them")
    if attack.threat.knowledge != "W2":
        raise ValueError(f"items are aimed by codes (W2), and {attack.name!r} is {attack.threat.knowledge}")
    _check(context, attack)
    started, draws = time.perf_counter(), Draws(context.seed, ("db-insert",))
    proxies, chances = _proxies(context, k, draws)
    aims = _aims(context.codes, proxies, chances, count, draws)
    guide = SteeredGuide(context.codes.signs()[aims].float().to(context.victim.device))
    steered = context.fitted(replace(attack, guide=guide))
    rows = torch.randperm(len(carriers), generator=draws.within("carriers").generator())[:count]

    def exposed(signs: Tensor) -> Tensor:
        return chances.gather(1, distance(proxies, pack(signs)).long()).mean(0).to(signs.device)

    def goal(batch: Batch) -> tuple[Goal, Select | None]:
        return Goal(None, 1), exposed if attack.selects else None

    known = context.known(attack)
    items, clean, perceptibility = _attack_items(
        context, steered, carriers, rows, goal, known, draws, progress
    )
    exposed_queries, slots = exposure(context, as_codes(items.signs[:, 0]), k)
    exposed_8bit, _ = exposure(context, as_codes(items.codes_8bit[:, 0]), k)
    stored = MeasureKey(f"exposure@{k}").name(storage="8bit")
    per_query = {f"exposure@{k}": exposed_queries, stored: exposed_8bit, f"slots@{k}": slots}
    counts = torch.tensor([[len(context.database)]]), torch.tensor([[count]])
    at_aims = as_codes(context.codes.signs()[aims])
    return EvalResult(
        setting=_named(setting_of(context), attack, "db-insert", f"{count} items"),
        values={name: float(values.mean()) for name, values in per_query.items()},
        per_query=per_query,
        interval=intervals(per_query),
        reference={
            "clean": float(exposure(context, as_codes(clean), k)[0].mean()),
            "chance": float(at_least_one(*counts, k)[0]),
            "reached aims": float(exposure(context, at_aims, k)[0].mean()),
        },
        perceptibility=perceptibility,
        cost=_cost(items, started),
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
    """(Q,) probability that an inserted item is in the top k, and (Q,) their expected share of it."""
    items = prepared_profile(context.query_codes, context.query_labels, context.prepared).items
    near = distance(context.query_codes.packed, inserted.packed).long()
    extra = torch.zeros_like(items).scatter_add_(1, near, torch.ones_like(near))
    both = items + extra
    places = (k - (both.cumsum(1) - both)).clamp(min=0).minimum(both)
    slots = (ratio(extra, both) * places).sum(1) / min(k, int(both[0].sum()))
    return at_least_one(items, extra, k), slots


def _proxies(context: EvaluationContext, k: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Packed database codes in place of queries, and (S, K + 1) chances of one item at each distance."""
    rows = torch.randperm(len(context.database), generator=draws.within("asked").generator())[:_PROXIES]
    codes = Codes(context.codes.packed[rows], context.codes.bits, torch.arange(len(rows)))
    items = prepared_profile(codes, context.database_labels[rows], context.prepared).items.clone()
    items[:, 0] -= 1  # a query is no item of the database
    places = (k - (items.cumsum(1) - items)).clamp(min=0)
    return codes.packed, torch.minimum(places, items + 1) / (items + 1).to(torch.float64)


def _aims(database: Codes, proxies: Tensor, table: Tensor, count: int, draws: Draws) -> Tensor:
    """(count,) rows of the database to aim at, greedily: each adds most to the expected exposure so far."""
    rows = torch.randperm(len(database), generator=draws.within("aims").generator())[:_AIMS]
    chances = table.gather(1, distance(proxies, database.packed[rows]).long())  # (S, A)
    missed, selected = torch.ones(len(proxies), 1, dtype=torch.float64), []
    for _ in range(count):
        best = int((missed * chances).mean(0).argmax())
        selected.append(int(rows[best]))
        missed = missed * (1.0 - chances[:, best : best + 1])
    return torch.tensor(selected)


@dataclass(frozen=True, eq=False)
class SteeredGuide(Guide):
    """A guide with a given code for each item, by its id."""

    codes: Tensor  # (items, K)

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        return Guidance(self.codes[batch.ids])


# ------------------------------------------------------------------------------------------ attacked items


def _attack_items(
    context: EvaluationContext,
    attack: Attack,
    split: Split,
    positions: Tensor,
    goal: Callable[[Batch], tuple[Goal, Select | None]],
    known: Reference | None,
    draws: Draws,
    progress: Progress,
) -> tuple[AttackedBlock, Tensor, dict[str, float]]:
    """Attack the items at ``positions`` block by block; ids in a batch count the attacked items from 0.

    Returns:
        The attacked items, (n, K) codes of the clean ones, and the perceptibility.
    """
    modality = context.direction[1]
    as_queries = replace(context, victim=context.victim.for_database(), direction=(modality, modality))
    victim, ball = as_queries.victim, attack.threat.balls[modality]
    parts, clean, sizes = list[AttackedBlock](), list[Tensor](), list[Tensor]()
    blocks = torch.arange(len(positions)).split(context.batch_size)
    for number, block in enumerate(blocks):
        batch = replace(split.batch(positions[block]), ids=block).only({modality}).to(victim.device)
        aim, select = goal(batch)
        output = attack(victim, batch, aim, known, draws=draws, select=select)
        passes, results = (output.forward, output.backward, 0), [output.inputs]
        attacked = finish(as_queries, attack.threat, batch, results, 0.0, passes=passes)
        clean.append(encode_signs(victim, modality, batch.inputs[modality]))
        sizes.append(ball.size(attacked.inputs - batch.inputs[modality].cpu()))
        parts.append(replace(attacked, inputs=attacked.inputs[:, :0]))  # of all items they fill the memory
        progress(number + 1, len(blocks), f"attacking items by {attack.name}")
    size = torch.cat(sizes).to(torch.float64)
    perceptibility = {f"{ball.norm}/mean": float(size.mean()), f"{ball.norm}/max": float(size.max())}
    return AttackedBlock.join(parts), torch.cat(clean), perceptibility


def _cost(items: AttackedBlock, started: float) -> Cost:
    forward, backward, _ = items.passes.sum(0).tolist()
    return Cost(forward, backward, seconds=time.perf_counter() - started)


def _check(context: EvaluationContext, attack: Attack) -> None:
    if set(attack.threat.balls) != {context.direction[1]}:
        raise ValueError(
            f"{attack.threat.name} changes {sorted(attack.threat.balls)}, and the database is of "
            f"{context.direction[1]!r}; attack that modality alone, or choose another direction"
        )


def _with_items(context: EvaluationContext, rows: Tensor, signs: Tensor) -> EvaluationContext:
    """The context with other codes for some items of its database."""
    packed = context.codes.packed.clone()
    packed[rows] = pack(signs)
    return replace(context, database=replace(context.codes, packed=packed))


def _named(setting: Setting, attack: Attack, kind: str, amount: str) -> Setting:
    """The setting with its threat, attack and budget."""
    threat = attack.threat.name if attack.threat.name.startswith(kind) else f"{kind}-{attack.threat.name}"
    digests = {**setting.digests, "budget": marked_identity([amount, attack.budget_settings()])}
    budget = f"{amount}, {attack.budget}"
    return replace(setting, threat=threat, attacks=(attack.name,), budget=budget, digests=digests)
