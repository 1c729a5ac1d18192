"""The codes that are certified: majorities under noise by l2 radius, or a net's own codes by L-inf budget.

Randomised smoothing (Cohen, Rosenfeld and Kolter, "Certified adversarial robustness via randomized
smoothing", ICML 2019): where a bit is +1 with probability p > 1/2 under noise N(0, sigma^2 I), its majority
stays +1 within the l2 radius sigma Phi^-1(p) (Theorem 1, Equation 3, with p_B = 1 - p), for each of K bits.

Differs from their Algorithm CERTIFY: a bit has two values, so the votes that bound p also choose the
majority (a two-sided interval, half of the error on each side) and no separate sample selects it; the error
is divided by K (Bonferroni), so that all radii of a query hold together. As there, a bit whose interval
holds 1/2 abstains: its radius is 0, and it may take either value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Norm
from robusthash.core.identity import identity
from robusthash.core.runtime import Draws, Progress
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import BlockRunner
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.purifier import Encode, Purifier
from robusthash.models.surrogate_gradients import NoiseAveraged, keyed_noise
from robusthash.robustness.certificates.interval_tensor import IntervalBounds
from robusthash.robustness.specs.adaptive_attacks import Adaptive


@dataclass(frozen=True)
class MajorityBits:
    """(Q, K) int8 signs by majority, and (Q, K) float64 certified l2 radii, 0 where a bit abstains."""

    signs: Tensor
    radii: Tensor

    def free(self, radius: float) -> Tensor:
        """(Q, K) bool: the bits that a change of at most ``radius`` may flip, for all that is proven."""
        return self.radii <= radius


def least_probability(votes: Tensor, samples: int, error: float) -> Tensor:
    """Clopper-Pearson lower bound of a probability: it fails with probability ``error`` at most.

    Args:
        votes: successes among ``samples`` independent trials, of any shape.

    Returns:
        float64, the ``error`` quantile of Beta(votes, samples - votes + 1); 0 without a success.
    """
    from scipy.special import betaincinv  # half a second to import

    successes = votes.to(torch.float64)
    bound = betaincinv(successes.clamp(min=1).numpy(), (samples - successes + 1).numpy(), error)
    return torch.where(successes > 0, torch.from_numpy(bound), 0.0)


def majority_bits(votes: Tensor, samples: int, sigma: float, alpha: float) -> MajorityBits:
    """Signs and certified radii from votes; all K radii of a query hold with probability 1 - ``alpha``.

    Args:
        votes: (Q, K) samples under noise whose bit is +1, of ``samples`` in all.
        sigma: standard deviation of the noise, in units of the range of the input.
    """
    from scipy.special import ndtri  # half a second to import

    error = alpha / (2 * votes.shape[1])
    plus = votes * 2 >= samples
    least = least_probability(torch.where(plus, votes, samples - votes), samples, error)
    radii = sigma * torch.from_numpy(ndtri(least.clamp(min=0.5).numpy()))
    return MajorityBits(torch.where(plus, 1, -1).to(torch.int8), radii)


def furthest_radius(samples: int, sigma: float, alpha: float, bits: int) -> float:
    """The radius of a bit that all samples agree on: no number of votes certifies more."""
    return float(majority_bits(torch.full((1, bits), samples), samples, sigma, alpha).radii[0, 0])


def noise_votes(
    hasher: Hasher,
    modality: str,
    inputs: Tensor,
    keys: Sequence[str],
    sigma: float,
    samples: int,
    draws: Draws,
    at_once: int = 256,
) -> Tensor:
    """(B, K) int64 number of samples, of ``samples`` under N(0, sigma^2 I), in which each bit is +1.

    Args:
        hasher: the base hasher; its own noise, where it draws some, is part of what the majority is over.
        inputs: (B, ...).
        keys: of each item, such as the hash of its content: with ``draws`` they alone choose its noise.
        at_once: samples encoded at a time; they change numbers by float rounding alone.
    """
    votes = torch.zeros(len(inputs), hasher.bits, dtype=torch.int64)
    with frozen(hasher), torch.inference_mode():
        for row, key in enumerate(keys):
            scope = draws.within(key)
            generator = scope.generator()
            with keyed_noise(scope.within("own").key(), hasher.device):
                for count in _parts(samples, at_once):
                    noise = torch.randn(count, *inputs.shape[1:], generator=generator)
                    noisy = inputs[row : row + 1].to(hasher.device) + sigma * noise.to(hasher.device)
                    signs = hasher.compared(hasher({modality: noisy})[modality].logits)
                    votes[row] += (signs > 0).sum(0).cpu()
    return votes


def _parts(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


class GaussianNoise(Purifier):
    """x + N(0, sigma^2 I), drawn again at each call and not cut to [0, 1]; then the purifier that was there.

    Not cut, since a bound on the majority needs noise that is the same around every input.
    """

    declares = "randomised"

    def __init__(self, sigma: float, then: Purifier | None = None) -> None:
        super().__init__()
        self.sigma = sigma
        self.then = then

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = x + self.sigma * torch.randn_like(x)
        return (noisy, {}) if self.then is None else self.then(noisy, encode)


def noisy_hasher(hasher: Hasher, modality: str, sigma: float) -> Hasher:
    """The hasher behind Gaussian noise in one modality, declared ``randomised``; its modules are shared."""
    parts = dict(hasher.purifiers)
    noise = GaussianNoise(sigma, parts.get(modality))  # type: ignore[arg-type]
    result = hasher.with_parts(purifiers={modality: noise})
    result.declared = "randomised"
    return result.train(hasher.training)


Cached = Callable[[str, Callable[[], Tensor]], Tensor]
"""(name, work) -> the tensor that the work gives, or gave when it was first done."""


class CertifiedCodes(ABC):
    """The codes that are certified, their free bits by budget, and their codes under attack."""

    norm: Norm
    signs: Tensor  # (Q, K) int8 of the clean queries

    def __init__(self, context: EvaluationContext, cached: Cached) -> None:
        self.context = context
        self.cached = cached

    @abstractmethod
    def free(self, radius: float) -> Tensor:
        """(Q, K) bool: bits that may take either value within the budget."""

    @abstractmethod
    def block(self, spec: GradientAttack, restart: int, block: int) -> Tensor:
        """(B, K) int8 codes of a block of queries under attack."""

    def notes(self, budgets: Sequence[float]) -> tuple[str, ...]:
        return ()

    def attacked(self, spec: GradientAttack, restart: int, title: str, progress: Progress) -> Tensor:
        """(Q, K) int8 codes under attack, block by block."""
        parts = []
        for block in range(self.context.blocks):
            parts.append(self.block(spec, restart, block))
            progress(block + 1, self.context.blocks, title)
        return torch.cat(parts)


class SmoothedCodes(CertifiedCodes):
    """Majorities under Gaussian noise, by l2 radius."""

    norm = "l2"

    def __init__(
        self,
        context: EvaluationContext,
        cached: Cached,
        progress: Progress,
        sigma: float,
        samples: int,
        alpha: float,
    ) -> None:
        super().__init__(context, cached)
        self.sigma, self.samples, self.alpha = sigma, samples, alpha
        self.noisy = replace(context, victim=noisy_hasher(context.victim, "image", sigma))
        self.runner = BlockRunner(self.noisy)
        votes = []
        for block in range(context.blocks):
            votes.append(cached(f"votes-{block}", partial(self._votes, block, None, "clean")))
            progress(block + 1, context.blocks, "votes")
        self.majorities: MajorityBits = majority_bits(torch.cat(votes), samples, sigma, alpha)
        self.signs = self.majorities.signs

    def free(self, radius: float) -> Tensor:
        return self.majorities.free(radius)

    def block(self, spec: GradientAttack, restart: int, block: int) -> Tensor:
        view = NoiseAveraged()
        averaged = Adaptive(spec.name, spec.attack, spec.restarts, view=view, view_name=repr(view))
        name = f"{spec.name}-{identity(averaged.settings())}-{restart}"

        def votes() -> Tensor:
            return self._votes(block, self.runner.block(averaged, restart, block).inputs, name)

        counted = self.cached(f"{name}-{block}", votes)
        return torch.where(counted * 2 >= self.samples, 1, -1).to(torch.int8)

    def _votes(self, block: int, inputs: Tensor | None, name: str) -> Tensor:
        batch = self.context.batch(block)
        keys = [bytes(self.context.queries.hashes[row]).hex() for row in batch.ids.tolist()]
        draws = Draws(self.context.seed, ("smoothing", name))
        values = batch.inputs["image"] if inputs is None else inputs
        return noise_votes(self.context.victim, "image", values, keys, self.sigma, self.samples, draws)

    def notes(self, budgets: Sequence[float]) -> tuple[str, ...]:
        furthest = furthest_radius(self.samples, self.sigma, self.alpha, self.context.victim.bits)
        if budgets[-1] < furthest:
            return ()
        return (
            f"no bit is certified from {furthest:.3f} on with sigma {self.sigma:g} and {self.samples} "
            "samples: more noise reaches further, more samples a little",
        )


class BoundedCodes(CertifiedCodes):
    """The hasher's own codes, by interval bounds over L-inf balls."""

    norm = "linf"

    def __init__(self, context: EvaluationContext, cached: Cached, progress: Progress) -> None:
        super().__init__(context, cached)
        self.signs = context.query_codes.signs()
        self.bounds, self.progress = IntervalBounds(context.victim, "image"), progress
        self.runner = BlockRunner(context)

    def free(self, radius: float) -> Tensor:
        parts = []
        for block in range(self.context.blocks if radius else 0):
            parts.append(self.bounds.free(self.context.batch(block).inputs["image"], radius))
            self.progress(block + 1, self.context.blocks, f"bounds within {radius:g}")
        return torch.cat(parts) if parts else torch.zeros_like(self.signs, dtype=torch.bool)

    def block(self, spec: GradientAttack, restart: int, block: int) -> Tensor:
        name = f"{spec.name}-{identity(spec.settings())}-{restart}-{block}"
        return self.cached(name, lambda: self.runner.block(spec, restart, block).signs[:, 0])
