"""SFCL: masks, fusion, the estimates of information, labels and signs, as the paper and its repairs define
them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robusthash.core.types import Batch, HashOutput, Outputs
from robusthash.defenses.sfcl import LabelScorer, Redundancy, SFCLOuter, wrong_labels
from robusthash.models.sfcl import Exchange, Separation, SFCLEncoder
from robusthash.objectives import CodeMemory, TrainFacts
from robusthash.objectives.cross_modal import SFCLObjective

GFNET = {"name": "gfnet", "size": 16, "patch": 4, "dim": 8, "depth": 1}
SMALL = {"name": "small", "width": 4, "grid": 1}


def features(items: int = 5, width: int = 6) -> Tensor:
    return torch.randn(items, width, generator=torch.Generator().manual_seed(0))


def fixed(r: Tensor, tau: float = 1.0) -> Separation:
    """A separation whose r does not depend on the features."""
    made = Separation(len(r), 4, tau)
    with torch.no_grad():
        made.score[2].weight.zero_()
        made.score[2].bias.copy_(r)
    return made


# --- separation


@pytest.mark.parametrize("tau", [0.1, 1.0, 2.0])
def test_outside_training_the_mask_is_a_sigmoid(tau: float) -> None:
    made, f = Separation(6, 4, tau).eval(), features()
    torch.testing.assert_close(made.mask(f), torch.sigmoid(made.score(f) / tau), atol=1e-6, rtol=0)
    assert torch.equal(made.mask(f), made.mask(f))


@pytest.mark.parametrize("training", [True, False])
def test_the_parts_add_to_the_features(training: bool) -> None:
    made, f = Separation(6, 4).train(training), features()
    robust, rest = made(f)
    torch.testing.assert_close(robust + rest, f)
    assert bool((robust.abs() <= f.abs()).all())
    assert bool((robust * f >= 0).all())


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_the_share_of_open_masks_does_not_depend_on_tau(tau: float) -> None:
    """m > 1/2 exactly where r + g1 - g2 > 0, and a difference of two Gumbels is standard logistic."""
    r = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    made = fixed(r, tau).train()
    torch.manual_seed(0)
    share = (made.mask(torch.ones(20_000, 5)) > 0.5).float().mean(0)
    torch.testing.assert_close(share, torch.sigmoid(r), atol=0.015, rtol=0)


def test_the_noise_is_the_two_way_gumbel_softmax() -> None:
    """The same distribution as the form of the paper, by quantiles."""
    torch.manual_seed(0)
    r, tau, draws = 0.7, 0.5, 100_000
    ours = fixed(torch.tensor([r]), tau).train().mask(torch.ones(draws, 1)).flatten()
    g = -torch.log(-torch.log(torch.rand(2, draws).clamp(1e-6, 1 - 1e-6)))
    rh = torch.sigmoid(torch.tensor(r))
    logits = torch.stack([(torch.log(rh) + g[0]) / tau, (torch.log(1 - rh) + g[1]) / tau])
    theirs = torch.softmax(logits, 0)[0]
    levels = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(ours.quantile(levels), theirs.quantile(levels), atol=0.015, rtol=0)


def test_a_hard_mask_is_binary_and_has_the_gradient_of_the_soft_one() -> None:
    torch.manual_seed(0)
    soft, hard = Separation(6, 4).eval(), Separation(6, 4, hard_eval=True).eval()
    hard.load_state_dict(soft.state_dict())
    grads = []
    for made in (soft, hard):
        f = features().requires_grad_(True)
        made.mask(f).sum().backward()
        grads.append(f.grad)
    torch.testing.assert_close(*grads)
    assert float(grads[0].abs().sum()) > 0
    assert torch.equal(hard.mask(features()).detach(), (soft.score(features()) >= 0).float())


# --- fusion


def test_without_weights_the_exchange_adds_half_of_gamma() -> None:
    made, f = Exchange(6, 3, gamma=0.1), features()
    nn.init.zeros_(made.linear.weight)
    torch.testing.assert_close(made(f, features(5, 3)), f + 0.05)


def test_the_encoder_is_the_equations() -> None:
    torch.manual_seed(0)
    encoder = SFCLEncoder(SMALL, GFNET, width=12, hidden=5).eval()
    x = torch.rand(3, 3, 16, 16)
    out, shown = encoder(x)
    fs, ff = encoder.backbones["spatial"](x)[0], encoder.backbones["frequency"](x)[0]
    ps = fs * torch.sigmoid(encoder.separations["spatial"].score(fs))
    pf = ff * torch.sigmoid(encoder.separations["frequency"].score(ff))
    one, two = encoder.exchanges
    left = ps + one.gamma * torch.sigmoid(pf @ one.linear.weight.T)
    right = pf + two.gamma * torch.sigmoid(ps @ two.linear.weight.T)
    torch.testing.assert_close(out, encoder.fusion(torch.cat([left, right], 1)))
    expected = {
        "spatial": fs,
        "spatial+": ps,
        "spatial-": fs - ps,
        "frequency": ff,
        "frequency+": pf,
        "frequency-": ff - pf,
    }
    assert shown.keys() == expected.keys() == encoder.aux_widths.keys()
    for name, value in expected.items():
        torch.testing.assert_close(shown[name], value)
        assert value.shape[1] == encoder.aux_widths[name]


# --- what the domains share with the labels, and with each other


def test_a_scorer_that_knows_nothing_gives_minus_log_u() -> None:
    scorer = LabelScorer(6, 3, classes=4)
    nn.init.zeros_(scorer.score.weight)
    sets, own = torch.eye(4)[:3], torch.tensor([0, 1, 2, 1, 0])
    value = scorer(features(), features(5, 3), sets, own)
    assert value.item() == pytest.approx(-math.log(3), abs=1e-6)


def test_a_scorer_is_an_mlp_on_the_concatenation() -> None:
    torch.manual_seed(0)
    scorer = LabelScorer(6, 3, classes=4, hidden=7)
    sets, own, f, g = torch.eye(4), torch.tensor([3, 1, 2, 1, 0]), features(), features(5, 3)
    weight = torch.cat([scorer.features.weight, scorer.labels.weight], 1)
    rows = [torch.cat([f, g, row.expand(5, 4)], 1) @ weight.T + scorer.features.bias for row in sets]
    scores = torch.cat([scorer.score(torch.relu(row)) for row in rows], 1)
    expected = (scores[torch.arange(5), own] - torch.logsumexp(scores, 1)).mean()
    torch.testing.assert_close(scorer(f, g, sets, own), expected)
    assert expected.item() < 0


def test_redundancy_of_equal_and_of_unlike_features() -> None:
    """Projections of the same orthonormal vectors: log softmax with 10 on the diagonal and 0 elsewhere."""
    made = Redundancy(4, 4, "frozen", size=4)
    with torch.no_grad():
        for weight in made.projections:
            weight.copy_(torch.eye(4))
    x = torch.eye(4)
    assert made(x, x).item() == pytest.approx(10 - math.log(math.exp(10) + 3), abs=1e-5)
    assert made(x, torch.ones(4, 4)).item() == pytest.approx(-math.log(4), abs=1e-5)


@pytest.mark.parametrize("kind", ["reversed", "frozen"])
def test_the_critic_of_redundancy_ascends_what_the_encoder_descends(kind: str) -> None:
    torch.manual_seed(0)
    made = Redundancy(6, 6, kind, size=4)
    left = features(8).requires_grad_(True)
    right = features(8).roll(1, 0)
    before = made(left, right)
    before.backward()
    with torch.no_grad():
        assert float(made(left - 0.05 * left.grad, right)) < float(before)  # a step of the encoder
        if kind == "frozen":
            assert all(weight.grad is None for weight in made.projections)
            return
        for weight in made.projections:
            weight -= 0.01 * weight.grad  # a step of the optimiser, which descends
        assert float(made(left, right)) > float(before)


# --- the labels that the non-robust part is taught


def test_wrong_labels_by_hand() -> None:
    labels = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    probabilities = torch.tensor(
        [[0.9, 0.6, 0.5], [0.9, 0.2, 0.3], [0.9, 0.9, 0.0], [0.9, 0.9, 0.9], [0.1, 0.3, 0.2]]
    )
    expected = torch.tensor([[0.0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
    assert torch.equal(wrong_labels(probabilities, labels), expected)


def test_wrong_labels_never_overlap_the_true_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(500, 6, generator=generator) < 0.4).float()
    wrong = wrong_labels(torch.rand(500, 6, generator=generator), labels)
    assert float((wrong * labels).sum()) == 0.0
    assert bool((wrong.sum(1) > 0)[labels.sum(1) < 6].all())


WIDTHS = {
    f"{name}{part}": width for name, width in (("spatial", 6), ("frequency", 4)) for part in ("", "+", "-")
}


def ready(**options: object) -> SFCLOuter:
    outer = SFCLOuter(**options)  # type: ignore[arg-type]
    outer.setup(TrainFacts(8, 4, torch.eye(3)[torch.arange(8) % 3], 0, 0.3, {}, {"image": WIDTHS}))
    return outer


def test_the_auxiliary_loss_falls_towards_the_labels() -> None:
    """The sign that the text means: it falls as p+ nears l, and putting the true label into l' raises it."""
    outer = ready()
    labels = torch.eye(3)[:2]
    wrong = torch.tensor([[0.0, 1, 0], [0, 0, 1]])

    def heads(plus: Tensor, minus: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits given outright: the heads are made to pass the first three features on."""
        for head in outer.heads.values():
            head[0] = nn.Identity()
            head[1] = nn.Identity()
            head[2] = nn.Identity()
        shown = {f"{name}+": plus for name in ("spatial", "frequency")}
        shown |= {f"{name}-": minus for name in ("spatial", "frequency")}
        return shown, minus

    def value(plus: Tensor, minus: Tensor, wanted: Tensor = wrong) -> float:
        shown, _ = heads(plus, minus)
        return float(outer._auxiliary(shown, shown, labels, wanted))

    right, opposite = 4.0 * (2 * labels - 1), 4.0 * (2 * wrong - 1)
    near = math.log1p(math.exp(-4.0))
    assert value(right, opposite) == pytest.approx(2 * 2.5 * near, rel=1e-4)
    assert value(torch.zeros(2, 3), torch.zeros(2, 3)) == pytest.approx(2 * 2.5 * math.log(2), rel=1e-5)
    assert value(right, opposite) < value(0.5 * right, opposite) < value(torch.zeros(2, 3), opposite)
    assert value(right, opposite, labels) > value(right, opposite)


# --- the semantic loss


def semantic(
    intra: float, modalities: tuple[str, ...] = ("image", "text")
) -> tuple[SFCLObjective, Outputs, Batch, CodeMemory]:
    """An objective over six training items, three of them in the batch."""
    made = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]])
    memory = CodeMemory(6, 4, labels, modalities)
    for codes in memory.codes.values():
        codes.data = torch.tanh(torch.randn(6, 4, generator=made))
    logits = {name: torch.randn(3, 4, generator=made).requires_grad_(True) for name in modalities}
    outputs = {name: HashOutput(v, torch.tanh(v), v) for name, v in logits.items()}
    return SFCLObjective(intra=intra, eta=0.3), outputs, Batch({}, labels[:3], torch.arange(3)), memory


@pytest.mark.parametrize("intra", [0.0, 1.0, 0.5])
def test_the_semantic_loss_is_the_sum_of_four_likelihoods(intra: float) -> None:
    """Eq. 11 and 12 by loops over every pair, in plain numbers."""
    objective, outputs, batch, memory = semantic(intra)
    terms = objective(outputs, batch, memory)
    expected = {"intra": 0.0, "inter": 0.0, "regularisation": 0.0}
    for a, output in outputs.items():
        for b, codes in memory.codes.items():
            total = 0.0
            for i in range(3):
                for j in range(6):
                    theta = float(output.code[i].detach() @ codes[j]) / 2
                    similar = float(batch.labels[i] @ memory.labels[j] > 0)
                    total += math.log1p(math.exp(theta)) - similar * theta
            expected["intra" if a == b else "inter"] += (intra if a == b else 1.0) * total / 18
        expected["regularisation"] += 0.3 * float((output.code - output.code.sign()).square().mean().detach())
    assert {name: float(value.detach()) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_the_intra_modal_term_reaches_both_modalities() -> None:
    """Alone, Eq. 11 gives images and texts a gradient; each does not depend on the other's memory."""
    objective, outputs, batch, memory = semantic(1.0)
    codes = [output.code for output in outputs.values()]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(objective(outputs, batch, memory)["intra"], codes)

    grads = gradients()
    assert all(bool((g != 0).any()) for g in grads)
    memory.codes["text"].data.neg_()
    again = gradients()
    torch.testing.assert_close(again[0], grads[0])
    assert not torch.equal(again[1], grads[1])


def test_the_semantic_loss_over_images_alone_has_no_inter_modal_term() -> None:
    objective, outputs, batch, memory = semantic(1.0, ("image",))
    assert set(objective(outputs, batch, memory)) == {"intra", "regularisation"}


def test_the_settings_of_dcmh_pull_to_the_shared_code_and_balance_bits() -> None:
    objective, outputs, batch, memory = semantic(1.0)
    objective.settings = "dcmh"
    terms = objective(outputs, batch, memory)
    shared = [[sum(float(c[i, k]) for c in memory.codes.values()) >= 0 for k in range(4)] for i in range(3)]
    codes = [output.code.detach() for output in outputs.values()]
    pull = sum(
        (float(c[i, k]) - (1 if shared[i][k] else -1)) ** 2 for c in codes for i in range(3) for k in range(4)
    )
    skew = sum((sum(float(c[i, k]) for i in range(3)) / 3) ** 2 for c in codes for k in range(4))
    assert float(terms["regularisation"].detach()) == pytest.approx(0.3 * pull / 24, rel=1e-5)
    assert float(terms["balance"].detach()) == pytest.approx(0.3 * skew / 8, rel=1e-5)
    with pytest.raises(ValueError, match="'printed' or 'dcmh', got 'dpsh'"):
        SFCLObjective(settings="dpsh")  # type: ignore[arg-type]


def test_a_negative_weight_of_the_semantic_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        SFCLObjective(intra=-1.0)
