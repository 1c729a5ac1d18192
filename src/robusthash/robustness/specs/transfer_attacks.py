"""Transfer: lines that search on surrogates alone, and the matrix of every model attacked from every
other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.text_edits import GreedyFlips
from robusthash.attacks.threat_model import Threat
from robusthash.attacks.transfer_search import Surrogate, TransferSteps, customary_smoothing, transfer
from robusthash.core.runtime import Draws, digest
from robusthash.core.types import Batch, Codes, Inputs, Reference
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_block import Attacked, Trial, finish, goals
from robusthash.evaluation.attack_spec import Kind
from robusthash.evaluation.context import EvaluationContext, Progress, encoding_batch, silent
from robusthash.evaluation.evaluate import as_codes
from robusthash.metrics.distance_histogram import prepared_profile
from robusthash.metrics.protocol import measure
from robusthash.models.encoding import encode_split, weights_digest
from robusthash.models.hasher import Hasher

ENSEMBLE = "ensemble of the others"


def keyed(context: EvaluationContext, name: str, restart: int) -> Draws:
    """Draws of one line and restart; the first is the same whether or not others follow."""
    return (
        Draws(context.seed, (name,)).within("restart", restart) if restart else Draws(context.seed, (name,))
    )


def make_surrogate(
    name: str,
    hasher: Hasher,
    data: RetrievalData,
    direction: tuple[str, str] | None = None,
    batch_size: int = 250,
) -> Surrogate:
    """A model as a stand-in for unknown victims on ``data``, with the codes that it gives the training split.

    Args:
        direction: (query modality, searched modality) of the victims; codes are of the searched one where the
            model encodes it, else of the query's. The model's first modality by default.

    Raises:
        ValueError: a model that does not encode the query modality, or data without labels.
    """
    query, searched = direction or (hasher.modalities[0],) * 2
    if query not in hasher.modalities:
        raise ValueError(
            f"the surrogate {name!r} encodes {list(hasher.modalities)}, and the queries are {query!r}"
        )
    if data.train.labels is None:
        raise ValueError(f"{data.name} has no training labels; a surrogate needs them to steer by")
    modality = searched if searched in hasher.modalities else query
    size = encoding_batch(batch_size)
    codes = encode_split(hasher.for_database(), data.train, batch_size=size, modality=modality)[modality]
    identity = digest(
        [hasher.spec, weights_digest(hasher), modality, codes.packed.tolist(), data.train.fingerprint()]
    )
    reference = Reference({modality: codes.signs().float()}, data.train.labels).to(hasher.device)
    return Surrogate(name, hasher, reference, identity)


@dataclass(frozen=True)
class Transfer:
    """Search on surrogates with their own reference codes (T); the victim only encodes what comes back.

    Args:
        attack: guide, loss and search, with a threat that knows ``T``; the mean score of the surrogates is
            ascended.
        surrogates: at least one; their digests stand in ``settings``.

    Raises:
        ValueError: another knowledge, no surrogate, restarts of the attack itself.
    """

    name: str
    attack: Attack
    surrogates: tuple[Surrogate, ...]
    restarts: int = 1
    kind: Kind = "transfer"

    def __post_init__(self) -> None:
        if self.attack.threat.knowledge != "T":
            raise ValueError(
                f"the line {self.name!r} knows surrogates alone: give its threat the knowledge 'T'"
            )
        if not self.surrogates:
            raise ValueError(f"the line {self.name!r} needs at least one surrogate")
        if self.attack.restarts != 1:
            raise ValueError(f"the line {self.name!r} counts restarts itself; give its attack 1")

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    @property
    def targeted(self) -> bool:
        return self.attack.targeted

    def settings(self) -> dict[str, Any]:
        surrogates = [surrogate.digest for surrogate in self.surrogates]
        return {"attack": self.attack.settings(), "surrogates": surrogates}

    def fitted(self, context: EvaluationContext) -> Transfer:
        """Itself; a surrogate that cannot be asked about this bench is refused here, before the first
        block."""
        for surrogate in self.surrogates:
            if missing := [name for name in self.threat.balls if name not in surrogate.hasher.modalities]:
                raise ValueError(
                    f"the surrogate {surrogate.name!r} does not encode {missing[0]!r}, which is attacked"
                )
            known = None if surrogate.reference is None else surrogate.reference.labels
            if known is not None and known.shape[1] != context.query_labels.shape[1]:
                raise ValueError(
                    f"the surrogate {surrogate.name!r} knows {known.shape[1]} labels and the queries have "
                    f"{context.query_labels.shape[1]}; train it on {context.data.name}"
                )
        return self

    def at(self, threat: Threat) -> Transfer:
        return replace(self, attack=replace(self.attack, threat=replace(threat, knowledge="T")))

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> Attacked:
        batch, began = context.batch(block, self.threat.balls), time.perf_counter()
        trials = self.searched(context, batch, restart, start)
        return finish(context, self.threat, batch, trials, time.perf_counter() - began)

    def searched(
        self, context: EvaluationContext, batch: Batch, restart: int = 0, start: Inputs | None = None
    ) -> list[Trial]:
        """What the surrogates alone lead to; the bench gives goals and seed, its victim is not asked."""
        trials = []
        for number, goal in enumerate(goals(context, self.targeted, batch)):
            draws = keyed(context, f"attack {number}", restart)
            begin = start
            if restart and start is None:
                begin = self.threat.random_start(batch.only(self.threat.balls).inputs, batch.ids, draws)
            found = transfer(self.attack, self.surrogates, batch, goal, draws=draws, start=begin)
            nowhere = torch.empty(
                len(batch), 0, dtype=torch.int8
            )  # surrogates' codes mean nothing to the victim
            trials.append(Trial(found.inputs, nowhere, found.forward, found.backward))
        return trials


def transfer_attack(threat: Threat, search: TransferSteps | GreedyFlips) -> Attack:
    """Scale-free agreement with the mainstay code over each surrogate's own training codes."""
    return Attack("transfer", Mainstay(), ScaleFree(), search, replace(threat, knowledge="T"))


