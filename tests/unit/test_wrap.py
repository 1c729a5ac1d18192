"""A user's own net as a hasher: its range, its bits, its training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import robusthash as rh
from robusthash.models.encoding import encode_signs, weights_digest

BITS = 12


class Net(nn.Module):
    """A small net on pixels in [0, 1]."""

    def __init__(self, scale=1.0, mean=0.0, std=1.0):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, BITS))
        self.scale, self.mean, self.std = scale, mean, std

    def forward(self, x):
        return self.layers((x * self.scale - self.mean) / self.std)


class After(nn.Module):
    """A net and what it does to its numbers."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = Net(), change

    def forward(self, x):
        return self.change(self.net(x))


@pytest.fixture(scope="module")
def data():
    return rh.load_data("synthetic", train=48, query=12, database=36, multilabel=False)


@pytest.fixture(scope="module")
def images(data):
    return data.query.batch(torch.arange(12)).inputs["image"]


def test_the_net_sees_its_own_range(images):
    bare = Net()
    for bounds, mean, std, like in (
        ((0, 1), None, None, Net()),
        ((0, 255), None, None, Net(255.0)),
        ((0, 1), 0.5, 0.25, Net(1.0, 0.5, 0.25)),
        ((0, 255), (120, 110, 100), (60, 61, 62), None),
        ((-1, 1), None, None, Net(2.0, 1.0)),
    ):
        inputs: list[torch.Tensor] = []
        bare.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
        logits = rh.wrap(bare, bits=BITS, bounds=bounds, mean=mean, std=std)({"image": images})[
            "image"
        ].logits
        seen = images * (bounds[1] - bounds[0]) + bounds[0]
        seen = (seen - torch.tensor(mean or 0.0).view(-1, 1, 1)) / torch.tensor(std or 1.0).view(-1, 1, 1)
        torch.testing.assert_close(inputs[0], seen)
        if like is not None:
            torch.testing.assert_close(logits, like(images))


def test_the_range_is_part_of_its_identity():
    net = Net()
    digests = {weights_digest(rh.wrap(net, bits=BITS, bounds=bounds)) for bounds in ((0, 1), (0, 255))}
    assert len(digests) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_net_of_another_precision_gets_its_own(dtype, images):
    logits = rh.wrap(Net().to(dtype), bits=BITS, mean=0.5)({"image": images})["image"].logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, Net(mean=0.5)(images), atol=0.02, rtol=0.05)


def test_the_range_lies_where_the_net_does():
    encoder = rh.wrap(Net().to("meta"), bits=BITS).encoders["image"]
    assert encoder.scale.device.type == encoder.offset.device.type == "meta"


def test_a_net_that_writes_into_its_input_changes_no_image(images):
    class Writer(Net):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    before = images.clone()
    rh.wrap(Writer(), bits=BITS)({"image": images})
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.where(x >= 0, 1.0, -1.0),
        lambda x: torch.where(x >= 0, 1, -1).to(torch.int8),
        lambda x: x >= 0,
        lambda x: (x >= 0).to(torch.uint8),
    ],
)
def test_signs_of_every_notation_are_the_same_code(change, images):
    expected = encode_signs(rh.wrap(Net(), bits=BITS), "image", images)
    victim = rh.wrap(After(change), bits=BITS, output="signs")
    assert torch.equal(encode_signs(victim, "image", images), expected)


def test_a_wrapped_net_is_evaluated_attacked_and_assessed(data):
    victim = rh.wrap(Net(), bits=BITS)
    clean = rh.evaluate(victim, data)["MAP"]
    assert rh.evaluate(victim, data, attack=rh.attacks.mainstay(eps=8 / 255, steps=5))["MAP"] < clean
    result = rh.assess(rh.make_context(victim, data), "smoke", queries=6)
    assert result["wMAP"] < result.reference["clean"]


def test_training_goes_on_from_its_weights(data):
    net = Net()
    first = [parameter.detach().clone() for parameter in net.parameters()]
    victim = rh.wrap(net, bits=BITS)
    recipe, optim = (
        rh.HashingRecipe(victim, rh.objectives.CSQ()),
        {"hasher": rh.training.OptimConfig(lr=1e-3)},
    )
    still = rh.training.OptimConfig(lr=0.0)
    before = rh.evaluate(victim, data)["MAP"]
    with pytest.raises(ValueError, match="every part of the hasher is frozen"):
        rh.fit(recipe, data, rh.TrainConfig(epochs=1, optim={"hasher": still}))
    rh.fit(recipe, data, rh.TrainConfig(epochs=1, batch_size=48, optim=optim))
    moved = [(now - old).abs().max() for now, old in zip(net.parameters(), first, strict=True)]
    assert all(0 < change < 0.02 for change in moved)  # one small step from its own weights
    rh.fit(
        recipe,
        data,
        rh.TrainConfig(epochs=30, batch_size=16, optim={"hasher": rh.training.OptimConfig(lr=0.1)}),
    )
    assert rh.evaluate(victim, data)["MAP"] > before + 0.1


