"""The codes that are certified: majorities under noise by l2 radius, or a net's own codes by L-inf budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Norm
from robusthash.core.identity import identity
from robusthash.core.runtime import Draws, Progress
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import BlockRunner
from robusthash.models.gaussian_noise import noisy_hasher
from robusthash.models.surrogate_gradients import NoiseAveraged
from robusthash.robustness.certificates.interval_bounds import IntervalBounds
from robusthash.robustness.certificates.majority_bits import MajorityBits, furthest_radius, majority_bits
from robusthash.robustness.certificates.smoothed_votes import noise_votes
from robusthash.robustness.specs.adaptive_attacks import Adaptive

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
