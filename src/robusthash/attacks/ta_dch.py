"""TA-DCH: a generator towards the code of a target label set and a target text."""

from __future__ import annotations

from dataclasses import replace

from robusthash.attacks.base import Attack
from robusthash.attacks.prosgan import TargetGenerator, generator_attack
from robusthash.core.registry import register


@register(
    "attack",
    "ta-dch",
    paper="Wang et al., IEEE TCSVT 2023",
    evidence="paper+code",
    modality="cross-modal",
    targeted=True,
    published={"epochs": 50, "width": 64, "hidden": 4096, "fit_steps": 8000, "rate": 1e-4},
)
def ta_dch(
    eps: float | None = None,
    epochs: int = 20,
    width: int = 16,
    hidden: int = 512,
    fit_steps: int = 1000,
    rate: float = 1e-3,
    reconstruction: float = 150.0,
    bounded: bool = True,
    generator: str | None = None,
    transfer: bool = False,
) -> Attack:
    """TA-DCH: ProS-GAN on pairs: the prototype is learned of the target's labels and text, fused by gates.

    ``generator`` and ``transfer`` as of ``pros-gan``. The paper trains prototypes for 50 epochs of 10,000
    items (about 8,000 steps) and the generator for 50 at 1e-4.

    Differs: attacks images alone, as the authors' code; codes are of the searched modality (their image codes
    in any direction); the text of a target is that of a training pair with its labels (their test
    draws a pair of the database, which may share labels with the query); labels and texts are fused as
    vectors in place of 16 x 32 x 32 maps; planes stand behind the colours, not between them, which a
    convolution cannot tell; the generator learns within eps, see ``pros-gan``.
    """
    sizes = {"hidden": hidden, "width": width, "steps": fit_steps, "bounded": bounded}
    guide = TargetGenerator(epochs, rate, reconstruction, texts=True, **sizes)  # type: ignore[arg-type]
    guide = replace(guide, pairs_weight=5.0, quantisation=1e-3)
    return generator_attack("ta-dch", guide, eps, generator, transfer)