def transfer_attacks(
    context: EvaluationContext, surrogates: Sequence[Surrogate], threat: Threat, steps: int = 20
) -> list[Transfer]:
    """The customary transfer lines: each surrogate alone, and where there are several their ensemble, three
    ways.

    Images: momentum, input diversity 0.5 and gradient smoothing throughout; of the ensemble also with
    Nesterov steps over three scales, and with variance tuning by five neighbours. Other inputs: momentum.
    Bags of words: greedy flips.

    Raises:
        ValueError: no surrogate, or two of one name.
    """
    names = [surrogate.name for surrogate in surrogates]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"transfer needs surrogates of different names, got {names}")
    everyone = tuple(surrogates)
    usual = _usual_steps(context, threat, steps)
    specs = [Transfer(f"transfer {one.name}", transfer_attack(threat, usual), (one,)) for one in everyone]
    if len(everyone) > 1:
        specs.append(Transfer("transfer ensemble", transfer_attack(threat, usual), everyone))
        if isinstance(usual, TransferSteps):
            for name, search in (
                ("transfer ensemble, scales", replace(usual, nesterov=True, scales=3)),
                ("transfer ensemble, variance", replace(usual, variance=5)),
            ):
                specs.append(Transfer(name, transfer_attack(threat, search), everyone))
    return specs


def _usual_steps(context: EvaluationContext, threat: Threat, steps: int) -> TransferSteps | GreedyFlips:
    if threat.edits:
        return GreedyFlips()
    sizes = [customary_smoothing(value) for value in context.batch(0, threat.balls).inputs.values()]
    return TransferSteps(steps, diversity=0.5 if max(sizes) else 0.0, smoothing=max(sizes))


