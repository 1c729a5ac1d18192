"""Optimiser groups of parts of the hasher: what each name covers, what is frozen, and what is refused
when."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Interrupted, MemoryLog, make_data, small_hasher
from torch import nn

from robusthash.apps.experiment.config import Config, ConfigError, load_config, make_config
from robusthash.apps.experiment.training_stages import train_config
from robusthash.data import RetrievalData
from robusthash.data.synthetic import synthetic
from robusthash.models import Hasher, build_hasher
from robusthash.models.heads import MLPHead
from robusthash.objectives import CSQ, DPSH
from robusthash.training import HashingRecipe, OptimConfig, Schedule, TrainConfig, fit
from robusthash.training.optimiser_groups import NAMES, divided, part

SGD = OptimConfig("sgd", 0.05, momentum=0.9, weight_decay=1e-3)


@pytest.fixture(scope="module")
def pairs() -> RetrievalData:
    return synthetic(size=12, train=48, query=12, database=36)


@pytest.fixture(scope="module")
def images() -> RetrievalData:
    return make_data()


def two_sided(data: RetrievalData) -> Hasher:
    head = {"name": "mlp", "hidden": [12, 10]}
    image = {"name": "small", "width": 4, "grid": 1}
    text: dict[str, Any] = {"name": "mlp", "widths": [16], "batchnorm": True, "dropout": 0.3}
    return build_hasher(bits=8, image=image, text=text, head=head, vocabulary=data.vocabulary)


def training(epochs: int = 2, **optim: OptimConfig) -> TrainConfig:
    return TrainConfig(epochs, 16, {"hasher": SGD, **optim}, Schedule("constant"), device="cpu")


def names_of(hasher: Hasher, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in hasher.named_parameters() if id(parameter) in wanted}


def starting(hasher: Hasher, *begin: str) -> set[str]:
    return {name for name, _ in hasher.named_parameters() if name.startswith(begin)}


# --- what each name covers


def test_each_name_covers_what_it_says(pairs: RetrievalData) -> None:
    hasher = two_sided(pairs)
    covers = {name: names_of(hasher, part(hasher, name)) for name in NAMES}
    assert covers["image"] == starting(hasher, "encoders.image", "heads.image")
    assert covers["text"] == starting(hasher, "encoders.text", "heads.text")
    assert covers["backbone"] == starting(hasher, "encoders.")
    assert covers["head"] == starting(hasher, "heads.")
    assert covers["image-backbone"] == starting(hasher, "encoders.image")
    assert covers["text-backbone"] == starting(hasher, "encoders.text")
    assert covers["image-head"] == starting(hasher, "heads.image")
    assert covers["text-head"] == starting(hasher, "heads.text")
    assert covers["conv"] == starting(hasher, "encoders.image"), (
        "the small net is convolutions and BatchNorm alone"
    )
    assert all(covers.values())


def test_convolutions_of_alexnet_leave_its_wide_layers() -> None:
    hasher = build_hasher(bits=8, image="alexnet")
    assert names_of(hasher, part(hasher, "conv")) == starting(hasher, "encoders.image.trunk.features")
    assert part(hasher, "text") == []


def test_the_more_specific_name_wins(pairs: RetrievalData) -> None:
    """text-head over head over text over hasher, and every parameter is in exactly one share."""
    hasher, center = two_sided(pairs), nn.Parameter(torch.zeros(3))
    rates = {"text-head": 4.0, "text": 2.0, "head": 3.0, "hasher": 1.0}
    groups, frozen = divided(hasher, {"hasher": [*hasher.parameters(), center]}, rates)
    shares = groups["hasher"].shares
    assert frozen == []
    assert names_of(hasher, shares["text-head"]) == starting(hasher, "heads.text")
    assert names_of(hasher, shares["head"]) == starting(hasher, "heads.image")
    assert names_of(hasher, shares["text"]) == starting(hasher, "encoders.text")
    assert names_of(hasher, shares["hasher"]) == starting(hasher, "encoders.image")
    assert any(parameter is center for parameter in shares["hasher"]), "an objective's own parameters stay"
    assert sorted(map(id, groups["hasher"].parameters)) == sorted(map(id, [*hasher.parameters(), center]))


def test_each_part_steps_by_its_own_rate(pairs: RetrievalData) -> None:
    """One step of plain SGD moves a parameter by its rate times its gradient, which another rate does not
    change."""
    plain = OptimConfig("sgd", 0.01, momentum=0.0, weight_decay=0.0)
    moved = {}
    for key, optim in (("same", {}), ("apart", {"text": replace(plain, lr=0.03)})):
        hasher = two_sided(pairs)
        before = copy.deepcopy(hasher.state_dict())
        config = TrainConfig(1, 48, {"hasher": plain, **optim}, Schedule("constant"), device="cpu")
        fit(HashingRecipe(hasher, DPSH()), pairs, config)
        moved[key] = {name: value.detach() - before[name] for name, value in hasher.named_parameters()}
    for name, step in moved["same"].items():
        factor = 3.0 if ".text." in name else 1.0
        torch.testing.assert_close(moved["apart"][name], factor * step, rtol=1e-3, atol=1e-6)
        assert name.endswith("bias") or step.abs().max() > 0, name


def test_equal_settings_apart_change_nothing(pairs: RetrievalData) -> None:
    together, apart = two_sided(pairs), two_sided(pairs)
    lines = [
        fit(HashingRecipe(together, DPSH()), pairs, training()),
        fit(HashingRecipe(apart, DPSH()), pairs, training(text=SGD, head=SGD)),
    ]
    assert lines[0][-1]["similarity"] == pytest.approx(lines[1][-1]["similarity"], rel=1e-6)
    for (name, ours), (_, theirs) in zip(together.named_parameters(), apart.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


# --- freezing


def test_rate_zero_freezes_weights_and_statistics(pairs: RetrievalData) -> None:
    hasher = two_sided(pairs)
    before = copy.deepcopy(hasher.state_dict())
    fit(HashingRecipe(hasher, DPSH()), pairs, training(**{"image-backbone": replace(SGD, lr=0.0)}))
    for name, value in hasher.state_dict().items():
        same = torch.equal(value, before[name])
        still = name.startswith("encoders.image") or name.endswith((".bounds", ".mean", ".std"))
        assert same == still, name
    assert all(parameter.requires_grad for parameter in hasher.parameters()), (
        "only for as long as training lasts"
    )
    assert hasher.train().encoders["image"].training


def test_what_is_frozen_stays_in_eval_mode(pairs: RetrievalData) -> None:
    hasher = two_sided(pairs)
    hasher.heads["image"].eval()
    hasher.freeze(part(hasher, "text"))
    assert not hasher.encoders["text"].training
    assert not hasher.heads["image"].training, "the mode of what is not frozen is left alone"
    hasher.train()
    assert not any(module.training for module in hasher.encoders["text"].modules()), "dropout and BatchNorm"
    assert hasher.encoders["image"].training
    assert hasher.training
    twin = copy.deepcopy(hasher).train()
    assert not twin.encoders["text"].training
    hasher.freeze([])
    assert hasher.encoders["text"].training
    assert all(parameter.requires_grad for parameter in hasher.parameters())


def test_a_linear_probe_trains_the_head_alone(images: RetrievalData) -> None:
    hasher = small_hasher()
    before = copy.deepcopy(hasher.state_dict())
    optim = {"hasher": replace(SGD, lr=0.0), "head": SGD}
    fit(HashingRecipe(hasher, CSQ()), images, TrainConfig(1, 16, optim, device="cpu"))
    changed = {name for name, value in hasher.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"heads.image.linear.weight", "heads.image.linear.bias"}


@pytest.mark.parametrize("apart", [False, True])
def test_resumed_equals_uninterrupted(pairs: RetrievalData, apart: bool) -> None:
    """With ``hasher`` alone, the checkpoint has the one optimiser state that it always had."""
    extra = {"text": OptimConfig("adam", 1e-3), "conv": replace(SGD, lr=0.0)} if apart else {}
    config, stopped, log = training(3, **extra), MemoryLog(stop_after=1), MemoryLog()
    straight, resumed = two_sided(pairs), two_sided(pairs)
    fit(HashingRecipe(straight, DPSH()), pairs, config, log)
    with pytest.raises(Interrupted):
        fit(HashingRecipe(two_sided(pairs), DPSH()), pairs, config, stopped)
    state = stopped.resume()
    assert state is not None
    assert set(state["optimisers"]) == ({"hasher", "text"} if apart else {"hasher"})
    stopped.stop_after = None
    fit(HashingRecipe(resumed, DPSH()), pairs, config, stopped)
    for (name, ours), (_, theirs) in zip(
        straight.named_parameters(), resumed.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


# --- what is refused


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"critic": SGD}, r"optim\.critic sets a group that this recipe does not have.*hasher"),
        ({"text": SGD}, r"optim\.text sets a group"),
        ({"heads": SGD}, r"did you mean 'head'"),
        ({"head": SGD, "image-head": SGD}, r"optim\.head changes nothing"),
        ({"image": replace(SGD, lr=0.0)}, "nothing would be trained"),
    ],
)
def test_settings_without_effect_are_refused_before_the_first_step(
    images: RetrievalData, optim: dict[str, OptimConfig], said: str
) -> None:
    hasher = small_hasher()
    before = copy.deepcopy(hasher.state_dict())
    with pytest.raises(ValueError, match=said):
        fit(HashingRecipe(hasher, DPSH()), images, training(**optim))
    assert all(torch.equal(value, before[name]) for name, value in hasher.state_dict().items())


def test_a_group_without_parameters_may_have_settings() -> None:
    """A part that an ablation leaves out; its file still holds its settings."""
    hasher = small_hasher()
    groups = {"hasher": list(hasher.parameters()), "critic": []}
    for rates in ({"hasher": 1.0, "critic": 1.0}, {"hasher": 1.0}):
        made, frozen = divided(hasher, groups, rates)
        assert set(made) == {"hasher"}
        assert frozen == []


def plain(**optim: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "training": {"optim": {"hasher": {"name": "adam", "lr": 1e-3, "weight_decay": 0}, **optim}},
    }


def test_a_recipe_file_names_groups_that_there_may_be() -> None:
    for optim, said in (
        ({"hahser": {"lr": 123}}, r"optim\.hahser sets a group.*did you mean 'hasher'"),
        ({"purifier": {"lr": 123}}, r"optim\.purifier sets a group"),
        ({"guide": {"lr": 123}}, r"optim\.guide sets a group"),
        ({"text": {"lr": 123}}, r"optim\.text needs hasher\.text"),
        ({"text-head": {"lr": 123}}, r"optim\.text-head needs hasher\.text"),
        ({"critic": {"lr": 0}}, r"optim\.critic\.lr is 0"),
        ({"head": {"lr": -1}}, "head"),
        ({"head": {"rate": 1}}, "head"),
        ({"head": 3}, "head"),
        ({"head": {"lr": float("inf")}}, r"optim\.head: lr .*finite"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_config(plain(**optim))
    with pytest.raises(ConfigError, match="optim"):
        make_config({"name": "x", "training": {"optim": ["hasher"]}})
    with pytest.raises(ConfigError, match=r"group 'hasher'; add training\.optim\.hasher"):
        make_config({"name": "x", "training": {"optim": {"image": {"lr": 0.1}}}})
    with pytest.raises(ConfigError, match=r"group 'purifier'; add training\.optim\.purifier"):
        make_config({"name": "x", "training": {"recipe": "regenerate", "attack": "mainstay"}})


def test_a_part_takes_from_hasher_what_it_leaves_out(tmp_path: Path) -> None:
    raw = {**plain(text={"lr": "1e-2"}, backbone={"lr": 0}), "hasher": {"text": "mlp"}}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(tmp_path / "both.yaml", ["training.optim.image.lr=5e-4"])
    made = train_config(config).optim
    assert made["text"] == OptimConfig("adam", 1e-2, 0.9, 0.0)
    assert made["image"] == OptimConfig("adam", 5e-4, 0.9, 0.0)
    assert made["backbone"] == OptimConfig("adam", 0.0, 0.9, 0.0)
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again.model_id() == config.model_id()


def test_groups_of_its_own_belong_to_the_identity_of_a_model() -> None:
    assert make_config(plain()).model_id() != make_config(plain(head={"lr": 1e-2})).model_id()


def test_a_purifier_recipe_may_inherit_the_hashers_settings() -> None:
    """It never steps the hasher, but its file extends the one of the hasher."""
    config = load_config("recipes/fashion-drfgd.yaml")
    assert set(config.training.optim) == {"hasher", "purifier", "critic"}
    with pytest.raises(ConfigError, match=r"optim\.head sets a group"):
        load_config("recipes/fashion-drfgd.yaml", ["training.optim.head.lr=0.1"])


def test_a_group_of_the_other_file_is_taken_out_by_null() -> None:
    config = load_config("recipes/pretrained/lite0-ucmerced-csq-drfgd.yaml")
    assert set(config.training.optim) == {"hasher", "purifier", "critic"}
    assert "backbone" in load_config("recipes/pretrained/lite0-ucmerced-csq.yaml").training.optim


# --- heads


def test_a_head_of_several_hidden_layers() -> None:
    head = MLPHead(6, 4, [5, 3])
    shapes = [tuple(value.shape) for value in head.state_dict().values()]
    assert shapes == [(5, 6), (5,), (3, 5), (3,), (4, 3), (4,)]
    x = torch.randn(2, 6)
    w = list(head.state_dict().values())
    expected = torch.relu(torch.relu(x @ w[0].T + w[1]) @ w[2].T + w[3]) @ w[4].T + w[5]
    torch.testing.assert_close(head(x)[0], expected)
    torch.testing.assert_close(head(x)[1], torch.tanh(expected))
    assert MLPHead(6, 4, 5).state_dict().keys() == {
        f"layers.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")
    }
    for bad in ([], [4, 0], 0, "wide", [4, "5"], [2.5], True, None, [[4]]):
        with pytest.raises(ValueError, match="hidden must be"):
            MLPHead(6, 4, bad)


def test_nets_of_the_paper() -> None:
    """AlexNet up to 4096, then 512 and K; words, 4096, 512 and K."""
    with torch.device("meta"):
        hasher = build_hasher(
            bits=16,
            image="alexnet",
            text={"name": "mlp", "widths": [4096]},
            head={"name": "mlp", "hidden": 512},
            vocabulary=1386,
        )
    widths = [m.out_features for m in hasher.modules() if isinstance(m, nn.Linear)]
    assert widths == [4096, 4096, 4096, 512, 16, 512, 16]


def test_a_part_holds_still_for_its_first_epochs() -> None:
    """The backbone is as it came after two epochs and moves in the third; BatchNorm statistics hold with it."""
    data = make_data()
    optim = {"hasher": OptimConfig(lr=0.1), "backbone": OptimConfig(lr=0.1, frozen_epochs=2)}
    states = []
    for epochs in (2, 3):
        hasher = build_hasher(bits=8, image={"name": "small", "width": 4})
        before = {name: value.clone() for name, value in hasher.state_dict().items()}
        fit(HashingRecipe(hasher, CSQ()), data, TrainConfig(epochs, 16, optim, device="cpu"))
        after = hasher.state_dict()
        states.append({name: torch.equal(before[name], value) for name, value in after.items()})
    still, moved = states
    assert all(same for name, same in still.items() if name.startswith("encoders."))
    assert not any(same for name, same in still.items() if name.startswith("heads."))
    weights = [name for name in moved if name.startswith("encoders.") and "normalise" not in name]
    assert not any(moved[name] for name in weights)


def test_frozen_batchnorm_keeps_statistics_while_weights_learn() -> None:
    data = make_data()
    hasher = build_hasher(bits=8, image={"name": "small", "width": 4})
    before = {name: value.clone() for name, value in hasher.state_dict().items()}
    fit(HashingRecipe(hasher, CSQ()), data, TrainConfig(1, 16, batchnorm="frozen", device="cpu"))
    for name, value in hasher.state_dict().items():
        learned = name.endswith((".weight", ".bias"))
        assert torch.equal(before[name], value) != learned, name
    with pytest.raises(ValueError, match="batchnorm must be one of train, frozen, got 'off'"):
        TrainConfig(batchnorm="off")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frozen_epochs must be at least 0, got -1"):
        OptimConfig(frozen_epochs=-1)
