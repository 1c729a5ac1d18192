"""The published attacks by name: each a composition of guide, loss, search and threat.

``steps`` defaults to 100 everywhere; another count of a paper is registered with the attack (``published``),
and the tier ``paper`` takes it. Budgets are unified: 8/255 in pixels with steps of 1/255, and 0.05 with steps
of 3/500 on continuous text vectors (``modality: text``; ``both`` attacks the pair). Those on a relaxed code
take ``slope``: ``published`` schedules alpha as the papers do, ``one`` fixes it at 1, which is stronger
against hardened models.
"""

from __future__ import annotations

from typing import Any, Literal

from robusthash.attacks.base import Attack
from robusthash.attacks.budgets import Norm
from robusthash.attacks.guides import Anchor, Center, Mainstay, MainstayWeights, Own, Positives, Unguided
from robusthash.attacks.losses import (
    Agreement,
    HAGLoss,
    MaskedForm,
    ObjectiveLoss,
    ScaleFree,
    SDHALoss,
    SDHATargetedLoss,
    SharpBits,
    mainstay_loss,
)
from robusthash.attacks.pgd import APGD, PGD, MomentumSteps, RawGradient
from robusthash.attacks.threat_model import Attacked, Threat, threat_on
from robusthash.core.registry import register
from robusthash.objectives.base import HashObjective

Slope = Literal["published", "one"]
CODE: dict[str, Any] = {"evidence": "paper+code", "state": "measured"}
"""Facts of attacks whose paper and code are both known, and that are measured."""


def steps_on(
    modality: Attacked,
    steps: int,
    step_size: float | None = None,
    random_start: bool = True,
    threat: Threat | None = None,
) -> PGD:
    """PGD with the customary step size of what is attacked, unless another is given.

    In ``l2`` and ``l1`` it is an eighth of the budget, the share that 1/255 has of 8/255.
    """
    customary = 3 / 500 if modality == "text" else 1 / 255
    if threat is not None and (ball := next(iter(threat.balls.values()))).norm in ("l2", "l1"):
        customary = ball.eps / 8 or customary  # no budget is a budget too
    return PGD(steps, customary if step_size is None else step_size, random_start=random_start)


@register("attack", "pgd", paper="Madry et al., ICLR 2018", evidence="paper", state="measured")
def pgd(
    objective: HashObjective,
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    norm: Norm = "linf",
    restarts: int = 1,
    modality: Attacked = "image",
    random_start: bool = True,
) -> Attack:
    """PGD on the hashing objective itself: ascend the similarity loss against the known codes, alpha = 1.

    FGSM is ``steps=1, step_size=eps, random_start=False``. SAAH trains from the clean image
    (``random_start=False``).
    """
    threat = threat_on(modality, eps, norm)
    search = steps_on(modality, steps, step_size, random_start, threat)
    return Attack("pgd", Unguided(), ObjectiveLoss(objective), search, threat, restarts=restarts)


_YANG = "Yang et al., IEEE Trans. Cybernetics 2020"


@register("attack", "hag", paper=_YANG, supervised=False, published={"steps": 2000}, **CODE)
def hag(
    eps: float | None = None,
    steps: int = 100,
    lr: float = 100 / 128,
    slope: Slope = "published",
    modality: Attacked = "image",
) -> Attack:
    """HAG: away from the query's own code; no labels.

    Differs: the score is summed over queries (lr 100 / 128 reproduces the code's batch of 128), so the batch
    size does not matter; codes are those of the returned image.
    """
    threat = threat_on(modality, eps, knowledge="W0")
    return Attack("hag", Own(), HAGLoss(), RawGradient(steps, "sgd", lr), threat, slope)


@register("attack", "sdha", paper="Lu et al., ICMR 2021", published={"steps": 1500}, **CODE)
def sdha(
    eps: float | None = None,
    steps: int = 100,
    lr: float = 0.01,
    slope: Slope = "published",
    modality: Attacked = "image",
) -> Attack:
    """SDHA: away from every relevant training code, nearest first."""
    search = RawGradient(steps, "adam", lr)
    return Attack("sdha", Positives(), SDHALoss(), search, threat_on(modality, eps), slope)


@register(
    "attack",
    "sdha-targeted",
    paper="Lu et al., ICMR 2021",
    targeted=True,
    published={"steps": 1500},
    **CODE,
)
def sdha_targeted(
    eps: float | None = None,
    steps: int = 100,
    lr: float = 0.01,
    slope: Slope = "published",
    modality: Attacked = "image",
) -> Attack:
    """SDHA's targeted form: towards every training code with the target labels, the farthest first."""
    search, threat = RawGradient(steps, "adam", lr), threat_on(modality, eps)
    return Attack("sdha-targeted", Positives(), SDHATargetedLoss(), search, threat, slope, targeted=True)


