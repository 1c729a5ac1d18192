"""The column-wise solver of database codes: exact against brute force, never rising, blockwise, and shy of
ties."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import facts_of, image_batch, output_of
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.objectives import TrainFacts
from robusthash.objectives.adsh import ADSH, DiscreteMemory, discrete_update, similarity_sums

GAMMA = 3.0


def signed(labels: Tensor, rows: Tensor, dissimilar: float) -> Tensor:
    """(m, n) S' in full."""
    return torch.where(relevant(labels[rows], labels), 1.0, -dissimilar).double()


def value(codes: Tensor, outputs: Tensor, rows: Tensor, s: Tensor, gamma: float = GAMMA) -> float:
    """J(V) as it is written."""
    v, u = codes.double(), outputs.double()
    fit = (u @ v.T - codes.shape[1] * s).square().sum()
    return float(fit + gamma * (u - v[rows]).square().sum())


class Case:
    """n items of three classes, m of them sampled."""

    def __init__(self, n: int, m: int, bits: int, seed: int, dissimilar: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.eye(3)[torch.randint(3, (n,), generator=generator)]
        self.rows = torch.randperm(n, generator=generator)[:m]
        self.outputs = torch.tanh(torch.randn(m, bits, generator=generator))
        self.codes = sign(torch.randn(n, bits, generator=generator))
        self.s = signed(self.labels, self.rows, dissimilar)
        self.sums = similarity_sums(self.labels, self.labels[self.rows], self.outputs, dissimilar)

    def solved(self, codes: Tensor | None = None, gamma: float = GAMMA) -> Tensor:
        return discrete_update(
            self.codes if codes is None else codes, self.outputs, self.rows, self.sums, gamma
        )

    def value(self, codes: Tensor) -> float:
        return value(codes, self.outputs, self.rows, self.s)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dissimilar", [1.0, 0.3])
def test_each_column_is_the_best_of_all(seed: int, dissimilar: float) -> None:
    """Against all 2^n settings of a column, the columns before it updated and those after it not yet."""
    case = Case(n=8, m=5, bits=3, seed=seed, dissimilar=dissimilar)
    solved = case.solved()
    trial = case.codes.clone()
    for k in range(3):
        trial[:, k] = solved[:, k]
        reached = case.value(trial)
        every = []
        for column in itertools.product((-1.0, 1.0), repeat=8):
            other = trial.clone()
            other[:, k] = torch.tensor(column)
            every.append(case.value(other))
        assert reached == pytest.approx(min(every), rel=1e-12)


def test_the_objective_never_rises_and_comes_to_rest() -> None:
    case = Case(n=60, m=25, bits=16, seed=9, dissimilar=0.4)
    codes, values = case.codes, [case.value(case.codes)]
    for _ in range(20):
        after = case.solved(codes)
        # column by column, not only over the sweep
        for k in range(16):
            mixed = torch.cat([after[:, : k + 1], codes[:, k + 1 :]], 1)
            values.append(case.value(mixed))
            assert values[-1] <= values[-2] + 1e-8
        if torch.equal(after, codes):
            break
        codes = after
    else:
        pytest.fail("twenty sweeps and still moving")
    assert values[-1] < values[0]


@pytest.mark.parametrize("block", [1, 7, 60, 1000])
def test_sums_in_blocks_are_the_dense_product(block: int) -> None:
    case = Case(n=60, m=25, bits=16, seed=1, dissimilar=0.25)
    dense = case.s.T @ case.outputs.double()
    torch.testing.assert_close(
        similarity_sums(case.labels, case.labels[case.rows], case.outputs, 0.25, block), dense
    )


def test_a_zero_argument_keeps_the_old_bit() -> None:
    """Outputs of zero say nothing, so no bit may move; one output decides its own row by gamma alone."""
    codes = sign(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    rows = torch.tensor([4, 1])
    outputs, sums = torch.zeros(2, 4), torch.zeros(6, 4).double()
    assert torch.equal(discrete_update(codes, outputs, rows, sums, 5.0), codes)
    outputs = torch.zeros(2, 4)
    outputs[0, 2] = -codes[4, 2] * 0.5
    solved = discrete_update(codes, outputs, rows, sums, 5.0)
    assert solved[4, 2] == -codes[4, 2]
    solved[4, 2] = codes[4, 2]
    assert torch.equal(solved, codes)


def test_a_large_gamma_copies_the_signs_of_the_outputs() -> None:
    case = Case(n=20, m=8, bits=6, seed=3)
    assert torch.equal(case.solved(gamma=1e9)[case.rows], sign(case.outputs))


def test_items_never_sampled_take_the_code_of_their_class() -> None:
    """Outputs of nine items that tell three classes apart settle the codes of all thirty."""
    labels = torch.eye(3)[torch.arange(30) % 3]
    rows = torch.arange(9)
    target = sign(torch.randn(3, 16, generator=torch.Generator().manual_seed(5)))
    codes = sign(torch.randn(30, 16, generator=torch.Generator().manual_seed(6)))
    outputs = labels[rows] @ target * 0.9
    sums = similarity_sums(labels, labels[rows], outputs, 0.5)
    for _ in range(3):
        codes = discrete_update(codes, outputs, rows, sums, 200.0)
    agreement = codes @ target.T / 16
    assert torch.equal(agreement.argmax(1), torch.arange(30) % 3)
    own = agreement[labels > 0]
    assert bool((own > 0.5).all())
    assert bool((own == 1.0)[rows].all()), "sampled items hold to their own outputs, by gamma"


# --- the objective and its memory


def test_loss_and_gradient_are_those_of_the_equations() -> None:
    """L = (1/K) mean_ij (u.V - K S')^2 + gamma / (n K) mean_i ||u_i - V_i||^2, and Eq 28 without its double
    count."""
    generator = torch.Generator().manual_seed(2)
    n, bits, rows = 10, 6, torch.tensor([7, 0, 3])
    labels = torch.eye(2)[torch.arange(n) % 2]
    objective = ADSH(gamma=50.0, soft=False)
    objective.setup(facts_of(labels, bits))
    memory = DiscreteMemory(n, bits, labels, ("image",))
    v = sign(torch.randn(n, bits, generator=generator))
    memory.assign({"image": v})
    logits = torch.randn(3, bits, generator=generator).requires_grad_(True)
    batch = image_batch(torch.zeros(3, 2), labels[rows])
    batch = type(batch)(batch.inputs, batch.labels, rows)
    terms = objective({"image": output_of(logits)}, batch, memory)
    u = torch.tanh(logits.detach())
    error = u @ v.T - bits * signed(labels, rows, 1.0).float()
    assert terms["similarity"].item() == pytest.approx(float(error.square().mean()) / bits, rel=1e-5)
    assert terms["regularisation"].item() == pytest.approx(
        50 / (n * bits) * float((u - v[rows]).square().sum(1).mean()), rel=1e-5
    )
    (grad,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), logits)
    expected = (2 * error @ v + 2 * 50 * (u - v[rows])) * (1 - u.square()) / (3 * n * bits)
    torch.testing.assert_close(grad, expected)


def test_the_soft_constraint_balances_the_pairs() -> None:
    """S' sums to zero over all pairs: few similar pairs among many classes count as much as the others
    together."""
    labels = torch.eye(5)[torch.arange(20) % 5]
    objective = ADSH()
    objective.setup(facts_of(labels, 8))
    assert float(objective.dissimilar) == pytest.approx(0.25)
    assert float(signed(labels, torch.arange(20), float(objective.dissimilar)).sum()) == pytest.approx(
        0.0, abs=1e-4
    )
    with pytest.raises(ValueError, match="all 4 training items have the same"):
        ADSH().setup(TrainFacts(4, 8, torch.ones(4, 1), 0, 1.0))


def test_the_memory_moves_by_solving_alone() -> None:
    labels = torch.eye(2)[torch.arange(6) % 2]
    memory = DiscreteMemory(6, 4, labels, ("image",))
    v = sign(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    memory.assign({"image": v})
    batch = image_batch(torch.zeros(2, 2), labels[:2])
    batch = type(batch)(batch.inputs, batch.labels, torch.tensor([5, 2]))
    output = output_of(torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
    memory.update({"image": output}, batch)
    assert torch.equal(memory.codes["image"], v)
    assert torch.equal(memory.latest["image"][torch.tensor([5, 2])], output.code)
    assert torch.nonzero(memory.seen).flatten().tolist() == [2, 5]
    objective = ADSH(gamma=7.0)
    objective.setup(facts_of(labels, 4))
    rows = torch.tensor([2, 5])
    u = memory.latest["image"][rows].clone()
    sums = similarity_sums(labels, labels[rows], u, float(objective.dissimilar))
    objective.end_epoch(memory)
    assert torch.equal(memory.codes["image"], discrete_update(v, u, rows, sums, 7.0))
    assert not memory.seen.any()
    with pytest.raises(ValueError, match="there are none"):
        objective.end_epoch(memory)
