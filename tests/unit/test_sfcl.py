"""SFCL as part of the package: settings, ablations, gradients, training over image and text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Interrupted, MemoryLog, make_data, small_hasher, train_config

from robusthash.attacks.published import dhta, mainstay
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, LossTerms
from robusthash.data import RetrievalData
from robusthash.data.synthetic import synthetic
from robusthash.defenses import AdversarialTraining, Round
from robusthash.defenses.sfcl import SFCLOuter
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import DPSH
from robusthash.training import Moment, OptimConfig, fit

SMALL = {"name": "small", "width": 4, "grid": 1}
GFNET = {"name": "gfnet", "size": 16, "patch": 4, "dim": 8, "depth": 1}
HEAD = {"name": "mlp", "hidden": 16}


def sfcl(**options: Any) -> dict[str, Any]:
    return {"name": "sfcl", "spatial": SMALL, "frequency": GFNET, "width": 12, "hidden": 6, **options}


def pair_hasher(seed: int = 0, **options: Any) -> Hasher:
    text = {"name": "mlp", "widths": [12]}
    return build_hasher(
        bits=8, image=sfcl(**options), text=text, head=HEAD, seed=seed, vocabulary=DATA.vocabulary
    )


DATA = synthetic(train=48, query=12, database=36)
INNER = dhta(steps=2, step_size=4 / 255, slope="one")


def recipe_of(
    hasher: Hasher, outer: SFCLOuter | None = None, attack: Any = INNER, warmup: float = 0.0
) -> Any:
    return AdversarialTraining(
        hasher, DPSH(), attack, SFCLOuter(warmup=warmup) if outer is None else outer, warmup
    )


def one_step(hasher: Hasher, outer: SFCLOuter, attack: Any = INNER, progress: float = 0.5) -> LossTerms:
    recipe = recipe_of(hasher, outer, attack)
    recipe.setup(DATA, 0, 16)
    ((group, terms),) = recipe.step(DATA.train.batch(torch.arange(16)), Moment(0, progress, Draws(0)))
    assert group == "hasher"
    return terms


# --- the encoder


def test_masks_are_declared_and_saved() -> None:
    hasher = build_hasher(bits=8, image=sfcl())
    assert hasher.declared == hasher.spec["declared"] == "mask"
    recipe_of(hasher)
    assert hasher.declared == "mask"  # not merely adversarial
    again = build_hasher(**hasher.spec)
    assert again.declared == "mask"
    again.load_state_dict(hasher.state_dict())
    x = {"image": torch.rand(2, 3, 16, 16)}
    assert torch.equal(again.eval()(x)["image"].logits, hasher.eval()(x)["image"].logits)
    assert build_hasher(bits=8, image=sfcl(separate=False)).declared == "plain"


def test_noise_in_training_only() -> None:
    hasher = build_hasher(bits=8, image={**sfcl(), "spatial": GFNET})  # without batch normalisation
    x = {"image": torch.rand(2, 3, 16, 16)}
    hasher.train()
    assert not torch.equal(hasher(x)["image"].logits, hasher(x)["image"].logits)
    hasher.eval()
    assert torch.equal(hasher(x)["image"].logits, hasher(x)["image"].logits)


@pytest.mark.parametrize("cut", ["spatial", "frequency"])
def test_gradients_reach_the_pixels_through_either_branch(cut: str) -> None:
    """With the other branch's fused input cut off, almost every pixel still has a gradient."""
    hasher = build_hasher(bits=8, image=sfcl()).eval()
    encoder = hasher.encoders["image"]
    encoder.backbones[cut].register_forward_hook(lambda module, x, out: (out[0].detach(), out[1]))
    x = torch.rand(4, 3, 16, 16).requires_grad_(True)
    hasher({"image": x})["image"].logits.square().sum().backward()
    assert x.grad is not None
    assert float((x.grad != 0).float().mean()) > 0.9


def test_two_spatial_backbones_are_a_matter_of_settings() -> None:
    hasher = build_hasher(bits=8, image=sfcl(frequency={**SMALL, "width": 2}))
    shown = hasher({"image": torch.rand(3, 3, 21, 18)})["image"].aux
    assert shown["frequency+"].shape == (3, 8)
    assert shown["spatial+"].shape == (3, 16)


