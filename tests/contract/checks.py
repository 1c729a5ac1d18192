"""What every attack and every objective promises. A new method is held to the same functions."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import (
    Flat,
    LinearHead,
    assert_same_state,
    counted,
    facts_of,
    image_batch,
    make_data,
    memory_of,
    output_of,
    reference_of,
    state_of,
    train_config,
    trained_hasher,
)
from torch import Tensor

from robusthash.attacks import Attack
from robusthash.attacks.base import Probe
from robusthash.attacks.pgd import APGD
from robusthash.core.hamming import sign
from robusthash.core.labels import draw_targets
from robusthash.core.registry import build, card
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, HashOutput, Inputs, Reference
from robusthash.data import ArraySource, RetrievalData, Split, load_data
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import DPSH, HashObjective
from robusthash.objectives.centers import hadamard_centers
from robusthash.training import HashingRecipe, fit

DRAWS = Draws(0, ("contract",))
STEPS = 3


@dataclass(frozen=True)
class World:
    """A trained victim and eight queries. Tests must not change it; they copy what they alter."""

    data: RetrievalData
    victim: Hasher
    batch: Batch
    reference: Reference
    targets: Tensor  # (B, C) target labels that share nothing with the own ones
    objective: HashObjective

    def fitted(self, attack: Attack) -> Attack:
        """The attack, its learning parts trained on the victim."""
        return attack.fit(self.victim, self.data, self.reference, draws=DRAWS)

    def goal(self, attack: Attack) -> Goal:
        """Own labels and away, or target labels and towards."""
        return Goal(self.targets, 1) if attack.targeted else Goal(self.batch.labels, -1)


def make_world() -> World:
    data = make_data(multi=True)
    victim = trained_hasher(data)
    batch = data.query.batch(torch.arange(8))
    targets = draw_targets(batch.labels, batch.ids, data.database.labels, 1, DRAWS)[:, 0]
    objective = DPSH()
    objective.setup(facts_of(data.train.labels, victim.bits))
    return World(data, victim, batch, reference_of(victim, data.database), targets, objective)


def make_pair_world() -> World:
    """The same over images with captions: a victim of both modalities."""
    data = load_data("synthetic", train=64, query=12, database=48)
    text = {"name": "mlp", "widths": [16]}
    victim = build_hasher(
        bits=8, image={"name": "small", "width": 4, "grid": 1}, text=text, vocabulary=data.vocabulary
    )
    fit(HashingRecipe(victim, DPSH()), data, train_config(12))
    batch = data.query.batch(torch.arange(8))
    targets = draw_targets(batch.labels, batch.ids, data.database.labels, 1, DRAWS)[:, 0]
    objective = DPSH()
    objective.setup(facts_of(data.train.labels, victim.bits))
    return World(data, victim, batch, reference_of(victim, data.database), targets, objective)


def make_attack(name: str, objective: HashObjective, **options: Any) -> Attack:
    """The registered attack with three steps, and twenty to fit what it learns (where it takes steps)."""
    accepted = inspect.signature(card("attack", name).make).parameters
    few = {"steps": STEPS, "fit_steps": 20, "hidden": 16, "epochs": 1, "generator_epochs": 1}
    few |= {"width": 4, "questions": 16}
    options = {**{key: value for key, value in few.items() if key in accepted}, **options}
    return build("attack", {"name": name, **options}, objective=objective)


def run(attack: Attack, world: World, **changed: Any) -> Any:
    """Call ``attack`` on the world, with some arguments changed."""
    given = {
        "victim": world.victim,
        "batch": world.batch,
        "goal": world.goal(attack),
        "reference": world.reference,
    }
    rest = {"draws": DRAWS, **changed}
    positional = [rest.pop(name, value) for name, value in given.items()]
    return attack(*positional, **rest)


def first_look(attack: Attack, world: World, **changed: Any) -> Inputs:
    """The first inputs that the search looks at."""
    seen: list[Inputs] = []

    def note(module: Any, inputs: tuple[Inputs]) -> None:
        if any(value.requires_grad for value in inputs[0].values()):
            seen.append({name: value.detach().clone() for name, value in inputs[0].items()})

    victim = copy.deepcopy(world.victim)
    victim.register_forward_pre_hook(note)
    run(attack, world, victim=victim, **changed)
    return seen[0]


def agreement(attack: Attack, world: World, inputs: Inputs, goal: Goal, guidance: Any) -> Tensor:
    """(B,) the attack's own loss at alpha = 1."""
    with torch.no_grad():
        outputs = copy.deepcopy(world.victim).eval()(inputs)
        return attack.loss(Probe(outputs, inputs, world.batch, goal, 1.0, world.reference), guidance)


