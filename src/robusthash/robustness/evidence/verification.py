"""Evidence bundles: attacked queries in a folder, that anyone may send in and that are believed only once
re-scored.

No attack code is run or trusted: the bounds are checked against our own clean queries, found by content hash;
the victim hashes the inputs anew; our protocol scores them. A bundle may lower a model's number and can never
raise it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat
from robusthash.core.atomic_files import json_text, write_all_aside
from robusthash.core.types import Batch, Inputs
from robusthash.evaluation.attack_block import AttackedBlock, finish, in_8bit
from robusthash.evaluation.context import EvaluationContext, by_content
from robusthash.evaluation.evaluate import score_attack, setting_of
from robusthash.metrics.results import EvalResult
from robusthash.metrics.robustness_measures import hrs_of, worst_case
from robusthash.metrics.statistics import bootstrap_interval, intervals
from robusthash.models.encoding import weights_digest
from robusthash.robustness.evidence.bundles import (
    SCHEMA,
    Bundle,
    Manifest,
    ThreatRecord,
    read_bundle,
    sha256_of,
)
from robusthash.version import __version__

_OF_THE_SEARCH = frozenset({"attacks", "budget", "seeds", "digests.suite"})
"""Fields in which our search and a bundle may differ: a bundle says what lies in the budget, not how it was
found."""
_CLAIM = 0.005  # MAP by which a claim may differ from our own score before it is remarked upon


def export(
    context: EvaluationContext,
    threat: Threat,
    inputs: Tensor,
    folder: str | Path,
    *,
    positions: Tensor | None = None,
    attack: str = "unnamed",
    budget: str = "",
    model: str = "",
    claimed: Mapping[str, float] | None = None,
) -> EvalResult:
    """Write attacked queries as a bundle, checked and scored as its receiver will.

    Args:
        inputs: (n, ...) float32, attacked inputs of the bench's query modality.
        positions: (n,) positions of the queries that they belong to; by default all queries, in order.
        claimed: values to claim; by default what the inputs score here.

    Returns:
        The result that ``verify_bundle`` gives; where ``positions`` leaves queries out, these are scored
        clean.

    Raises:
        ValueError: inputs that leave the budget, or a threat on more than the query modality.
        FileExistsError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give the bundle a folder of its own")
    modality = context.direction[0]
    if list(threat.balls) != [modality]:
        raise ValueError(
            f"a bundle holds queries of {modality!r} alone, and {threat.name} changes {list(threat.balls)}"
        )
    where = torch.arange(len(context.queries)) if positions is None else positions
    if len(where) != len(inputs) or len(set(where.tolist())) != len(where):
        raise ValueError(
            f"{len(inputs)} inputs for {len(where)} positions, which must differ from each other"
        )
    result = _score(context, threat, where, inputs.numpy(), None, attack, budget)
    ball = threat.balls[modality]
    clean = context.queries.batch(where).inputs[modality]
    folder.mkdir(parents=True, exist_ok=True)
    names = ["inputs.npy", "ids.json", *["inputs-8bit.npy"] * _pictures(modality, clean)]
    with write_all_aside([folder / name for name in [*names, "manifest.json"]]) as asides:
        np.save(asides[0], inputs.numpy(), allow_pickle=False)
        asides[1].write_text(json.dumps([h.decode() for h in context.queries.hashes[where.numpy()]]) + "\n")
        if _pictures(modality, clean):
            np.save(asides[2], _eight_bit(clean, inputs), allow_pickle=False)
        manifest = Manifest(
            threat=ThreatRecord(
                name=threat.name,
                modality=modality,
                norm=ball.norm,
                eps=ball.eps,
                bounds=ball.bounds,
                knowledge=threat.knowledge,
            ),
            model=model,
            weights=weights_digest(context.victim),
            codes=_codes_digest(context),
            database=context.data.database.fingerprint(),
            direction=context.direction,
            bits=context.victim.bits,
            queries=len(where),
            attack=attack,
            budget=budget,
            claimed=dict(claimed or _claimed(result)),
            tool=f"robusthash {__version__}",
            files={name: sha256_of(aside) for name, aside in zip(names, asides, strict=False)},
        )
        document = {"schema": SCHEMA, **manifest.model_dump(mode="json")}
        asides[-1].write_text(json_text(document), encoding="utf-8")
    return result


