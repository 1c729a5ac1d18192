"""Objectives that pull each code to the fixed target code of its class: CSQ, DPN, OrthoHash, and ours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, softplus

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts

_ENUMERABLE = 20  # bits up to which all words are listed
_PAIRS = 1 << 22  # distances held at a time, 16 MB


def hadamard_centers(classes: int, bits: int, draws: Draws, random_rows: bool = False) -> Tensor:
    """(C, K) class centers in {-1, +1}, no two of them the same.

    Rows of the Hadamard matrix and of its negative while K is a power of two; the rest are balanced random
    rows (K // 2 minus ones), drawn again up to 20 times until all are more than K / 4 apart and at least K /
    2 on average. Where no draw meets both, words of a greedy code (up to 20 bits), or the draw of largest
    least distance, whichever is farther apart.

    Args:
        random_rows: take the rows of the Hadamard matrix at random, of 20 draws those with the most different
            bits. The first rows, which are the default, repeat 4 bits for 3 or 4 classes, 8 for 5 to 8, ...

    Raises:
        ValueError: more classes than there are words of K bits.
    """
    if bits <= _ENUMERABLE and classes > 2**bits:
        raise ValueError(f"{classes} classes need centers of their own, and {bits} bits have {2**bits} words")
    rows = torch.empty(0, bits)
    if bits & (bits - 1) == 0:
        from scipy.linalg import hadamard  # slow to import, and only these lengths need it

        square = torch.from_numpy(hadamard(bits)).float()
        order = _random_rows(square, classes, draws) if random_rows else torch.arange(2 * bits)
        rows = torch.cat([square, -square])[order][:classes]
    missing = classes - len(rows)
    if missing == 0:
        return rows
    generator = draws.within("centers").generator()
    best, best_distance = rows, -1.0
    for _ in range(20):
        order = torch.rand(missing, bits, generator=generator).argsort(1)
        candidate = torch.cat([rows, torch.where(order < bits // 2, -1.0, 1.0)])
        least, mean = _distances(candidate)
        if least > bits / 4 and mean >= bits / 2:
            return candidate
        if least > best_distance:
            best, best_distance = candidate, least
    greedy = _greedy_words(classes, bits, best_distance, generator) if bits <= _ENUMERABLE else None
    return best if greedy is None else greedy


def _random_rows(square: Tensor, classes: int, draws: Draws) -> Tensor:
    """(2K,) the rows of a Hadamard matrix in random order, then those of its negative."""
    bits, generator = len(square), draws.within("rows").generator()
    orders = [torch.randperm(bits, generator=generator) for _ in range(20)]
    different = [len(square[order[:classes]].unique(dim=1).T) for order in orders]
    best = orders[different.index(max(different))]
    return torch.cat([best, best + bits])


def _distances(centers: Tensor) -> tuple[float, float]:
    """The least and the mean distance of two centers, in blocks of rows."""
    count, bits = centers.shape
    least, total = float(bits), 0.0
    step = max(1, _PAIRS // count)
    for first in range(0, count, step):
        block = centers[first : first + step]
        gaps = (bits - block @ centers.T) / 2
        total += float(gaps.sum(dtype=torch.float64))
        own = torch.arange(len(block))
        gaps[own, first + own] = bits
        least = min(least, float(gaps.min()))
    return least, total / (count * (count - 1)) if count > 1 else float(bits)


def _greedy_words(classes: int, bits: int, above: float, generator: torch.Generator) -> Tensor | None:
    """(C, K) words of the lexicographic code of largest distance that has C; None unless beyond ``above``.

    The code is linear (Conway and Sloane 1986): each step adds the first word that is far from all its sums.
    """
    words = torch.arange(2**bits)
    digits = (words[:, None] >> torch.arange(bits)) & 1
    for distance in range(bits, int(above), -1):
        nearest, code = digits.sum(1), torch.zeros(1, dtype=torch.int64)
        while bool((far := nearest >= distance).any()):
            first = int(far.to(torch.uint8).argmax())
            nearest = torch.minimum(nearest, nearest[words ^ first])
            code = torch.cat([code, code ^ first])
        if len(code) >= classes:
            rows = code[torch.randperm(len(code), generator=generator)[:classes]]
            return digits[rows].float() * 2 - 1
    return None


@register("objective", "csq", paper="Yuan et al., CVPR 2020", evidence="paper+code", state="measured")
class CSQ(HashObjective):
    """CSQ: central similarity; each code towards the center of its class.

    L = mean softplus(-2 c v) [binary cross-entropy of (1 + tanh v) / 2] + quantisation * mean (|h| - 1)^2.
    The center of a multi-label item is the sign of the sum of its class centers; zero sums are filled from
    one random vector drawn at construction.

    Args:
        quantisation: weight of the last term (1e-4 in CgAT's code, 0.05 in SAAT's).
        random_rows: centers from Hadamard rows drawn at random (ours). The published choice, the first rows,
            repeats itself: six classes at 32 bits have eight different bits.

    Differs: works for any K and C (the center rule of the published codes where they have one).
    """

    centers: Tensor
    filler: Tensor

    def __init__(self, quantisation: float = 1e-4, random_rows: bool = False) -> None:
        super().__init__()
        self.quantisation = quantisation
        self.random_rows = random_rows
        self.register_buffer("centers", torch.empty(0))
        self.register_buffer("filler", torch.empty(0))

    def setup(self, facts: TrainFacts) -> None:
        draws = Draws(facts.seed, ("csq",))
        device = self.centers.device
        self.centers = hadamard_centers(facts.classes, facts.bits, draws, self.random_rows).to(device)
        generator = draws.within("filler").generator()
        self.filler = sign(torch.rand(facts.bits, generator=generator) - 0.5).to(device)

    def targets(self, labels: Tensor) -> Tensor:
        """(B, C) labels -> (B, K) centers in {-1, +1}; ValueError for those of another label system."""
        count, trained = labels.shape[1], len(self.centers)
        if count != trained:
            raise ValueError(
                f"the model was trained by {trained} labels, and these items have {count} "
                "of another system, for which it has no centers: leave out attacks on the trained objective"
            )
        total = labels @ self.centers
        return torch.where(total == 0, self.filler, total.sign())

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        pull = softplus(-2.0 * self.targets(labels) * output.logits / output.scale).mean(1)
        return pull * (labels.sum(1) > 0)  # an item without labels has no center, not the filler

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.quantisation * (output.code.abs() - 1.0).square().mean(1)


@register("objective", "dpn", paper="Fan et al., IJCAI 2020", evidence="paper+code", state="measured")
class DPN(CSQ):
    """DPN: polarisation; L = mean_k max(0, margin - v_k t_k), t the target code of the item's classes.

    Targets are random balanced codes (half of the bits -1), of several classes as in CSQ. v are the logits,
    without tanh: past the margin a bit is at rest, which is what polarises. So an attack on this objective
    gets no gradient from an item whose bits are all at rest: judge the robustness of DPN by attacks with a
    guide.

    Args:
        margin: m, 1.
        on_tanh: feed tanh(v) as SAAT's code does; with margin 1 the hinge is then always active, L = 1 - mean
            h t.
        adaptive: after each epoch a class's target becomes the majority of its items' codes; a tie keeps its
            bit.

    Differs: mean over bits (the authors' code sums them; SAAT's takes the mean). Several classes: the authors
    sum the hinges of each class; ours is the rule of SAAT's code.
    """

    def __init__(self, margin: float = 1.0, on_tanh: bool = False, adaptive: bool = False) -> None:
        super().__init__(quantisation=0.0)
        self.margin = margin
        self.on_tanh = on_tanh
        self.adaptive = adaptive

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)  # the filler
        generator = Draws(facts.seed, ("dpn",)).within("targets").generator()
        order = torch.rand(facts.classes, facts.bits, generator=generator).argsort(1)
        self.centers = torch.where(order < facts.bits // 2, -1.0, 1.0).to(self.filler.device)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        values = output.relaxed() if self.on_tanh else output.logits
        hinge = (self.margin - values * self.targets(labels)).relu().mean(1)
        return hinge * (labels.sum(1) > 0)  # an item without labels has no target

    def end_epoch(self, memory: CodeMemory) -> None:
        if not self.adaptive:
            return
        if memory.labels is None:
            raise ValueError("adaptive targets need labels, and the training split has none")
        codes = torch.stack([sign(codes.detach()) for codes in memory.codes.values()]).sum(0)
        votes = memory.labels.T @ codes
        self.centers = torch.where(votes == 0, self.centers, sign(votes))


@register("objective", "code-softmax", evidence="own")
class CodeSoftmax(CSQ):
    """Code softmax: L = CSQ's L + weight * CE, ours; after OrthoHash's softmax, on the relaxed code.

    CE = -sum_c (y_c / |y|) log softmax_c(scale * mean_k c_k tanh(v_k)) over the centers c of all classes. The
    pull treats bits alone; the softmax weighs an error by the class that it brings nearer, in the loss and in
    an attack that ascends it (``pgd``). An item without labels has no loss. O(C K) an item.

    Args:
        scale: of the mean agreement, which lies in [-1, 1].
        weight: of the cross entropy; without the pull codes learn worse (docs/methods/own-recipe.md).
    """

    def __init__(self, quantisation: float = 1e-4, scale: float = 8.0, weight: float = 1.0) -> None:
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale:g}")
        super().__init__(quantisation)
        self.scale = scale
        self.weight = weight

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        scores = self.scale * output.relaxed() @ self.centers.T / self.centers.shape[1]
        share = labels / labels.sum(1, keepdim=True).clamp_min(1.0)
        cross = -(share * log_softmax(scores, 1)).sum(1)
        return super().similarity(output, labels, codes, code_labels) + self.weight * cross


@register("objective", "orthohash", paper="Hoe et al., NeurIPS 2021", evidence="paper+code", state="measured")
class OrthoHash(CSQ):
    """OrthoHash: softmax over classes of the cosine between logits and the class's fixed random code.

    L = -sum_c (y_c / |y|) log softmax_c(s (cos(z, O_c) - m y_c)), z the logits. Its head is ``batchnorm``,
    which balances each bit; quantisation needs no term of its own, since a cosine of 1 is a code. The loss
    does not change with the size of z. One forward and backward pass an item, and O(C K).

    Args:
        scale: s, 8 in the authors' code.
        margin: m on the own classes' cosine, 0.2 there.

    Differs: batch normalisation is in the head, so that retrieval has the thresholds of training (SAAT's
    code has it inside of the loss alone). Class codes are drawn bit by bit, as by the authors; their search
    for distant codes is left out. An item without labels has no loss.
    """

    def __init__(self, scale: float = 8.0, margin: float = 0.2) -> None:
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale:g}")
        super().__init__(quantisation=0.0)
        self.scale = scale
        self.margin = margin

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)  # the filler of ``targets``
        generator = Draws(facts.seed, ("orthohash",)).within("codes").generator()
        numbers = torch.rand(facts.classes, facts.bits, generator=generator)
        self.centers = torch.where(numbers < 0.5, -1.0, 1.0).to(self.filler.device)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        cosine = normalize(output.logits, eps=1e-8) @ normalize(self.centers).T
        share = labels / labels.sum(1, keepdim=True).clamp_min(1.0)
        return -(share * log_softmax(self.scale * (cosine - self.margin * labels), 1)).sum(1)