# --- attacks


def check_stays_inside(attack: Attack, world: World) -> None:
    before = {name: value.clone() for name, value in world.batch.inputs.items()}
    out = run(attack, world)
    for name, value in before.items():
        assert torch.equal(world.batch.inputs[name], value), "the clean batch was changed in place"
    attack.threat.verify(out.inputs, before)
    assert set(out.inputs) == set(attack.threat.balls)
    for name, ball in attack.threat.balls.items():
        x, clean = out.inputs[name], before[name]
        assert x.shape == clean.shape
        assert x.dtype == clean.dtype
        assert not x.requires_grad
        if ball.norm == "linf":
            assert float((x - clean).abs().max()) <= ball.eps + 1e-6
        assert float(x.min()) >= 0.0
        assert float(x.max()) <= 1.0
        touched = (x != clean).flatten(1).any(1)
        # a search that returns its best point may come back to a start that three steps did not better
        assert bool(touched.any() if isinstance(attack.search, APGD) else touched.all()), (
            "some query was not touched"
        )
    assert isinstance(attack.budget, str)


def check_victim_untouched(attack: Attack, world: World) -> None:
    victim = copy.deepcopy(world.victim)
    victim.train()
    parts = list(victim.modules())
    parts[-1].eval()  # a mixture of modes and flags must come back as it was
    parts[len(parts) // 2].eval()
    parameters = list(victim.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.full_like(parameters[1], 0.5)
    before = state_of(victim)
    run(attack, world, victim=victim)
    assert_same_state(before, state_of(victim))
    assert sum(p.grad is not None for p in parameters) == 1


def check_seeds(attack: Attack, world: World) -> None:
    once, again = run(attack, world), run(attack, world)
    torch.rand(3)  # the global stream plays no part
    third = run(attack, world)
    for name in attack.threat.balls:
        assert torch.equal(once.inputs[name], again.inputs[name])
        assert torch.equal(once.inputs[name], third.inputs[name])
        if getattr(attack.search, "random_start", False):
            other = run(attack, world, draws=Draws(1, ("contract",)))
            assert not torch.equal(once.inputs[name], other.inputs[name])


def check_batching(attack: Attack, world: World) -> None:
    """One query at a time, and in another order, in float64."""
    victim = copy.deepcopy(world.victim).double()
    batch = replace(world.batch, inputs={name: value.double() for name, value in world.batch.inputs.items()})
    goal, own = world.goal(attack), getattr(attack.guide, "model", None)
    if own is not None:
        attack = replace(attack, guide=replace(attack.guide, model=copy.deepcopy(own).double()))

    def part(rows: Tensor) -> Any:
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        labels = None if batch.labels is None else batch.labels[rows]
        small_goal = Goal(None if goal.labels is None else goal.labels[rows], goal.sign)
        return run(
            attack, world, victim=victim, batch=Batch(inputs, labels, batch.ids[rows]), goal=small_goal
        )

    whole = part(torch.arange(len(batch)))
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    mixed = part(order)
    singles = [part(torch.tensor([row])) for row in range(len(batch))]
    assert torch.equal(torch.cat([one.signs for one in singles]), whole.signs)
    assert torch.equal(mixed.signs, whole.signs[order])
    for name in attack.threat.balls:
        x = whole.inputs[name]
        alone = torch.cat([one.inputs[name] for one in singles])
        # a gradient within rounding of zero may change its sign: almost all pixels agree, and none leaves the
        # ball
        assert float(((alone - x).abs() > 1e-6).double().mean()) < 1e-3
        assert float(((mixed.inputs[name] - x[order]).abs() > 1e-6).double().mean()) < 1e-3


def check_progress(attack: Attack, world: World) -> None:
    """The score of what comes back is not below that of the point where the search began."""
    goal = world.goal(attack)
    out = run(attack, world)
    start = agreement(attack, world, first_look(attack, world), goal, out.guidance)
    end = agreement(attack, world, out.inputs, goal, out.guidance)
    assert float((goal.sign * (end - start)).mean()) >= 0
    assert torch.isfinite(out.trace).all()
    told = f"{len(out.trace)} scores in the trace for `steps: {STEPS}`: an attack takes `steps`, and notes one each"
    assert len(out.trace) == STEPS, told


def check_direction(attack: Attack, world: World) -> None:
    labels = world.goal(attack).labels
    ends = {}
    for direction in (-1, 1):
        goal = Goal(labels, direction)
        out = run(attack, world, goal=goal)
        ends[direction] = agreement(attack, world, out.inputs, goal, out.guidance)
    assert float(ends[1].mean()) > float(ends[-1].mean())


def check_zero_budget(attack: Attack, world: World) -> None:
    out = run(replace(attack, threat=attack.threat.scaled(0.0)), world)
    for name in attack.threat.balls:
        assert torch.equal(out.inputs[name], world.batch.inputs[name])


def check_counts(attack: Attack, world: World) -> None:
    victim = copy.deepcopy(world.victim)
    goal = world.goal(attack)
    attacked = world.batch.only(attack.threat.balls)
    with counted(victim) as asked:
        attack.guide(victim, attacked, goal, world.reference, DRAWS)
    for select in (None, lambda signs: -signs.sum(1)):
        with counted(victim) as calls:
            found = attack.perturb(victim, world.batch, goal, world.reference, draws=DRAWS, select=select)
        assert calls.forward == found.forward + asked.forward
        assert calls.backward == found.backward
        with counted(victim) as calls:
            out = run(attack, world, victim=victim, select=select)
        assert (out.forward, out.backward) == (found.forward, found.backward)
        assert (
            calls.forward == out.forward + asked.forward + 1
        )  # the code of the returned inputs is encoded again


def check_returned_code(attack: Attack, world: World) -> None:
    out = run(attack, world)
    with torch.no_grad():
        outputs = copy.deepcopy(world.victim).eval()(out.inputs)
    assert torch.equal(out.signs, sign(next(iter(outputs.values())).logits))
    assert not out.signs.is_inference(), "a tensor made in inference mode cannot be trained on"


def check_select(attack: Attack, world: World) -> None:
    """By a metric that the attack may compute, what comes back is no worse than any point that was looked
    at."""
    seen: list[Tensor] = []

    def plus_ones(signs: Tensor) -> Tensor:
        seen.append((signs > 0).sum(1).float())
        return seen[-1]

    out = run(attack, world, select=plus_ones)
    reported = (out.signs > 0).sum(1).float()
    assert len(seen) >= 2
    assert torch.equal(reported, torch.stack(seen).max(0).values)


def check_start(attack: Attack, world: World) -> None:
    """The search begins at the inputs it is given, brought back into the ball."""
    start = {name: (world.batch.inputs[name] + 1.0).clamp_max(1.0) for name in attack.threat.balls}
    looked = first_look(attack, world, start=start)
    expected = attack.threat.project(start, world.batch.inputs)
    for name in attack.threat.balls:
        assert torch.equal(looked[name], expected[name])


def check_other_modalities(attack: Attack, world: World) -> None:
    """Another modality of the items is not touched, not asked, and not in the way, wherever it stands in the
    batch."""
    attacked = tuple(attack.threat.balls)
    spare = next((name for name in ("text", "image", "sound") if name not in attacked), "sound")
    values = torch.rand(len(world.batch), 5, generator=torch.Generator().manual_seed(1))
    other = LinearHead(torch.randn(world.victim.bits, 5, generator=torch.Generator().manual_seed(2)))
    victim = Hasher(
        {spare: Flat(), **{name: copy.deepcopy(world.victim.encoders[name]) for name in attacked}},
        {spare: other, **{name: copy.deepcopy(world.victim.heads[name]) for name in attacked}},
    )
    own = {name: world.batch.inputs[name] for name in attacked}
    alone = run(attack, world, batch=replace(world.batch, inputs=own))
    for inputs in ({spare: values, **own}, {**own, spare: values}):
        out = run(attack, world, victim=victim, batch=replace(world.batch, inputs=inputs))
        assert spare not in out.inputs
        for name in attacked:
            assert torch.equal(out.inputs[name], alone.inputs[name])
        assert torch.equal(out.signs, alone.signs)


def check_grad_mode(attack: Attack, world: World) -> None:
    """A caller that has switched gradients off gets the same result."""
    with torch.no_grad():
        out = run(attack, world)
    for name in attack.threat.balls:
        assert torch.equal(out.inputs[name], run(attack, world).inputs[name])


def check_broken_victim(attack: Attack, world: World) -> None:
    victim = copy.deepcopy(world.victim)
    with torch.no_grad():
        for head in victim.heads.values():
            head.linear.bias[0] = float("nan")
    before = state_of(victim)
    with pytest.raises((FloatingPointError, ValueError), match="NaN or infinite"):
        run(attack, world, victim=victim)
    assert before["modes"] == state_of(victim)["modes"], "the victim was not restored after an error"
    assert before["flags"] == state_of(victim)["flags"]


def check_labels(attack: Attack, world: World, supervised: bool) -> None:
    bare = replace(world.batch, labels=None)
    goal = Goal(None, world.goal(attack).sign)
    if supervised:
        for reference in (world.reference, None, Reference(world.reference.codes, None)):
            with pytest.raises(ValueError, match="label"):
                run(attack, world, batch=bare, goal=goal, reference=reference)
    else:
        attack.threat.verify(run(attack, world, batch=bare, goal=goal, reference=None).inputs, bare.inputs)


ATTACK_CHECKS = (
    check_stays_inside,
    check_victim_untouched,
    check_seeds,
    check_batching,
    check_progress,
    check_direction,
    check_zero_budget,
    check_counts,
    check_returned_code,
    check_select,
    check_start,
    check_other_modalities,
    check_grad_mode,
    check_broken_victim,
)

LEARNED_CHECKS = (
    check_stays_inside,
    check_victim_untouched,
    check_seeds,
    check_batching,
    check_zero_budget,
    check_returned_code,
    check_other_modalities,
    check_grad_mode,
)


# --- objectives

BITS = 8
LABELS = torch.eye(2)[torch.arange(12) % 2]


def perfect_signs(objective: HashObjective, labels: Tensor) -> Tensor:
    """(N, K) the code that the objective asks for: its own centers, or one code per class and its
    complement."""
    if hasattr(objective, "targets"):
        return objective.targets(labels)
    if hasattr(objective, "matrix"):  # of a linear classifier of two classes
        return sign(labels @ (objective.matrix - objective.matrix.mean(0)).detach())
    if getattr(objective, "stage", 1) == 2:  # the codes that its first stage has learned
        return sign(labels @ objective.class_codes)
    if hasattr(objective, "bank"):  # which tells items apart, not classes
        return sign(objective.bank)
    one = hadamard_centers(2, BITS, Draws(0))[1]
    return torch.where(labels[:, :1] > 0, one, -one)


def told(logits: Tensor) -> HashOutput:
    """An output with these logits and all that an objective may ask of an encoder."""
    return replace(output_of(logits), aux={"private": -logits, "plain": logits})


def value_of(objective: HashObjective, logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The loss that training would minimise, with the batch's own codes as memory."""
    memory = memory_of({name: torch.tanh(value.detach()) for name, value in logits.items()}, labels)
    batch = image_batch(torch.zeros(len(labels), 2), labels)
    return torch.stack(list(objective({n: told(v) for n, v in logits.items()}, batch, memory).values())).sum()


def ready(objective: HashObjective) -> HashObjective:
    """Set up; one that learns something of its own (proxies, a label net) has done so on perfect codes of both
    modalities. What an unsupervised one takes for features says the classes, so that its perfect codes are
    theirs."""
    source = ArraySource({"image": LABELS, "text": LABELS})
    split = Split("train", source, torch.arange(12), None, source.hashes())
    if hasattr(objective, "features"):
        objective.features = dict.fromkeys(("image", "text"), "raw")
    objective.warmup = 0  # of UCCH: from the first step on by its bank
    if hasattr(objective, "neighbours"):
        objective.neighbours = 0.5  # the items of a class
    objective.setup(replace(facts_of(LABELS, BITS, widths={"image": BITS, "text": BITS}), split=split))
    if hasattr(objective, "teach"):
        objective.teach({"image": LABELS, "text": LABELS})
    if hasattr(objective, "label_net"):
        learn(objective, 20)
    while getattr(objective, "stage", 2) == 1:
        learn(objective, 10)
        objective.end_epoch(memory_of({"image": torch.zeros(12, BITS)}, LABELS))
    return objective


def learn(objective: HashObjective, steps: int) -> None:
    """Train the objective's own parameters on perfect codes."""
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        perfect = dict.fromkeys(("image", "text"), 3 * perfect_signs(objective, LABELS))
        value_of(objective, perfect, LABELS).backward()
        optimiser.step()


def check_terms(objective: HashObjective) -> None:
    ready(objective)
    for modalities in (("image",), ("image", "text")):
        generator = torch.Generator().manual_seed(0)
        logits = {m: torch.randn(12, BITS, generator=generator).requires_grad_(True) for m in modalities}
        outputs = {name: told(value) for name, value in logits.items()}
        memory = memory_of(
            {m: torch.tanh(torch.randn(12, BITS, generator=generator)) for m in modalities}, LABELS
        )
        terms = objective(outputs, image_batch(torch.zeros(12, 2), LABELS), memory)
        assert terms
        assert all(term.shape == () and torch.isfinite(term) for term in terms.values())
        grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(logits.values()))
        for grad in grads:
            assert torch.isfinite(grad).all()
            assert bool((grad.abs().sum(1) > 0).all()), "some item gets no gradient"
        assert not any(p.requires_grad for p in memory.parameters())


def check_perfect_code(objective: HashObjective) -> None:
    ready(objective)
    perfect = perfect_signs(objective, LABELS)
    good = value_of(objective, {"image": 3 * perfect}, LABELS)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.where(torch.rand(12, BITS, generator=generator) < 0.5, -3.0, 3.0)
        assert good < value_of(objective, {"image": drawn}, LABELS)


def check_per_item(objective: HashObjective) -> None:
    """An item's similarity loss does not depend on the rest of the batch, so an attack may ascend it
    alone."""
    ready(objective)
    generator = torch.Generator().manual_seed(3)
    logits, bank = (
        torch.randn(12, BITS, generator=generator),
        torch.tanh(torch.randn(12, BITS, generator=generator)),
    )
    whole = objective.similarity(output_of(logits), LABELS, bank, LABELS)
    assert whole.shape == (12,)
    for row in (0, 7):
        alone = objective.similarity(output_of(logits[row : row + 1]), LABELS[row : row + 1], bank, LABELS)
        torch.testing.assert_close(alone, whole[row : row + 1])
    assert objective.regularisation(output_of(logits)).shape == (12,)


def check_descends(objective: HashObjective) -> None:
    """Following its gradient lowers it."""
    ready(objective)
    logits = torch.randn(12, BITS, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
    before = value_of(objective, {"image": logits}, LABELS).item()
    for _ in range(20):
        (grad,) = torch.autograd.grad(value_of(objective, {"image": logits}, LABELS), logits)
        logits = (logits - 2.0 * grad).detach().requires_grad_(True)
        objective.advance()
    assert value_of(objective, {"image": logits}, LABELS).item() < before


def check_needs_labels(objective: HashObjective) -> None:
    ready(objective)
    batch = image_batch(torch.zeros(12, 2))
    outputs = {"image": told(torch.randn(12, BITS, generator=torch.Generator().manual_seed(5)))}
    memory = memory_of({"image": torch.randn(12, BITS, generator=torch.Generator().manual_seed(6))}, None)
    if objective.supervised:
        with pytest.raises(ValueError, match="labels"):
            objective(outputs, batch, memory)
    else:
        assert all(torch.isfinite(term) for term in objective(outputs, batch, memory).values())


def check_state(objective: HashObjective, fresh: HashObjective) -> None:
    """What training changes is in the state dict: a fresh one that loads it says the same."""
    ready(objective)
    ready(fresh)
    for _ in range(450):
        objective.advance()
    fresh.load_state_dict(objective.state_dict())
    logits = {"image": torch.randn(12, BITS, generator=torch.Generator().manual_seed(7))}
    assert torch.equal(value_of(objective, logits, LABELS), value_of(fresh, logits, LABELS))


OBJECTIVE_CHECKS = (check_terms, check_perfect_code, check_per_item, check_descends, check_needs_labels)