def test_ablations_of_the_encoder() -> None:
    x = torch.rand(3, 3, 16, 16)
    whole = build_hasher(bits=8, image=sfcl()).encoders["image"].eval()
    joined = build_hasher(bits=8, image=sfcl(separate=False)).encoders["image"].eval()
    out, shown = joined(x)
    assert set(shown) == {"spatial", "spatial+", "frequency", "frequency+"} == set(joined.aux_widths)
    assert torch.equal(shown["spatial"], shown["spatial+"])
    flat = build_hasher(bits=8, image=sfcl(fuse=False)).encoders["image"].eval()
    out, shown = flat(x)
    torch.testing.assert_close(out, flat.fusion(torch.cat([shown["spatial+"], shown["frequency+"]], 1)))
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in (whole, joined, flat)]
    assert sizes[0] - sizes[1] == sum(p.numel() for p in whole.separations.parameters())
    assert sizes[0] - sizes[2] == 2 * (16 * 8 + 1)


def test_bad_settings_of_the_encoder() -> None:
    with pytest.raises(ValueError, match="tau"):
        build_hasher(bits=8, image=sfcl(tau=0.0))
    with pytest.raises(ValueError, match="must be a plain image encoder"):
        build_hasher(bits=8, image=sfcl(spatial=sfcl()))
    with pytest.raises(KeyError, match="gfnett"):
        build_hasher(bits=8, image=sfcl(frequency="gfnett"))
    with pytest.raises(ValueError, match="16 x 16 px"):
        build_hasher(bits=8, image=sfcl())({"image": torch.rand(2, 3, 20, 20)})


def test_the_two_layer_head() -> None:
    hasher = build_hasher(bits=8, image=SMALL, head=HEAD)
    assert [layer.weight.shape for layer in hasher.heads["image"].layers[::2]] == [(16, 16), (8, 16)]
    output = hasher({"image": torch.rand(2, 3, 16, 16)})["image"]
    torch.testing.assert_close(output.code, torch.tanh(output.logits))


# --- the outer loss


def test_terms_and_weights() -> None:
    """Weights multiply their terms and nothing else; the warm-up spares the objective."""
    full = one_step(pair_hasher(), SFCLOuter(warmup=0.0))
    sem = [f"{seen}/{term}" for seen in ("clean", "robust") for term in ("similarity", "regularisation")]
    assert list(full) == [*sem, "auxiliary", "complementary/labels", "complementary/redundancy"]
    other = one_step(pair_hasher(), SFCLOuter(warmup=0.0, complementary=0.6, auxiliary=3.0, semantic=1.5))
    early = one_step(pair_hasher(), SFCLOuter(warmup=0.8), progress=0.2)
    for name, value in full.items():
        factor, ramp = {"auxiliary": (3.0, 0.25), "complementary": (2.0, 0.25)}.get(
            name.split("/")[0], (0.5, 1.0)
        )
        torch.testing.assert_close(other[name], factor * value)
        torch.testing.assert_close(early[name], ramp * value)


def test_clean_semantics_alone_keep_their_size() -> None:
    both = one_step(pair_hasher(), SFCLOuter(warmup=0.0))
    clean = one_step(pair_hasher(), SFCLOuter(warmup=0.0, sem_inputs="clean"))
    assert "robust/similarity" not in clean
    torch.testing.assert_close(clean["clean/similarity"], 2.0 * both["clean/similarity"])


def test_ablations_of_the_loss() -> None:
    assert not any("complementary" in name for name in one_step(pair_hasher(), SFCLOuter(complementary=0.0)))
    assert "auxiliary" not in one_step(pair_hasher(separate=False), SFCLOuter())
    assert "auxiliary" not in one_step(pair_hasher(), SFCLOuter(auxiliary=0.0))
    terms = one_step(pair_hasher(fuse=False), SFCLOuter())
    assert {"auxiliary", "complementary/labels"} <= set(terms)


@pytest.mark.parametrize("options", [{}, {"wrong": "target"}, {"redundancy": "frozen"}])
def test_every_part_is_trained(options: dict[str, Any]) -> None:
    hasher, outer = pair_hasher(), SFCLOuter(warmup=0.0, **options)
    terms = one_step(hasher, outer)
    torch.stack(list(terms.values())).sum().backward()
    frozen = options.get("redundancy") == "frozen"
    for name, parameter in [*hasher.named_parameters(), *outer.named_parameters()]:
        if frozen and "projections" in name:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert float(parameter.grad.abs().sum()) > 0, name


def test_untargeted_attacks_serve_too_but_have_no_target_labels() -> None:
    attack = mainstay(steps=1, slope="one")
    assert "auxiliary" in one_step(pair_hasher(), SFCLOuter(), attack)
    with pytest.raises(ValueError, match="targeted inner attack"):
        one_step(pair_hasher(), SFCLOuter(wrong="target"), attack)


