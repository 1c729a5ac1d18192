"""Transfer: attacks that search on surrogates alone, and the matrix of all models against all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, SearchResult
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.text_edits import GreedyFlips
from robusthash.attacks.threat_model import Threat
from robusthash.attacks.transfer_search import Surrogate, TransferSteps, customary_smoothing, transfer
from robusthash.core.runtime import Draws, Progress, digest, silent
from robusthash.core.types import Batch, Codes, Inputs, Reference
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_block import AttackedBlock, finish, goals
from robusthash.evaluation.attack_spec import Kind
from robusthash.evaluation.code_measures import as_codes, measure_codes
from robusthash.evaluation.context import EvaluationContext, encoding_batch
from robusthash.models.encoding import encode_split, weights_digest
from robusthash.models.hasher import Hasher

ENSEMBLE = "ensemble of the others"


def keyed(context: EvaluationContext, name: str, restart: int) -> Draws:
    """Draws of one attack and restart; the first is the same whether or not others follow."""
    draws = Draws(context.seed, (name,))
    return draws.within("restart", restart) if restart else draws


def make_surrogate(
    name: str,
    hasher: Hasher,
    data: RetrievalData,
    direction: tuple[str, str] | None = None,
    batch_size: int = 250,
) -> Surrogate:
    """A model as a stand-in for unknown victims on ``data``, with its codes of the training split.

    Args:
        direction: (query modality, searched modality) of the victims; codes are of the searched one where the
            model encodes it, else of the query's. The model's first modality by default.

    Raises:
        ValueError: a model that does not encode the query modality, or data without labels.
    """
    query, searched = direction or (hasher.modalities[0],) * 2
    if query not in hasher.modalities:
        raise ValueError(f"the surrogate {name!r} has {list(hasher.modalities)}, the queries are {query!r}")
    if data.train.labels is None:
        raise ValueError(f"{data.name} has no training labels; a surrogate needs them to steer by")
    modality = searched if searched in hasher.modalities else query
    size = encoding_batch(batch_size)
    codes = encode_split(hasher.for_database(), data.train, batch_size=size, modality=modality)[modality]
    weights, train = weights_digest(hasher), data.train.fingerprint()
    identity = digest([hasher.spec, weights, modality, codes.packed.tolist(), train])
    reference = Reference({modality: codes.signs().float()}, data.train.labels).to(hasher.device)
    return Surrogate(name, hasher, reference, identity)


@dataclass(frozen=True)
class Transfer:
    """Search on surrogates with their own reference codes (T); the victim only encodes the result.

    Args:
        attack: guide, loss and search, with a threat that knows ``T``; it ascends the surrogates' mean score.
        surrogates: at least one; their digests are in ``settings``.
    """

    name: str
    attack: Attack
    surrogates: tuple[Surrogate, ...]
    restarts: int = 1
    kind: Kind = "transfer"

    def __post_init__(self) -> None:
        if self.attack.threat.knowledge != "T":
            raise ValueError(f"the attack {self.name!r} knows surrogates: give its threat the knowledge 'T'")
        if not self.surrogates:
            raise ValueError(f"the attack {self.name!r} needs at least one surrogate")
        if self.attack.restarts != 1:
            raise ValueError(f"the attack {self.name!r} counts restarts itself; give its attack 1")

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
        """Itself; a surrogate that does not fit the context is refused here, before the first block."""
        for surrogate in self.surrogates:
            if missing := [name for name in self.threat.balls if name not in surrogate.hasher.modalities]:
                raise ValueError(f"the surrogate {surrogate.name!r} does not encode {missing[0]!r}")
            known = None if surrogate.reference is None else surrogate.reference.labels
            labels = context.query_labels.shape[1]
            if known is not None and known.shape[1] != labels:
                raise ValueError(
                    f"the surrogate {surrogate.name!r} knows {known.shape[1]} labels and the queries have "
                    f"{labels}; train it on {context.data.name}"
                )
        return self

    def at(self, threat: Threat) -> Transfer:
        return replace(self, attack=replace(self.attack, threat=replace(threat, knowledge="T")))

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        batch, began = context.batch(block, self.threat.balls), time.perf_counter()
        results = self.searched(context, batch, restart, start)
        return _finish(context, self.threat, batch, results, began)

    def searched(
        self, context: EvaluationContext, batch: Batch, restart: int = 0, start: Inputs | None = None
    ) -> list[SearchResult]:
        """The results on the surrogates alone; the context gives goals and seed, its victim is not used."""
        results = []
        for number, goal in enumerate(goals(context, self.targeted, batch)):
            draws, begin = keyed(context, f"attack {number}", restart), start
            if restart and start is None:
                begin = self.threat.random_start(batch.only(self.threat.balls).inputs, batch.ids, draws)
            results.append(transfer(self.attack, self.surrogates, batch, goal, draws=draws, start=begin))
        return results


def _finish(
    context: EvaluationContext, threat: Threat, batch: Batch, searches: Sequence[SearchResult], began: float
) -> AttackedBlock:
    """Finished without representative codes: those of surrogates mean nothing to the victim."""
    passes = sum(each.forward for each in searches), sum(each.backward for each in searches), 0
    results, seconds = [each.inputs for each in searches], time.perf_counter() - began
    return finish(context, threat, batch, results, seconds, passes=passes)


def transfer_attack(threat: Threat, search: TransferSteps | GreedyFlips) -> Attack:
    """Scale-free agreement with the mainstay code over each surrogate's own training codes."""
    return Attack("transfer", Mainstay(), ScaleFree(), search, replace(threat, knowledge="T"))


