"""T14: a rounding layer hides every gradient of a linear hash. Gradients find nothing; questions find the
hole."""

from __future__ import annotations

import torch
from helpers import LinearHead, make_data
from torch import Tensor, nn

from robusthash.attacks.published import guided_apgd
from robusthash.attacks.query_search import Square, _bump, _two_bumps
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import make_context
from robusthash.models.hasher import Hasher
from robusthash.robustness.specs.oracle_attacks import OracleAttack

EPS = 12 / 255


class Rounded(nn.Module):
    """Pixels rounded to 17 levels, centred and laid flat: the gradient is zero wherever it exists."""

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (values * 16).round().flatten(1) / 16 - 0.5, {}


def test_random_search_beats_a_masked_victim_where_apgd_does_not() -> None:
    data = make_data()
    weight = torch.randn(12, 3 * 12 * 12, generator=torch.Generator().manual_seed(0))
    victim = Hasher({"image": Rounded()}, {"image": LinearHead(weight - weight.mean(1, keepdim=True))})
    context = make_context(victim, data, batch_size=12)
    ap = context.select(context.query_labels, 1)
    clean = ap(context.query.signs())

    attack = guided_apgd(eps=EPS, steps=10)
    by_gradient = GradientAttack("guided", attack).run(context, 0, 0)
    assert torch.equal(by_gradient.signs[:, 0], context.query.signs()), "a zero gradient leads nowhere"

    square = OracleAttack("square", Square(), attack.threat, "codes", "ap", 80)
    after = ap(square.run(context, 0, 0).signs[:, 0])
    assert float((clean - after).mean()) > 0.1
    assert bool((after <= clean).all())


def test_bumps_are_those_of_the_authors_loop() -> None:
    """Their nested rectangles, written as they write them."""

    def rectangles(rows: int, columns: int) -> Tensor:
        made = torch.zeros(rows, columns, dtype=torch.float64)
        middle = (rows // 2 + 1, columns // 2 + 1)
        row, column = middle[0] - 1, middle[1] - 1
        for count in range(max(middle)):
            span = 2 * count + 1
            top, left = max(row, 0), max(column, 0)
            made[top : min(row + span, rows), left : min(column + span, columns)] += 1 / (count + 1) ** 2
            row, column = row - 1, column - 1
        return made

    for rows, columns in ((1, 3), (2, 5), (4, 8), (7, 7)):
        assert torch.allclose(_bump(rows, columns), rectangles(rows, columns))
    for side in (1, 2, 3, 8):
        both = _two_bumps(side)
        assert both.shape == (side, side)
        assert float(both.norm()) == 1.0 or abs(float(both.norm()) - 1.0) < 1e-6
    assert bool((_two_bumps(4)[:2] > 0).all())
    assert bool((_two_bumps(4)[2:] < 0).all())