def verify_bundle(folder: str | Path, context: EvaluationContext) -> EvalResult:
    """Check a bundle against our own clean queries, hash it with the victim, and score it.

    A bundle may hold a part of the queries; the others are scored as they are, clean, which every attacker
    may leave them, so that in ``best_known`` they keep our own worst value.

    Raises:
        ValueError: made for other weights, another database, direction or length of code; queries that are
            not ours; inputs that leave the ball or range, or hold NaN. The message names the field.
    """
    bundle = read_bundle(folder)
    manifest, notes = bundle.manifest, []
    modality = context.direction[0]
    ours: dict[str, Any] = {
        "weights": weights_digest(context.victim),
        "database": context.data.database.fingerprint(),
        "direction": context.direction,
        "bits": context.victim.bits,
    }
    for name, value in ours.items():
        if getattr(manifest, name) != value:
            remedy = (
                "it was made for other weights"
                if name == "weights"
                else "verify it with the run it was made for"
            )
            raise ValueError(f"{folder}: {name} is {getattr(manifest, name)!r} and ours {value!r}; {remedy}")
    if manifest.threat.modality != modality:
        raise ValueError(
            f"{folder}: threat.modality is {manifest.threat.modality!r}, and queries here are {modality!r}"
        )
    if manifest.codes != _codes_digest(context):
        if ours["weights"] == "none":  # then the codes are all that tells one victim from another
            raise ValueError(
                f"{folder}: codes is not the digest of our database codes; it was made for another model"
            )
        notes.append(
            "the bundle was made against database codes that differ from ours, as other hardware may round"
        )
    positions = _positions(bundle, context)
    threat = manifest.threat.threat()
    sent = f"{manifest.budget or 'budget not stated'}; sent in, made with {manifest.tool}"
    result = _score(
        context, threat, positions, bundle.inputs, bundle.codes_8bit, manifest.attack, sent, str(folder)
    )
    if len(positions) < len(context.queries):
        notes.append(
            f"{len(positions)} of {len(context.queries)} queries are in the bundle; the others are scored clean"
        )
    for name, value in manifest.claimed.items():
        if name in result.values and abs(result[name] - value) > _CLAIM:
            notes.append(
                f"the bundle claims {name} {value:.4f}; it scores {result[name]:.4f} here, which is what counts"
            )
    return replace(result, notes=(*result.notes, *notes), name=f"evidence {bundle.digest}")


def disagreements(own: EvalResult, bundle: EvalResult) -> list[str]:
    """Names of the fields in which a bundle is about something else than our own worst case."""
    return [name for name in own.setting.differs(bundle.setting) if name not in _OF_THE_SEARCH]


def on_queries(result: EvalResult, context: EvaluationContext, positions: Tensor) -> EvalResult:
    """The result of a verified bundle on some of the queries of its bench, as a suite chooses them."""
    per_query = {name: values[positions] for name, values in result.per_query.items()}
    few = setting_of(context.at(positions, by_content(len(positions), context.data.query)))
    digests = {**result.setting.digests, "queries": few.digests["queries"]}
    return replace(
        result,
        name=f"{result.name}, {len(positions)} queries",
        setting=replace(result.setting, queries=few.queries, digests=digests, chosen=few.chosen),
        values={n: float(per_query[n].nan_to_num(0.0).mean()) for n in result.values if n in per_query},
        per_query=per_query,
        interval=intervals(per_query),
    )


def best_known(own: EvalResult, bundles: Mapping[str, EvalResult]) -> EvalResult:
    """The lowest value of each query over our own worst case and accepted bundles.

    Args:
        own: a worst case, of ``worst`` or of a suite.
        bundles: what ``verify_bundle`` returned, by source.

    Returns:
        ``own`` with lower values: ``winner`` names the source where a bundle won, ``attacks`` holds each
        bundle's MAP and how many queries it lowered alone, ``reference["own"]`` our own value. Without
        bundles, ``own`` itself.

    Raises:
        ValueError: a bundle of another model or in another setting; the message names the field.
    """
    if not bundles:
        return own
    for source, result in bundles.items():
        differing = disagreements(own, result)
        if own.setting.digests.get("model") != result.setting.digests.get("model"):
            differing.append("digests.model")
        if differing:
            raise ValueError(f"the bundle {source} and our own worst case differ in {', '.join(differing)}")
    headline = own.setting.headline
    values, per_query = dict(own.values), dict(own.per_query)
    for name in [name for name in own.per_query if name.startswith("wMAP")]:
        found = worst_case(
            own.per_query[name],
            {s: r.per_query[name[1:]] for s, r in bundles.items() if name[1:] in r.per_query},
        )
        values[name], per_query[name] = found.mean, found.values
    lowest = worst_case(own.per_query[f"w{headline}"], {s: r.per_query[headline] for s, r in bundles.items()})
    spans = {**own.interval, **intervals({n: v for n, v in per_query.items() if n.startswith("wMAP")})}
    first = next(iter(bundles.values()))
    clean = first.per_query[headline] + first.per_query["drop"]
    columns = torch.stack([clean, lowest.values, torch.full_like(clean, own.reference["chance"])], 1)
    values["HRS"] = float(hrs_of(*columns.mean(0)))
    spans["HRS"] = bootstrap_interval(columns, lambda means: hrs_of(means[:, 0], means[:, 1], means[:, 2]))
    before = own.winner or ("own",) * len(lowest.winner)
    lowered = sorted({name for name in lowest.winner if name != "clean"})
    return replace(
        own,
        values=values,
        per_query=per_query,
        interval=spans,
        reference={**own.reference, "own": own[f"w{headline}"]},
        winner=tuple(o if w == "clean" else w for o, w in zip(before, lowest.winner, strict=True)),
        attacks={
            **own.attacks,
            **{
                source: {headline: result[headline], "unique wins": float(lowest.unique_wins[source])}
                for source, result in bundles.items()
            },
        },
        notes=(
            *own.notes,
            f"lowered by {', '.join(lowered)}" if lowered else "no bundle lowers our own value",
        ),
    )