@register("attack", "cgat", paper="CgAT, WWW 2023", **CODE)
def cgat(
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    slope: Slope = "published",
    restarts: int = 1,
    modality: Attacked = "image",
    random_start: bool = True,
) -> Attack:
    """CgAT: away from the center code of the query's labels.

    The released code has no evaluation attack; steps and slope are those of SAAT, as an earlier state of its
    repository has them.
    """
    search, threat = steps_on(modality, steps, step_size, random_start), threat_on(modality, eps)
    return Attack("cgat", Center(), Agreement(), search, threat, slope, restarts=restarts)


@register("attack", "mainstay", paper="SAAT, TIFS 2023", **CODE)
def mainstay(
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    slope: Slope = "published",
    weights: MainstayWeights = "code",
    form: MaskedForm = "linear",
    norm: Norm = "linf",
    restarts: int = 1,
    modality: Attacked = "image",
    random_start: bool = True,
) -> Attack:
    """Mainstay attack (SAAT): away from the mainstay code of the query's labels. 100 steps in the paper.

    ``form``: ``linear`` is the paper's loss, ``code`` the masked quadratic of the released code.
    ``random_start``: as the code; the paper starts at the clean image, x'_0 = x (``random_start: false``).
    """
    loss, threat = mainstay_loss(form, targeted=False), threat_on(modality, eps, norm)
    search = steps_on(modality, steps, step_size, random_start, threat)
    return Attack("mainstay", Mainstay(weights), loss, search, threat, slope, restarts=restarts)


@register("attack", "mainstay-targeted", paper="SAAT, TIFS 2023", targeted=True, **CODE)
def mainstay_targeted(
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    slope: Slope = "published",
    weights: MainstayWeights = "code",
    form: MaskedForm = "linear",
    norm: Norm = "linf",
    modality: Attacked = "image",
    random_start: bool = True,
) -> Attack:
    """Targeted mainstay attack (SAAT): towards the mainstay code of the target labels. 100 steps there.

    ``random_start``: see ``mainstay``.
    """
    loss, threat = mainstay_loss(form, targeted=True), threat_on(modality, eps, norm)
    search = steps_on(modality, steps, step_size, random_start, threat)
    return Attack("mainstay-targeted", Mainstay(weights), loss, search, threat, slope, targeted=True)


@register("attack", "p2p", paper="Bai et al., ECCV 2020", targeted=True, published={"steps": 2000}, **CODE)
def p2p(
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    slope: Slope = "published",
    modality: Attacked = "image",
) -> Attack:
    """P2P: towards the code of one random database item with the target labels."""
    threat = threat_on(modality, eps, knowledge="W2")
    search = steps_on(modality, steps, step_size, random_start=False)
    return Attack("p2p", Anchor(1), Agreement(), search, threat, slope, targeted=True)


@register("attack", "dhta", paper="Bai et al., ECCV 2020", targeted=True, published={"steps": 2000}, **CODE)
def dhta(
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    slope: Slope = "published",
    modality: Attacked = "image",
) -> Attack:
    """DHTA: towards the majority vote of nine database items with the target labels.

    Differs: sign steps and a budget in pixels (the authors step along the normalised gradient, with 0.032 on
    normalised inputs, about 1.8/255).
    """
    threat = threat_on(modality, eps, knowledge="W2")
    search = steps_on(modality, steps, step_size, random_start=False)
    return Attack("dhta", Anchor(9), Agreement(), search, threat, slope, targeted=True)


@register("attack", "guided-apgd", evidence="own", state="measured")
def guided_apgd(
    eps: float | None = None, steps: int = 100, restarts: int = 1, modality: Attacked = "image"
) -> Attack:
    """Default attack: APGD on the scale-free agreement with the mainstay code; no step size to tune.

    Knows the database codes (W2), and returns the point of lowest exact AP on its path.
    """
    parts = (Mainstay(), ScaleFree(), APGD(steps), threat_on(modality, eps, knowledge="W2"))
    return Attack("guided-apgd", *parts, restarts=restarts, selects=True)


@register("attack", "guided-sharp", evidence="own", state="measured")
def guided_sharp(
    eps: float | None = None, steps: int = 100, restarts: int = 1, modality: Attacked = "image"
) -> Attack:
    """Steps with momentum on nearly the number of bits that agree with the mainstay code, smooth at first.

    Knows the database codes (W2), and returns the point of lowest exact AP on its path.
    """
    parts = (Mainstay(), SharpBits(), MomentumSteps(steps), threat_on(modality, eps, knowledge="W2"))
    return Attack("guided-sharp", *parts, slope="published", restarts=restarts, selects=True)
