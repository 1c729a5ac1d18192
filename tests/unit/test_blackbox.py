"""Searches that only ask: counted, feasible, keyed by query, and better than noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import make_data, small_hasher, trained_hasher
from torch import Tensor

from robusthash.attacks import named_threat
from robusthash.attacks.oracle import QueryOracle, ids_lost
from robusthash.attacks.query_search import (
    NES,
    GreedyWords,
    RandomPoints,
    Square,
    search_by_queries,
    square_share,
)
from robusthash.attacks.threat_model import Threat, edit_threat, image_threat, threat_on
from robusthash.core.hamming import distance
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch
from robusthash.data import load_data
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.models import build_hasher
from robusthash.robustness.specs.oracle_attacks import (
    OracleAttack,
    noise,
    noise_attacks,
    oracle_attacks,
    oracle_curve,
)

EPS = 16 / 255


@pytest.fixture(scope="module")
def context() -> EvaluationContext:
    data = make_data()
    return make_context(trained_hasher(data), data, batch_size=12)


@pytest.fixture(scope="module")
def texts() -> EvaluationContext:
    data = load_data("synthetic", train=48, query=10, database=40)
    victim = build_hasher(
        bits=12, image=None, text={"name": "mlp", "widths": [16]}, vocabulary=data.vocabulary
    )
    return make_context(victim, data, batch_size=10)


def mean_ap(context: EvaluationContext, signs: Tensor) -> float:
    return float(context.select(context.query_labels, 1)(signs).mean())


def clean_ap(context: EvaluationContext) -> float:
    return mean_ap(context, context.query.signs())


# ------------------------------------------------------------------------------------------------ the oracle


def test_an_oracle_answers_as_the_service_would(context: EvaluationContext) -> None:
    oracle, batch = QueryOracle(context.victim, context.database, 3, k=5), context.batch(0)
    assert torch.equal(oracle.codes(batch).packed, context.query.packed)
    found = oracle.distances(batch)
    assert torch.equal(found, distance(context.query.packed, context.database.packed))
    by_rule = (found.to(torch.int64) * 1000 + torch.arange(found.shape[1])).argsort(1)[:, :5]
    assert torch.equal(oracle.rank(batch), by_rule)
    assert oracle.used(batch.ids).tolist() == [3] * len(batch)


def test_the_budget_is_counted_by_query_and_holds(context: EvaluationContext) -> None:
    oracle, batch = QueryOracle(context.victim, context.database, 2), context.batch(0)
    some = Batch({"image": batch.inputs["image"][:3]}, None, batch.ids[[0, 0, 4]])
    oracle.codes(some)
    assert oracle.used(torch.tensor([0, 4, 5])).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="query 0 has used its budget of 2 oracle queries"):
        oracle.codes(some)
    assert oracle.used(torch.tensor([0, 4, 5])).tolist() == [2, 1, 0], "a refused batch counts for nobody"


def test_a_ranking_oracle_shows_ids_alone(context: EvaluationContext) -> None:
    oracle, batch = QueryOracle(context.victim, context.database, 9, "B1"), context.batch(0)
    for ask in (oracle.codes, oracle.distances):
        with pytest.raises(ValueError, match="a B1 oracle shows the ordered ids"):
            ask(batch)
    assert int(oracle.used(batch.ids).sum()) == 0
    found = oracle.rank(batch)
    assert found.shape == (len(batch), 100)
    assert bool((found[:, len(context.database) :] == -1).all())


def test_oracles_refuse_what_makes_no_sense(context: EvaluationContext) -> None:
    with pytest.raises(ValueError, match="budget of at least 1 oracle query for each item is needed, got 0"):
        QueryOracle(context.victim, context.database, 0)
    with pytest.raises(ValueError, match="'W2'"):
        QueryOracle(context.victim, context.database, 1, "W2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        QueryOracle(context.victim, context.database, 1, k=0)
    oracle = QueryOracle(context.victim, context.database, 1)
    with pytest.raises(ValueError, match="one modality"):
        oracle.codes(replace(context.batch(0), inputs={"image": torch.zeros(1), "text": torch.zeros(1)}))


def test_oracle_queries_refuse_a_threat_to_the_database(context: EvaluationContext) -> None:
    spec = oracle_attacks(image_threat(EPS))[0]
    with pytest.raises(ValueError, match="robusthash poison"):
        spec.at(named_threat("db-insert")).fitted(context)


def test_lost_ids_by_hand() -> None:
    clean = torch.tensor([[3, 1, 2], [3, 1, 2], [3, 1, 2], [7, 8, -1]])
    found = torch.tensor([[3, 1, 2], [9, 8, 7], [1, 3, 9], [7, 8, -1]])
    w = 1 / torch.log2(torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))
    swapped = 1 - 2 * w[0] * w[1] / w.square().sum()
    expected = torch.tensor([0.0, 1.0, float(swapped), 0.0], dtype=torch.float64)
    assert torch.allclose(ids_lost(clean, found), expected)
    plain = torch.tensor([0.0, 1.0, 1 / 3, 0.0], dtype=torch.float64)
    assert torch.allclose(ids_lost(clean, found, weighted=False), plain)


# ------------------------------------------------------------------------------------------------ the
# searches


def norm_of(x: Tensor) -> Tensor:
    """(B,) a score that a search can climb: the first pixel of each image against the others."""
    flat = x.flatten(1)
    return flat[:, :40].sum(1) - flat[:, 40:].sum(1)


IMAGE_SEARCHES = {
    "square": Square(),
    "nes": NES(pairs=3),
    "spsa": NES(pairs=3, directions="signs"),
    "uniform": RandomPoints(),
    "corner": RandomPoints("corner"),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", IMAGE_SEARCHES)
def test_image_searches_ask_feasible_points_and_keep_the_best(
    name: str, norm: str, context: EvaluationContext
) -> None:
    batch, seen = context.batch(0), []
    threat = image_threat(EPS if norm == "linf" else 0.7, norm)  # type: ignore[arg-type]

    def ask(inputs: dict[str, Tensor]) -> Tensor:
        threat.verify(inputs, batch.inputs)
        seen.append(norm_of(inputs["image"]))
        return seen[-1]

    answered = search_by_queries(IMAGE_SEARCHES[name], ask, batch, threat, Draws(0), 40, marks=(1, 10, 40))
    assert answered.oracle_queries == len(seen) <= 40
    assert answered.oracle_queries >= 39, "the budget is there to be used"
    assert torch.equal(answered.score, torch.stack(seen).amax(0))
    assert torch.equal(norm_of(answered.inputs["image"]), answered.score)
    assert torch.equal(answered.best_after[1]["image"], batch.inputs["image"]), (
        "the clean query is asked about first"
    )
    for mark in (10, 40):
        assert torch.equal(norm_of(answered.best_after[mark]["image"]), torch.stack(seen[:mark]).amax(0))
    assert bool((answered.score > seen[0]).all())


def test_searches_climb_more_than_noise(context: EvaluationContext) -> None:
    batch, threat = context.batch(0), image_threat(EPS)
    reached = {
        name: float(
            search_by_queries(
                search, lambda x: norm_of(x["image"]), batch, threat, Draws(0), 120
            ).score.mean()
            - norm_of(batch.inputs["image"]).mean()
        )
        for name, search in IMAGE_SEARCHES.items()
    }
    for name in ("square", "nes", "spsa"):
        assert reached[name] > 2 * reached["corner"], reached


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", IMAGE_SEARCHES)
def test_no_query_depends_on_another(name: str, norm: str, context: EvaluationContext) -> None:
    whole = context.batch(0)
    whole = replace(whole, inputs={"image": whole.inputs["image"].double()})
    threat = image_threat(EPS if norm == "linf" else 0.7, norm)  # type: ignore[arg-type]

    def found(rows: list[int], draws: Draws = Draws(0)) -> Tensor:
        part = Batch({"image": whole.inputs["image"][rows]}, None, whole.ids[rows])
        return search_by_queries(
            IMAGE_SEARCHES[name], lambda x: norm_of(x["image"]), part, threat, draws, 30
        ).inputs["image"]

    everyone = found(list(range(len(whole))))
    assert torch.equal(found([7, 3]), everyone[[7, 3]])
    assert torch.equal(found([7]), everyone[[7]])
    assert not torch.equal(found([7], Draws(1)), everyone[[7]])


def test_a_start_is_kept_where_nothing_is_better(context: EvaluationContext) -> None:
    batch, threat = context.batch(0), image_threat(EPS)
    image = batch.inputs["image"]
    best = image + EPS * torch.where(torch.arange(image[0].numel()) < 40, 1.0, -1.0).view_as(image[0])
    best = threat.project({"image": best}, batch.inputs)["image"]
    for search in IMAGE_SEARCHES.values():
        answered = search_by_queries(
            search, lambda x: norm_of(x["image"]), batch, threat, Draws(0), 6, start={"image": best}
        )
        assert torch.equal(answered.inputs["image"], best)


def test_vectors_are_searched_without_squares(texts: EvaluationContext) -> None:
    batch = texts.batch(0)
    for threat in (threat_on("text"), threat_on("text", 0.3, "l2")):
        reached = []
        for search in (Square(), NES(pairs=4), RandomPoints("corner")):

            def ask(inputs: dict[str, Tensor], threat: Threat = threat) -> Tensor:
                threat.verify(inputs, batch.inputs)
                return norm_of(inputs["text"])

            reached.append(float(search_by_queries(search, ask, batch, threat, Draws(0), 60).score.mean()))
        assert min(reached[:2]) > reached[2]


def test_the_squares_shrink_by_the_authors_schedule() -> None:
    shares = [square_share(0.8, step / 1000) for step in (0, 1, 2, 6, 21, 999)]
    assert shares == [0.8, 0.8, 0.4, 0.2, 0.1, 0.8 / 512]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Square(0.0), "share must lie in"),
        (lambda: NES(pairs=0), "pairs must be at least 1, got 0"),
        (lambda: NES(sigma=0.0), "shares of eps above 0"),
        (lambda: NES(directions="sobol"), "'sobol'"),  # type: ignore[arg-type]
        (lambda: RandomPoints("middle"), "'middle'"),  # type: ignore[arg-type]
        (lambda: build("question-search", "sqare"), "did you mean 'square'"),
    ],
)
def test_searches_refuse_bad_options(make, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        make()


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("search", [GreedyWords(), RandomPoints()], ids=["greedy", "random"])
def test_words_are_edited_within_the_budget(search, texts: EvaluationContext) -> None:
    batch, threat, asked = texts.batch(0), edit_threat(2), 0
    weights = torch.linspace(-1, 1, batch.inputs["text"].shape[1]).square()

    def ask(inputs: dict[str, Tensor]) -> Tensor:
        nonlocal asked
        asked += 1
        threat.verify(inputs, batch.inputs)
        return (inputs["text"] * weights).sum(1)

    answered = search_by_queries(search, ask, batch, threat, Draws(0), 50)
    assert answered.oracle_queries == asked <= 50
    assert bool((answered.score > (batch.inputs["text"] * weights).sum(1)).all())


def test_greedy_words_find_the_best_pair_when_they_may_try_all(texts: EvaluationContext) -> None:
    batch, threat = texts.batch(0), edit_threat(2)
    bags = batch.inputs["text"]
    gains = torch.rand(bags.shape[1], generator=torch.Generator().manual_seed(0))
    change = (1 - 2 * bags) * gains
    best = (bags * gains).sum(1) + change.clamp_min(0).topk(2, dim=1).values.sum(1)
    budget = 1 + 2 * bags.shape[1]
    answered = search_by_queries(
        GreedyWords(), lambda x: (x["text"] * gains).sum(1), batch, threat, Draws(0), budget
    )
    assert torch.allclose(answered.score, best)
    assert answered.oracle_queries == budget


def test_searches_and_threats_must_fit(context: EvaluationContext, texts: EvaluationContext) -> None:
    def ask(inputs: dict[str, Tensor]) -> Tensor:
        return torch.zeros(len(next(iter(inputs.values()))))

    with pytest.raises(ValueError, match="the square attack searches norm balls, not txt-bow-2"):
        search_by_queries(Square(), ask, texts.batch(0), edit_threat(2), Draws(0), 9)
    with pytest.raises(ValueError, match="patterns for linf and l2; take estimated gradients"):
        search_by_queries(Square(), ask, context.batch(0), image_threat(2, "l1"), Draws(0), 9)
    assert [line.name for line in oracle_attacks(image_threat(2, "l1"), 9)] == ["nes, codes", "nes, ids"]
    for search in (NES(), RandomPoints("corner")):
        found = search_by_queries(search, ask, context.batch(0), image_threat(2, "l1"), Draws(0), 9).inputs
        image_threat(2, "l1").verify(found, context.batch(0).inputs)
    with pytest.raises(ValueError, match="greedy-words edits bags of words, not img-linf-8"):
        search_by_queries(GreedyWords(), ask, context.batch(0), image_threat(), Draws(0), 9)
    with pytest.raises(ValueError, match="one modality at a time"):
        search_by_queries(Square(), ask, context.batch(0), threat_on("both"), Draws(0), 9)
    with pytest.raises(ValueError, match="budget of at least 1, got 0"):
        search_by_queries(Square(), ask, context.batch(0), image_threat(), Draws(0), 0)
    with pytest.raises(ValueError, match=r"marks lie in 1..5"):
        search_by_queries(Square(), ask, context.batch(0), image_threat(), Draws(0), 5, marks=(6,))


# ------------------------------------------------------------------------------------------------ lines


def test_lines_lower_ap_within_their_budget(context: EvaluationContext) -> None:
    threat, clean = image_threat(EPS), clean_ap(context)
    lines = oracle_attacks(threat, 40, k=10)
    assert [line.name for line in lines] == ["square, codes", "square, ids", "nes, codes"]
    for line in lines:
        attacked = line.fitted(context).run(context, 0, 0)
        assert attacked.passes[:, 2].tolist() == [attacked.passes[0, 2]] * len(attacked.passes)
        assert 38 <= int(attacked.passes[0, 2]) <= 40
        assert attacked.passes[:, :2].sum() == 0
        reached = mean_ap(context, attacked.signs[:, 0])
        assert reached < clean - 0.02, f"{line.name}: {clean:.3f} -> {reached:.3f}"
        again = line.run(context, 0, 0)
        assert torch.equal(again.inputs, attacked.inputs)
        assert not torch.equal(line.run(context, 0, 1).inputs, attacked.inputs)


def test_distances_tell_as_much_as_codes(context: EvaluationContext) -> None:
    threat = image_threat(EPS)
    by_codes = OracleAttack("codes", Square(), threat, "codes", "ap", 15).run(context, 0, 0)
    by_distances = OracleAttack("distances", Square(), threat, "distances", "ap", 15).run(context, 0, 0)
    assert torch.equal(by_codes.inputs, by_distances.inputs), "AP from distances is the AP from codes"


@pytest.mark.parametrize(
    ("shows", "judge"),
    [("codes", "overlap"), ("distances", "overlap"), ("coarse", "overlap"), ("ids", "overlap")],
)
def test_overlap_needs_no_labels(shows, judge, context: EvaluationContext) -> None:
    line = OracleAttack("unlabelled", Square(), image_threat(EPS), shows, judge, 40, k=5)
    _, answered = line.answered(context, 0)
    assert bool((answered.score >= 0).all())
    assert float(answered.score.mean()) > 0.1
    unlabelled = replace(context.batch(0), labels=None)
    ask = line.query_score(
        context, unlabelled, QueryOracle(context.victim, context.database, 1, line.threat.knowledge, 5)
    )
    assert float(ask(unlabelled.inputs).abs().max()) < 1e-9, "the clean query has lost nothing"


def test_blocks_and_batches_do_not_matter(context: EvaluationContext) -> None:
    line = OracleAttack("square", Square(), image_threat(EPS), "codes", "ap", 10)
    small = replace(context, batch_size=5)
    parts = torch.cat([line.run(small, block, 0).inputs for block in range(small.blocks)])
    assert torch.allclose(parts, line.run(context, 0, 0).inputs, atol=1e-6)


def test_noise_is_the_worst_of_its_draws(context: EvaluationContext) -> None:
    threat = image_threat(EPS)
    uniform, corner = noise_attacks(threat, 30)
    assert (uniform.kind, uniform.name, corner.name) == ("noise", "uniform noise", "corner noise")
    ap = context.select(context.query_labels, 1)
    few, many = (noise("n", threat, draws, "corner").run(context, 0, 0) for draws in (3, 30))
    assert bool((ap(many.signs[:, 0]) <= ap(few.signs[:, 0])).all())
    assert many.passes[0].tolist() == [0, 0, 31]
    batch = context.batch(0)
    one = noise("n", threat, 1, "corner").run(context, 0, 0)
    assert bool((ap(one.signs[:, 0]) <= ap(context.query.signs())).all())
    changed = (corner.run(context, 0, 0).inputs - batch.inputs["image"]).abs()
    inside = (batch.inputs["image"] > EPS) & (batch.inputs["image"] < 1 - EPS)
    moved = changed.flatten(1).amax(1) > 0
    assert torch.allclose(changed[moved][inside[moved]], torch.tensor(EPS), atol=1e-6)


def test_the_curve_falls_and_ends_where_the_line_does(context: EvaluationContext) -> None:
    line = OracleAttack("square", Square(), image_threat(EPS), "codes", "ap", 30)
    curve = oracle_curve(context, line, (1, 5, 20, 30))
    assert curve.ap.shape == (12, 4)
    assert bool((curve.ap.diff(dim=1) <= 0).all())
    assert curve.means[-1] < curve.means[0]
    assert torch.equal(curve.ap[:, 0], curve.clean)
    assert float(curve.clean.mean()) == pytest.approx(clean_ap(context))
    whole = context.select(context.query_labels, 1)(line.run(context, 0, 0).signs[:, 0])
    assert torch.allclose(curve.ap[:, -1], whole)
    for wrong in ((), (5, 5), (10, 5), (10, 31)):
        with pytest.raises(ValueError, match="budgets must rise and end at most at the attack's 30"):
            oracle_curve(context, line, wrong)
    noisy = small_hasher(declared="randomised")
    with pytest.raises(ValueError, match="randomised victim is not built"):
        oracle_curve(replace(context, victim=noisy), line, (5,))


def test_text_lines(texts: EvaluationContext) -> None:
    threat, clean = edit_threat(3), clean_ap(texts)
    assert [line.name for line in noise_attacks(threat)] == ["random edits"]
    greedy, by_ids, random = oracle_attacks(threat, 61, k=10)
    reached = {
        line.name: mean_ap(texts, line.fitted(texts).run(texts, 0, 0).signs[:, 0])
        for line in (greedy, random)
    }
    assert max(reached.values()) < clean - 0.02, (clean, reached)
    assert by_ids.threat.knowledge == "B1"
    assert by_ids.run(texts, 0, 0).pixels


def test_settings_name_all_that_matters() -> None:
    line = OracleAttack("a", Square(), image_threat(EPS), "codes", "ap", 50)
    others = [
        replace(line, search=NES()),
        replace(line, shows="distances"),
        replace(line, judge="overlap"),
        replace(line, budget=51),
        replace(line, k=5),
        line.at(image_threat(2 / 255)),
    ]
    assert len({str(other.settings()) for other in [line, *others]}) == 7
    assert replace(line, name="b").settings() == line.settings()
    assert line.at(image_threat(2 / 255)).threat.knowledge == "B2"


def test_lines_refuse_what_cannot_be_judged(context: EvaluationContext) -> None:
    threat = image_threat(EPS)
    with pytest.raises(ValueError, match="'ap' cannot be judged from 'ids'"):
        OracleAttack("x", Square(), threat, "ids", "ap")
    with pytest.raises(ValueError, match="at least 1 oracle query, got 0"):
        OracleAttack("x", Square(), threat, budget=0)
    with pytest.raises(ValueError, match="one modality at a time"):
        OracleAttack("x", Square(), threat_on("both"))
    with pytest.raises(ValueError, match="does not attack the image queries"):
        OracleAttack("x", GreedyWords(), edit_threat(2)).fitted(context)
    with pytest.raises(ValueError, match="at least 1 draw, got 0"):
        noise("x", threat, 0)


def test_the_victim_is_left_as_it_was(context: EvaluationContext) -> None:
    victim = small_hasher()
    victim.train()
    made = make_context(victim, context.data, batch_size=12)
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    OracleAttack("square", Square(), image_threat(EPS), budget=4).run(made, 0, 0)
    assert victim.training
    assert all(torch.equal(before[name], value) for name, value in victim.state_dict().items())