def transfer_attacks(
    context: EvaluationContext, surrogates: Sequence[Surrogate], threat: Threat, steps: int = 20
) -> list[Transfer]:
    """The customary transfer attacks: each surrogate alone, and of several their ensemble, three ways.

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
    if len(everyone) == 1:
        return specs
    searches: dict[str, TransferSteps | GreedyFlips] = {"transfer ensemble": usual}
    if isinstance(usual, TransferSteps):
        searches["transfer ensemble, scales"] = replace(usual, nesterov=True, scales=3)
        searches["transfer ensemble, variance"] = replace(usual, variance=5)
    ensembles = [Transfer(name, transfer_attack(threat, each), everyone) for name, each in searches.items()]
    return [*specs, *ensembles]


def _usual_steps(context: EvaluationContext, threat: Threat, steps: int) -> TransferSteps | GreedyFlips:
    if threat.edits:
        return GreedyFlips()
    sizes = [customary_smoothing(value) for value in context.batch(0, threat.balls).inputs.values()]
    return TransferSteps(steps, diversity=0.5 if max(sizes) else 0.0, smoothing=max(sizes))


# ---------------------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class TransferMatrix:
    """Effect of the attacks found on each surrogate on each victim; the diagonal is the white box."""

    measure: str  # the protocol's headline, such as "MAP"
    threat: str
    search: str
    surrogates: tuple[
        str, ...
    ]  # S rows; of three models or more the last is the ensemble of all but the victim
    victims: tuple[str, ...]  # T columns
    clean: Tensor  # (T,) float64
    clean_per_query: Tensor  # (T, Q) float64
    attacked: Tensor  # (S, T) float64 mean under the attack
    worst: Tensor  # (S, T) float64 mean of the lower of clean and attacked: wMAP of this attack alone
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
        contexts: by name; of one data set, protocol, query modality, batch size and seed.

    Raises:
        ValueError: fewer than two contexts, or contexts that differ in more than the victim; it names the
            field.
    """
    names, first = tuple(contexts), _alike(contexts)
    surrogates = {
        name: make_surrogate(name, context.victim, context.data, context.direction, context.batch_size)
        for name, context in contexts.items()
    }
    attack = transfer_attack(threat, _usual_steps(first, threat, steps))
    jobs = [(name, Transfer(name, attack, (surrogates[name],)).fitted(first), names) for name in names]
    if len(names) > 2:
        for victim in names:
            others = tuple(surrogate for name, surrogate in surrogates.items() if name != victim)
            jobs.append((ENSEMBLE, Transfer(ENSEMBLE, attack, others), (victim,)))
    signs: dict[tuple[str, str], list[Tensor]] = {}
    for block in range(first.blocks):
        for done, (row, spec, victims) in enumerate(jobs, block * len(jobs) + 1):
            began, batch = time.perf_counter(), first.batch(block, threat.balls)
            results = spec.searched(first, batch)
            for victim in victims:
                attacked = _finish(contexts[victim], attack.threat, batch, results, began)
                signs.setdefault((row, victim), []).append(attacked.signs[:, 0])
            progress(done, first.blocks * len(jobs), f"attacking from {row}")
    rows = tuple(dict.fromkeys(row for row, *_ in jobs))
    clean = torch.stack([_headline(context, context.query_codes) for context in contexts.values()])

    def under(row: str, victim: str) -> Tensor:
        return _headline(contexts[victim], as_codes(torch.cat(signs[row, victim])))

    per_query = torch.stack([torch.stack([under(row, victim) for victim in names]) for row in rows])
    return TransferMatrix(
        first.protocol.headline,
        attack.threat.name,
        str(attack.search),
        rows,
        names,
        clean.nanmean(1),
        clean,
        per_query.nanmean(2),
        torch.minimum(per_query, clean).nanmean(2),
        per_query,
        len(first.queries),
        first.chosen,
    )


def _alike(contexts: Mapping[str, EvaluationContext]) -> EvaluationContext:
    """The first context, once all agree in what a matrix needs."""
    if len(contexts) < 2:
        raise ValueError(f"a transfer matrix needs at least two models, got {list(contexts)}")
    if ENSEMBLE in contexts:
        raise ValueError(f"no model can be called {ENSEMBLE!r}: that row is the matrix's own")

    def shared(context: EvaluationContext) -> dict[str, Any]:
        return {
            "queries": context.queries.fingerprint(),
            "training split": context.data.train.fingerprint(),
            "database": context.data.database.fingerprint(),
            "direction": context.direction,
            "protocol": context.protocol.settings(),
            "batch size": context.batch_size,
            "seed": context.seed,
        }

    first_name, first = next(iter(contexts.items()))
    expected = shared(first)
    for name, context in contexts.items():
        for key, value in shared(context).items():
            if value != expected[key]:
                raise ValueError(f"{name} and {first_name} differ in {key}: {value} and {expected[key]}")
    return first


def _headline(context: EvaluationContext, query: Codes) -> Tensor:
    """(Q,) headline of the protocol."""
    return measure_codes(context, query, context.query_labels).per_query[context.protocol.headline]