def test_what_cannot_work_is_refused(data, images):
    for signs in (lambda x: x >= 0, torch.sign):
        victim = rh.wrap(After(signs), bits=BITS, output="signs")
        with pytest.raises(ValueError, match="no gradient reaches the weights of After"):
            rh.fit(rh.HashingRecipe(victim, rh.objectives.CSQ()), data, rh.TrainConfig(epochs=1))
    victim = rh.wrap(After(lambda x: x), bits=BITS, output="signs")
    with pytest.raises(ValueError, match=r"After answered .* real numbers are output='logits'"):
        rh.evaluate(victim, data)
    with pytest.raises(ValueError, match=r"Net answered \(12, 12\) to 12 images, and bits=16 needs"):
        rh.wrap(Net(), bits=16)({"image": images})
    with pytest.raises(ValueError, match="After answered a tuple to 12 images"):
        rh.wrap(After(lambda x: (x, x)), bits=BITS)({"image": images})
    for options, said in (
        ({"bounds": (1, 0)}, r"bounds are the least and the largest pixel.* got \(1, 0\)"),
        ({"std": 0}, "std must be above 0, got 0"),
        ({"mean": (1, 2)}, r"mean is a number or one for each of 3 channels, got \(1, 2\)"),
        ({"mean": (123, 117, 104)}, "lies outside of the bounds"),
        ({"bits": 0}, "bits must be a positive whole number, got 0"),
        ({"output": "sings"}, "output must be 'logits', 'signs' or 'float', got 'sings'"),
    ):
        with pytest.raises(ValueError, match=said):
            rh.wrap(Net(), **{"bits": BITS, **options})
    with pytest.raises(ValueError, match=r"wrap takes an nn\.Module, got function"):
        rh.wrap(lambda x: x, bits=BITS)
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(nn.Flatten())
    with pytest.raises(ValueError, match="robusthash audit FILE"):
        rh.wrap(scripted, bits=BITS)


def test_a_net_that_is_not_wrapped_is_told_how(data):
    recipe = rh.HashingRecipe(Net(), rh.objectives.CSQ())
    for use in (lambda: rh.evaluate(Net(), data), lambda: rh.fit(recipe, data, rh.TrainConfig(epochs=1))):
        with pytest.raises(
            ValueError, match=r"a Net is no hasher; wrap .*: robusthash\.wrap\(net, bits=\.\.\.\)"
        ):
            use()
    with pytest.raises(ValueError, match=r"a SearchModel is no hasher; give its \.hasher"):
        rh.evaluate(rh.SearchModel(rh.wrap(Net(), bits=BITS), 16), data)


def test_nets_on_vectors_of_features_are_wrapped():
    vectors = torch.randn(24, 5)
    data = rh.RetrievalData.from_arrays(vectors, [number % 3 for number in range(24)], query=6)
    net = nn.Linear(5, BITS)
    torch.testing.assert_close(rh.wrap(net, bits=BITS)({"image": vectors})["image"].logits, net(vectors))
    assert 0 < rh.evaluate(rh.wrap(net, bits=BITS), data)["MAP"] <= 1
    with pytest.raises(ValueError, match=r"bounds, mean and std are of pixels, .* vectors \(18, 5\)"):
        rh.evaluate(rh.wrap(net, bits=BITS, mean=0.5), data)
    with pytest.raises(ValueError, match=r"takes images .*, and these are \(18, 5\): vectors take the"):
        rh.evaluate(rh.build_hasher(image="small", bits=BITS), data)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_caller_turned_off_are_named(off, data):
    recipe = rh.HashingRecipe(rh.wrap(Net(), bits=BITS), rh.objectives.CSQ())
    with (
        off(),
        pytest.raises(ValueError, match=r"fit needs gradients; call it outside of torch\.no_grad\(\)"),
    ):
        rh.fit(recipe, data, rh.TrainConfig(epochs=1))
    with torch.inference_mode():
        made_inside = rh.wrap(Net(), bits=BITS)
        with pytest.raises(ValueError, match=r"mainstay needs gradients; .* torch\.inference_mode\(\)"):
            rh.evaluate(rh.wrap(Net(), bits=BITS), data, attack="mainstay")
    with pytest.raises(ValueError, match=r"the net was made inside torch\.inference_mode\(\)"):
        rh.evaluate(made_inside, data)


def test_a_single_bit_has_no_ball_of_two(data):
    result = rh.evaluate(rh.build_hasher(image="small", bits=1), data)
    assert "P@r<=2 is undefined: the codes have 1 bits" in result.notes
    assert 0 < result["MAP"] <= 1


def test_a_declared_defense_is_kept(data):
    assert rh.make_context(rh.wrap(Net(), bits=BITS, declared="randomised"), data).randomised