# ---------------------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class TransferMatrix:
    """What attacks found on each surrogate do to each victim. The diagonal is the white box with the same
    search."""

    measure: str  # the protocol's headline, such as "MAP"
    threat: str
    search: str
    surrogates: tuple[
        str, ...
    ]  # S rows; the last is the ensemble of all but the victim, where there are three models
    victims: tuple[str, ...]  # T columns
    clean: Tensor  # (T,) float64
    attacked: Tensor  # (S, T) float64 mean under the attack
    worst: Tensor  # (S, T) float64 mean over queries of the lower of clean and attacked: wMAP of this attack alone
    per_query: Tensor  # (S, T, Q) float64 under attack; NaN where the protocol leaves a query out
    queries: int
    chosen: str  # how these were chosen


def transfer_matrix(
    contexts: Mapping[str, EvaluationContext], threat: Threat, steps: int = 20, progress: Progress = silent
) -> TransferMatrix:
    """Attack every victim from every model, and from all others together.

    The search of ``transfer_attacks`` (momentum, and for images input diversity and smoothing) runs once for
    each surrogate, with the surrogate's own training codes; every victim then encodes the same inputs.

    Args:
        benches: by name; of one data set, protocol, query modality, batch size and seed.

    Raises:
        ValueError: fewer than two benches, or benches that differ in more than the victim; it names the
            field.
    """
    names, first = tuple(contexts), _alike(contexts)
    surrogates = {
        name: make_surrogate(name, context.victim, context.data, context.direction, context.batch_size)
        for name, context in contexts.items()
    }
    attack = transfer_attack(threat, _usual_steps(first, threat, steps))
    specs = {name: Transfer(name, attack, (surrogates[name],)).fitted(first) for name in names}
    others = {
        name: Transfer(ENSEMBLE, attack, tuple(s for other, s in surrogates.items() if other != name))
        for name in (names if len(names) > 2 else ())
    }
    found: dict[tuple[str, str], list[Tensor]] = {}
    total, done = first.blocks * (len(specs) + len(others)), 0
    for block in range(first.blocks):
        jobs = [(name, spec, names) for name, spec in specs.items()]
        jobs += [(ENSEMBLE, spec, (victim,)) for victim, spec in others.items()]
        for row, spec, victims in jobs:
            began, batch = time.perf_counter(), first.batch(block, threat.balls)
            trials = spec.searched(first, batch)
            for victim in victims:
                ended = finish(contexts[victim], attack.threat, batch, trials, time.perf_counter() - began)
                found.setdefault((row, victim), []).append(ended.signs[:, 0])
            done += 1
            progress(done, total, f"attacking from {row}")
    rows = (*names, ENSEMBLE) if others else names
    clean = torch.stack([_values(context, context.query) for context in contexts.values()])
    attacked = torch.stack(
        [
            torch.stack([_values(contexts[v], as_codes(torch.cat(found[row, v]))) for v in names])
            for row in rows
        ]
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
        first.chosen,
    )


def _alike(contexts: Mapping[str, EvaluationContext]) -> EvaluationContext:
    """The first bench, once all agree in what a matrix needs."""
    if len(contexts) < 2:
        raise ValueError(f"a transfer matrix needs at least two models, got {list(contexts)}")
    first_name, first = next(iter(contexts.items()))
    if ENSEMBLE in contexts:
        raise ValueError(f"no model can be called {ENSEMBLE!r}: that row is the matrix's own")
    for name, context in contexts.items():
        for field, own, other in (
            ("queries", context.queries.fingerprint(), first.queries.fingerprint()),
            ("training split", context.data.train.fingerprint(), first.data.train.fingerprint()),
            ("database", context.data.database.fingerprint(), first.data.database.fingerprint()),
            ("direction", context.direction, first.direction),
            ("protocol", context.protocol.settings(), first.protocol.settings()),
            ("batch size", context.batch_size, first.batch_size),
            ("seed", context.seed, first.seed),
        ):
            if own != other:
                raise ValueError(
                    f"{name} and {first_name} differ in {field}: {own} and {other}; use one for all"
                )
    return first


def _values(context: EvaluationContext, query: Codes) -> Tensor:
    """(Q,) headline of the protocol."""
    profile = prepared_profile(query, context.query_labels, context.prepared)
    labels = context.database_labels
    measured = measure(
        context.protocol, query, context.query_labels, context.database, labels, profile=profile
    )
    return measured.per_query[context.protocol.headline]
