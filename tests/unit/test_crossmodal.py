"""Cross-modal objectives on a hasher of images and texts: they learn, reach the inputs, resume, and are
saved."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Interrupted, MemoryLog, facts_of, reference_of
from torch import Tensor

from robusthash.apps.experiment.run_files import load_weights, save_weights
from robusthash.attacks import mainstay, pgd
from robusthash.attacks.drfgd import drfgd
from robusthash.core.labels import relevant
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, LossTerms
from robusthash.data import RetrievalData
from robusthash.defenses import AdversarialTraining, PlainAT
from robusthash.defenses.drfgd import Regenerate
from robusthash.models import Hasher, build_hasher, encode_split
from robusthash.models.hasher import frozen, purified
from robusthash.objectives import HashObjective
from robusthash.objectives.cpah import CommonPrivate
from robusthash.training import HashingRecipe, Moment, OptimConfig, Schedule, TrainConfig, fit

NAMES = ["dcmh", "dadh", "cpah", "daph"]
CRITICS = ("dadh", "cpah")
BITS = 16


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return build("data", {"name": "synthetic", "train": 96, "query": 32, "database": 96})


def make_hasher(name: str, data: RetrievalData, head: str | None = None) -> Hasher:
    """Small encoders of one width; those of CPAH wrapped."""
    image: dict[str, Any] = {"name": "small", "width": 8, "grid": 1}
    text: dict[str, Any] = {"name": "mlp", "widths": [32]}
    if name == "cpah":
        image, text = ({"name": "cpah", "inner": inner, "width": 32} for inner in (image, text))
    head = head or ("linear" if name == "dcmh" else "tanh")
    return build_hasher(bits=BITS, image=image, text=text, head=head, vocabulary=data.vocabulary)


def make_objective(name: str) -> HashObjective:
    short: dict[str, dict[str, Any]] = {
        "dadh": {"feature_critic": (16,), "hash_critic": (16,)},
        "cpah": {"hidden": 16},
        "daph": {"proxy_epochs": 2, "inner": 32},
    }
    return build("objective", {"name": name, **short.get(name, {})})


def config(name: str, epochs: int, lr: float = 5e-3, batch_size: int = 32) -> TrainConfig:
    optim = {"hasher": OptimConfig("adam", lr, weight_decay=0.0)}
    if name in CRITICS:
        optim["critic"] = OptimConfig("adam", 1e-3, momentum=0.5)
    return TrainConfig(epochs, batch_size, optim, Schedule("constant"), device="cpu")


def mean_ap(queries: Tensor, database: Tensor, relevance: Tensor) -> float:
    """MAP over the whole list, ties by row."""
    order = (-(queries @ database.T)).argsort(dim=1, stable=True)
    hits = relevance.float().gather(1, order)
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    return float(((precision * hits).sum(1) / hits.sum(1).clamp_min(1)).mean())


@pytest.mark.parametrize("name", NAMES)
def test_learns_across_modalities(name: str, data: RetrievalData) -> None:
    hasher = make_hasher(name, data)
    fit(HashingRecipe(hasher, make_objective(name)), data, config(name, 14, lr=1e-2))
    codes = {side: encode_split(hasher, getattr(data, side)) for side in ("query", "database")}
    signs = {side: {m: c.signs().float() for m, c in by.items()} for side, by in codes.items()}
    relevance = relevant(data.query.labels, data.database.labels)
    chance = float(relevance.float().mean())
    for one, other in (("image", "text"), ("text", "image")):
        assert mean_ap(signs["query"][one], signs["database"][other], relevance) > chance + 0.12, (one, other)


@pytest.mark.parametrize("head", ["linear", "tanh"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_similarity_reaches_pixels_and_bags(
    name: str, head: str, data: RetrievalData
) -> None:
    """For more than 99 % of the items, in eval mode, as an attack asks: nothing is detached on the way."""
    hasher, objective = make_hasher(name, data, head), make_objective(name)
    recipe = HashingRecipe(hasher, objective)
    recipe.setup(data, 0, 32)
    batch = data.train.batch(torch.arange(len(data.train)))
    with frozen(hasher):
        for modality in ("image", "text"):
            values = batch.inputs[modality].clone().requires_grad_(True)
            output = hasher({modality: values})[modality]
            codes = recipe.memory.reference().codes["image"]
            loss = objective.similarity(output, batch.labels, codes, data.train.labels).sum()
            (grad,) = torch.autograd.grad(loss, values)
            assert torch.isfinite(grad).all()
            assert float((grad.flatten(1).abs().sum(1) > 0).float().mean()) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_every_part_learns_at_its_time(name: str, data: RetrievalData) -> None:
    """Encoders of both modalities always, heads once codes are trained, critics by their own step alone."""
    hasher, objective = make_hasher(name, data), make_objective(name)
    recipe = HashingRecipe(hasher, objective)
    recipe.setup(data, 0, 32)
    groups = recipe.parameter_groups()
    assert ("critic" in groups) == (name in CRITICS)
    batch = data.train.batch(torch.arange(32))
    for _ in range(3):  # DAPH's heads wait for its second stage, which begins at the third epoch here
        seen = {}
        for group, terms in recipe.step(batch, Moment(0, 0.0, Draws(0))):
            for parameter in (*hasher.parameters(), *objective.parameters()):
                parameter.grad = None
            torch.stack(list(terms.values())).sum().backward()
            seen[group] = {
                id(p) for p in (*hasher.parameters(), *objective.parameters()) if p.grad is not None
            }
        recipe.end_epoch(0)
    for encoder in hasher.encoders.values():
        assert all(id(p) in seen["hasher"] for p in encoder.parameters())
    assert all(id(p) in seen["hasher"] for head in hasher.heads.values() for p in head.parameters())
    if "critic" in groups:
        assert seen["critic"] == {id(p) for p in groups["critic"]}


@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_uninterrupted(name: str, data: RetrievalData) -> None:
    """Stopped in the middle, for DAPH inside its first stage and for DADH after a discrete step."""

    def fresh() -> HashingRecipe:
        return HashingRecipe(make_hasher(name, data), make_objective(name))

    straight, log = fresh(), MemoryLog()
    fit(straight, data, config(name, 3), log)
    stopped = MemoryLog(stop_after=1)
    with pytest.raises(Interrupted):
        fit(fresh(), data, config(name, 3), stopped)
    stopped.stop_after = None
    torch.rand(7)
    resumed = fresh()
    fit(resumed, data, config(name, 3), stopped)
    for part, module in straight.modules().items():
        other = resumed.modules()[part].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), f"{part} {key}"
    strip = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in run.lines] for run in (log, stopped)
    ]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_serves_an_attack(name: str, data: RetrievalData, tmp_path: Path) -> None:
    """Critics and proxies stay behind; a fresh objective takes the rest and says the same."""
    hasher, objective = make_hasher(name, data), make_objective(name)
    fit(HashingRecipe(hasher, objective), data, config(name, 3))
    kept = objective.saved_state()
    assert not any(key.startswith(("critics.", "classifiers.", "proxies.")) for key in kept)
    save_weights(kept, tmp_path / "objective.safetensors")
    again = make_objective(name)
    load_weights(again, tmp_path / "objective.safetensors", "")
    batch, reference = data.query.batch(torch.arange(8)), reference_of(hasher, data.database)
    with torch.no_grad():
        outputs = hasher({"image": batch.inputs["image"]})["image"]
    values = [
        o.similarity(outputs, batch.labels, reference.codes["text"], reference.labels)
        for o in (objective, again)
    ]
    assert torch.equal(*values)
    start = values[0].mean()
    found = pgd(again, steps=4)(hasher, batch, Goal(batch.labels, -1), reference, draws=Draws(0))
    with torch.no_grad():
        attacked = hasher({"image": found.inputs["image"]})["image"]
    assert (
        objective.similarity(attacked, batch.labels, reference.codes["text"], reference.labels).mean() > start
    )


@pytest.mark.parametrize("name", NAMES)
def test_adversarial_training_on_images(name: str, data: RetrievalData) -> None:
    """The attacked outputs hold images alone, while critics and proxies know both modalities."""
    hasher = make_hasher(name, data)
    recipe = AdversarialTraining(hasher, make_objective(name), mainstay(steps=1), PlainAT())
    lines = fit(recipe, data, config(name, 3, batch_size=48))
    assert any(key.startswith("robust/") for key in lines[-1])


@pytest.mark.parametrize("name", NAMES)
def test_trains_in_bf16(name: str, data: RetrievalData) -> None:
    """Gradient penalties and softmaxes stay in float32; the loop would refuse a loss that is not finite."""
    lines = fit(
        HashingRecipe(make_hasher(name, data), make_objective(name)),
        data,
        replace(config(name, 3), precision="bf16"),
    )
    assert len(lines) == 3


def test_end_epoch_of_dadh_is_in_the_checkpoint(data: RetrievalData) -> None:
    objective = make_objective("dadh")
    fit(HashingRecipe(make_hasher("dadh", data), objective), data, config("dadh", 1))
    assert set(objective.saved_state()["joint_codes"].unique().tolist()) == {-1.0, 1.0}


def test_critics_look_at_keyed_places(data: RetrievalData) -> None:
    """The same step of the same run looks at the same interpolates, whatever the global stream; the next at
    others."""

    def told(objective: HashObjective) -> LossTerms:
        torch.rand(3)
        return objective.critic(outputs, batch)

    hasher, objective = make_hasher("dadh", data), make_objective("dadh")
    HashingRecipe(hasher, objective).setup(data, 0, 32)
    batch = data.train.batch(torch.arange(32))
    with torch.no_grad():
        outputs = hasher(batch.inputs)
    first, again = told(objective), told(objective)
    objective.advance()
    later = told(objective)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["critic/features"], later["critic/features"])


def test_initial_nets_follow_the_seed_alone() -> None:
    labels, widths = torch.eye(4), {"image": 6, "text": 6}

    def state(name: str, seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 2)
        objective = make_objective(name)
        objective.setup(facts_of(labels, 4, seed, widths=widths))
        return {key: value.clone() for key, value in objective.state_dict().items()}

    for name in ("dadh", "cpah", "daph"):
        one, same, other = state(name, 0), state(name, 0), state(name, 1)
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert any(not torch.equal(one[key], other[key]) for key in one)


# --- CPAH's encoders


@pytest.fixture
def part() -> CommonPrivate:
    torch.manual_seed(0)
    inner = build("text-encoder", {"name": "mlp", "widths": [12]}, vocabulary=10)
    return CommonPrivate(inner, 8)


def test_common_and_private_add_up_to_the_whole(part: CommonPrivate) -> None:
    bags = torch.rand(6, 10)
    for mode in (True, False):  # the mask is there at test too
        part.train(mode)
        state = copy.deepcopy(part)
        common, shown = part(bags)
        whole = state.layers(state.inner(bags)[0])
        mask = torch.sigmoid(state.mask(whole))
        assert torch.equal(common, mask * whole)
        torch.testing.assert_close(common + shown["private"], whole, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(shown["private"], (1 - mask) * whole, rtol=1e-5, atol=1e-6)
        assert common.shape == (6, 8)


@pytest.mark.parametrize("name", ["cpah", "dadh", "daph"])
def test_drfgd_purifies_the_queries_of_its_papers_targets(name: str, data: RetrievalData) -> None:
    hasher = make_hasher(name, data)
    fit(HashingRecipe(hasher, make_objective(name)), data, config(name, 6, lr=1e-2))
    before = copy.deepcopy(hasher.state_dict())
    purifiers = {"image": {"name": "drfgd-image", "width": 4}, "text": {"name": "drfgd-text", "hidden": 16}}
    texts = {"name": "drfgd", "modality": "text", "steps": 1}
    whole = purified(hasher, purifiers, "query")
    recipe = Regenerate(
        whole, make_objective(name), drfgd(steps=1), texts, reconstruction=1.0, discrimination=0.0
    )
    optim = {"purifier": OptimConfig("adam", 1e-2, weight_decay=0.0)}
    lines = fit(recipe, data, TrainConfig(6, 16, optim, Schedule("constant"), device="cpu"))
    for modality in ("image", "text"):
        assert lines[-1][f"{modality} alignment"] < lines[0][f"{modality} alignment"]
    for key, value in whole.bare().state_dict().items():
        assert torch.equal(value, before[key]), key


def test_cpah_hasher_is_rebuilt_from_its_spec(data: RetrievalData) -> None:
    hasher = make_hasher("cpah", data).eval()
    again = build_hasher(**hasher.spec).eval()
    again.load_state_dict(hasher.state_dict())
    batch = data.query.batch(torch.arange(3))
    ours, theirs = hasher(batch.inputs), again(batch.inputs)
    for name in ("image", "text"):
        assert torch.equal(ours[name].logits, theirs[name].logits)
        assert ours[name].aux["private"].shape == ours[name].features.shape