def test_what_does_not_fit_is_refused() -> None:
    for options in ({"warmup": 1.0}, {"sem_inputs": "robust"}, {"wrong": "own"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SFCLOuter(**options)
    recipe = AdversarialTraining(small_hasher(), DPSH(), INNER, SFCLOuter())
    with pytest.raises(ValueError, match="needs the two branches of the image encoder 'sfcl'"):
        recipe.setup(make_data(), 0, 16)
    with pytest.raises(ValueError, match="'reversed' or 'frozen'"):
        one_step(pair_hasher(), SFCLOuter(redundancy="joint"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs attacked images"):
        one_step(pair_hasher(), SFCLOuter(), mainstay(steps=1, modality="text"))


def test_a_batch_of_one_label_set_and_of_one_item() -> None:
    """Nothing to tell apart: the estimates are 0, and no term is NaN."""
    outer = SFCLOuter(warmup=0.0)
    recipe = recipe_of(pair_hasher(), outer)
    recipe.setup(DATA, 0, 16)
    recipe.hasher.encoders["image"].backbones["spatial"].requires_grad_(False)
    seen: list[Round] = []
    forward = outer.forward
    outer.forward = lambda turn: seen.append(turn) or forward(turn)  # type: ignore[method-assign]
    ((_, terms),) = recipe.step(DATA.train.batch(torch.tensor([0, 16, 32])), Moment(0, 0.5, Draws(0)))
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    labels = seen[0].batch.labels
    assert labels is not None
    assert len(labels.unique(dim=0)) == 1
    shown = seen[0].clean["image"].aux
    assert outer._complementary(shown, labels)["labels"].item() == 0.0


def test_heads_are_drawn_from_the_seed_and_leave_the_stream_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        outer = SFCLOuter()
        recipe = recipe_of(pair_hasher(), outer)
        torch.manual_seed(5)
        recipe.setup(DATA, seed, 16)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
        return torch.cat([parameter.detach().flatten() for parameter in outer.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


# --- training


def fit_pair(config: Any, log: MemoryLog | None = None, data: RetrievalData = DATA) -> tuple[list[dict], Any]:
    recipe = recipe_of(pair_hasher(seed=3), warmup=0.3)
    return fit(recipe, data, config, log), recipe


def test_resumed_equals_uninterrupted_over_image_and_text() -> None:
    """Gumbel noise, the heads of the outer loss and Adam's moments included."""
    config = replace(train_config(3), optim={"hasher": OptimConfig("adam", 1e-3, weight_decay=0.0)})
    log, stopped = MemoryLog(), MemoryLog(stop_after=1)
    lines, straight = fit_pair(config, log)
    with pytest.raises(Interrupted):
        fit_pair(config, stopped)
    stopped.stop_after = None
    torch.rand(7)
    again, resumed = fit_pair(config, stopped)
    for line, other in zip(lines, again, strict=True):
        assert {**line, "seconds": 0} == {**other, "seconds": 0}
    for name, module in straight.modules().items():
        other = resumed.modules()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items()), name
    assert "outer" in straight.modules()


def test_losses_fall_on_pairs() -> None:
    config = replace(train_config(15), optim={"hasher": OptimConfig("adam", 3e-3, weight_decay=0.0)})
    lines = fit(recipe_of(pair_hasher()), DATA, config)
    sums = [
        sum(value for name, value in line.items() if name not in ("epoch", "lr", "seconds")) for line in lines
    ]
    assert sums[-1] < sums[0] - 1.0
    for name in ("auxiliary", "complementary/labels"):
        assert lines[-1][name] < lines[0][name], name


def test_without_budget_and_weights_it_is_the_objective_on_clean_items() -> None:
    """The engine's own check: nothing of the defense is left but the weight of the objective."""
    attack = replace(INNER, threat=INNER.threat.scaled(0.0))
    recipe = recipe_of(pair_hasher(), SFCLOuter(0.0, 0.0, 2.0, warmup=0.0, sem_inputs="clean"), attack)
    recipe.setup(DATA, 0, 16)
    batch: Batch = DATA.train.batch(torch.arange(16))
    seen: list[Round] = []
    recipe.outer.register_forward_hook(lambda module, turn, out: seen.append(turn[0]))
    ((_, terms),) = recipe.step(batch, Moment(0, 0.5, Draws(0)))
    assert not list(recipe.outer.parameters())
    assert torch.equal(seen[0].attacked.inputs["image"], batch.inputs["image"])
    plain = recipe.plain.objective(seen[0].clean, batch, seen[0].memory)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {f"clean/{name}": 2.0 * value.item() for name, value in plain.items()}
    )