# ---------------------------------------------------------------------------------------------- checks and
# scores


@dataclass(frozen=True)
class _SentIn:
    """What scoring needs to know of an attack that ran elsewhere."""

    name: str
    threat: Threat
    budget: str
    targeted: bool = False


def _score(
    context: EvaluationContext,
    threat: Threat,
    positions: Tensor,
    inputs: np.ndarray,
    codes_8bit: np.ndarray | None,
    attack: str,
    budget: str,
    where: str = "inputs",
) -> EvalResult:
    """Score inputs in place of our clean queries at ``positions``, block by block, none of them projected
    unseen."""
    row_of = {position: row for row, position in enumerate(positions.tolist())}
    blocks = []
    for block in range(context.blocks):
        batch = context.batch(block)
        here = [(slot, row_of[p]) for slot, p in enumerate(batch.ids.tolist()) if p in row_of]
        result = _sent_inputs(batch, threat, inputs, codes_8bit, here, where)
        blocks.append(finish(context, threat, batch, [result], 0.0))
    return score_attack(context, _SentIn(attack, threat, budget), AttackedBlock.join(blocks))


def _sent_inputs(
    batch: Batch,
    threat: Threat,
    inputs: np.ndarray,
    codes_8bit: np.ndarray | None,
    here: list[tuple[int, int]],
    where: str,
) -> Inputs:
    (modality,) = threat.balls
    clean = batch.inputs[modality]
    attacked = clean.clone()
    if here:
        slots, rows = (list(column) for column in zip(*here, strict=True))
        given = torch.from_numpy(np.array(inputs[rows]))
        if given.dtype != clean.dtype or given.shape[1:] != clean.shape[1:]:
            raise ValueError(
                f"{where}: inputs are {given.dtype} {tuple(given.shape[1:])}, our clean queries {clean.dtype} "
                f"{tuple(clean.shape[1:])}"
            )
        attacked[slots] = given.to(clean.device)
        try:
            threat.verify({modality: attacked}, {modality: clean})
        except ValueError as error:
            raise ValueError(f"{where}: inputs, rows {rows[0]} to {rows[-1]}: {error}") from None
        if codes_8bit is not None:
            expected = _eight_bit(clean[slots].cpu(), given)
            if np.abs(codes_8bit[rows].astype(int) - expected).max() > 1:
                raise ValueError(f"{where}: inputs-8bit.npy is not the 8-bit copy of inputs.npy")
    return {modality: attacked}


def _positions(bundle: Bundle, context: EvaluationContext) -> Tensor:
    """(n,) position of each id among our queries; equal queries are taken in order.

    Raises:
        ValueError: an id that is no query of ours, or oftener than we have it.
    """
    held: dict[str, list[int]] = {}
    for position, name in enumerate(context.queries.hashes):
        held.setdefault(name.decode(), []).append(position)
    found = []
    for row, name in enumerate(bundle.ids):
        if not held.get(name):
            raise ValueError(
                f"{bundle.folder / 'ids.json'}: id {name!r} (row {row}) is none of our {len(context.queries)} queries, "
                "or comes too often; the bundle holds other queries"
            )
        found.append(held[name].pop(0))
    return torch.tensor(found, dtype=torch.int64)


def _codes_digest(context: EvaluationContext) -> str:
    return hashlib.sha256(context.database.packed.cpu().numpy().tobytes()).hexdigest()[:16]


def _claimed(result: EvalResult) -> dict[str, float]:
    """The headline, and what is left of it in eight bits and, of bags of words, in whole words."""
    names = [f"{result.setting.headline}{ending}" for ending in ("", "/8bit", "/rounded")]
    return {name: result[name] for name in names if name in result.values}


def _pictures(modality: str, clean: Tensor) -> bool:
    return modality == "image" and clean.ndim == 4


def _eight_bit(clean: Tensor, attacked: Tensor) -> np.ndarray:
    """(n, 3, H, W) uint8: the change rounded towards zero to whole levels, then the picture to the
    nearest."""
    return (in_8bit(clean, attacked) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
