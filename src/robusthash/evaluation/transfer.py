"""The transfer matrix: every model attacked with what was found on every other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.attacks.threat import Threat
from robusthash.core.profile import prepared_profile
from robusthash.core.types import Codes
from robusthash.evaluation.attacked import finish
from robusthash.evaluation.bench import Bench, Progress, silent
from robusthash.evaluation.blackbox import Transfer, make_surrogate, transfer_attack, usual_steps
from robusthash.evaluation.evaluate import as_codes
from robusthash.evaluation.protocol import measure

ENSEMBLE = "ensemble of the others"


@dataclass(frozen=True)
class TransferMatrix:
    """What attacks found on each surrogate do to each victim. The diagonal is the white box with the same search."""

    measure: str  # the protocol's headline, such as "MAP"
    threat: str
    search: str
    surrogates: tuple[str, ...]  # S rows; the last is the ensemble of all but the victim, where there are three models
    victims: tuple[str, ...]  # T columns
    clean: Tensor  # (T,) float64
    attacked: Tensor  # (S, T) float64 mean under the attack
    worst: Tensor  # (S, T) float64 mean over queries of the lower of clean and attacked: wMAP of this attack alone
    per_query: Tensor  # (S, T, Q) float64 under attack; NaN where the protocol leaves a query out
    queries: int


def transfer_matrix(
    benches: Mapping[str, Bench], threat: Threat, steps: int = 20, progress: Progress = silent
) -> TransferMatrix:
    """Attack every victim from every model, and from all others together.

    The search of ``transfer_lines`` (momentum, and for images input diversity and smoothing) runs once for each
    surrogate, with the surrogate's own training codes; every victim then encodes the same inputs.

    Args:
        benches: by name; of one data set, protocol, query modality, batch size and seed.

    Raises:
        ValueError: fewer than two benches, or benches that differ in more than the victim; it names the field.
    """
    names, first = tuple(benches), _alike(benches)
    surrogates = {
        name: make_surrogate(name, bench.victim, bench.data, bench.direction, bench.batch_size)
        for name, bench in benches.items()
    }
    attack = transfer_attack(threat, usual_steps(first, threat, steps))
    lines = {name: Transfer(name, attack, (surrogates[name],)).fitted(first) for name in names}
    others = {
        name: Transfer(ENSEMBLE, attack, tuple(s for other, s in surrogates.items() if other != name))
        for name in (names if len(names) > 2 else ())
    }
    found: dict[tuple[str, str], list[Tensor]] = {}
    total, done = first.blocks * (len(lines) + len(others)), 0
    for block in range(first.blocks):
        jobs = [(name, line, names) for name, line in lines.items()]
        jobs += [(ENSEMBLE, line, (victim,)) for victim, line in others.items()]
        for row, line, victims in jobs:
            began, batch = time.perf_counter(), first.batch(block, threat.balls)
            trials = line.searched(first, batch)
            for victim in victims:
                ended = finish(benches[victim], attack.threat, batch, trials, time.perf_counter() - began)
                found.setdefault((row, victim), []).append(ended.signs[:, 0])
            done += 1
            progress(done, total, f"attacking from {row}")
    rows = (*names, ENSEMBLE) if others else names
    clean = torch.stack([_values(bench, bench.query) for bench in benches.values()])
    attacked = torch.stack(
        [torch.stack([_values(benches[v], as_codes(torch.cat(found[row, v]))) for v in names]) for row in rows]
    )
    return TransferMatrix(
        first.protocol.headline,
        attack.threat.name,
        str(attack.search),
        rows,
        names,
        clean.nanmean(1),
        attacked.nanmean(2),
        torch.minimum(attacked, clean).nanmean(2),
        attacked,
        len(first.queries),
    )


def _alike(benches: Mapping[str, Bench]) -> Bench:
    """The first bench, once all agree in what a matrix needs."""
    if len(benches) < 2:
        raise ValueError(f"a transfer matrix needs at least two models, got {list(benches)}")
    first_name, first = next(iter(benches.items()))
    if ENSEMBLE in benches:
        raise ValueError(f"no model can be called {ENSEMBLE!r}: that row is the matrix's own")
    for name, bench in benches.items():
        for field, own, other in (
            ("queries", bench.queries.fingerprint(), first.queries.fingerprint()),
            ("training split", bench.data.train.fingerprint(), first.data.train.fingerprint()),
            ("database", bench.data.database.fingerprint(), first.data.database.fingerprint()),
            ("direction", bench.direction, first.direction),
            ("protocol", bench.protocol.settings(), first.protocol.settings()),
            ("batch size", bench.batch_size, first.batch_size),
            ("seed", bench.seed, first.seed),
        ):
            if own != other:
                raise ValueError(f"{name} and {first_name} differ in {field}: {own} and {other}; use one for all")
    return first


def _values(bench: Bench, query: Codes) -> Tensor:
    """(Q,) headline of the protocol."""
    profile = prepared_profile(query, bench.query_labels, bench.prepared)
    labels = bench.database_labels
    measured = measure(bench.protocol, query, bench.query_labels, bench.database, labels, profile=profile)
    return measured.per_query[bench.protocol.headline]
