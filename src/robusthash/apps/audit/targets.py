"""What an audit is about and what it does to it: the search that a user names, and the hostile lines of each
tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from robusthash.apps.experiment import stages
from robusthash.apps.experiment.run_directory import load_run
from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Anchor, Own
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.pgd import APGD
from robusthash.attacks.published import guided_apgd, mainstay
from robusthash.attacks.query_search import Square
from robusthash.attacks.threat_model import threat_on
from robusthash.core.registry import nearest
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack
from robusthash.models.external.http_endpoint import Endpoint
from robusthash.models.external.loaders import NAMES, load_onnx, load_python, load_torchscript, perceptual
from robusthash.models.external.wrapper import Call, foreign
from robusthash.models.hasher import Hasher, frozen
from robusthash.robustness.specs.oracle_attacks import OracleAttack

_SIZE = 224  # pixels a side, where neither the user nor a run says


@dataclass(frozen=True)
class Tier:
    """How much an audit does.

    Args:
        queries: photographs that ask, under each everyday change.
        attacked: of these, how many are attacked.
        steps: of each attack that follows gradients.
        questions: that a search which only asks may put about one photograph.
    """

    name: str
    queries: int
    attacked: int
    steps: int
    questions: int = 300

    def __post_init__(self) -> None:
        if min(self.queries, self.attacked, self.questions) < 1 or self.steps < 2:
            raise ValueError(
                f"an audit needs queries, attacked queries, questions and 2 steps at least, got {self}"
            )


TIERS = {"smoke": Tier("smoke", 20, 4, 5, 30), "fast": Tier("fast", 200, 12, 20)}


def tier_named(name: str) -> Tier:
    """One of ``TIERS``.

    Raises:
        ValueError: another name.
    """
    if name not in TIERS:
        raise ValueError(f"the tier of an audit must be one of {', '.join(TIERS)}, got {name!r}")
    return TIERS[name]


@dataclass(frozen=True)
class EndpointLimits:
    """How an endpoint may be asked; see ``Endpoint``."""

    budget: int = 5000
    rate: float = 5.0
    timeout: float = 10.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Target:
    """An opened search: a hasher, or an endpoint that answers what it found."""

    name: str  # as the user wrote it
    title: str  # for readers
    hasher: Hasher | None
    gradients: bool
    endpoint: Endpoint | None = None
    radius: int | None = None  # bits that may differ, where its users have a custom
    said: tuple[str, ...] = ()
    foreign: bool = True
    by_torch: bool = False  # torch computes it, so that there should be gradients, whether or not there are


def size_of(target: str, size: int | None) -> int:
    """Pixels a side of what the target is shown: a run's own, else ``size``, else 224.

    Raises:
        ValueError: a size that a run was not trained on, or a run on vectors of features.
    """
    if not _is_run(target):
        return _SIZE if size is None else size
    own = load_run(Path(target)).card()["image_size"]
    if len(own) != 2:
        raise ValueError(
            f"{target} hashes vectors of features, not pixels; only the encoder that made them sees photos"
        )
    if size is not None and size != own[0]:
        raise ValueError(
            f"{target} was trained on images of {own[0]} pixels, and --size says {size}; leave it out"
        )
    return int(own[0])


def open_target(
    target: str, images: Tensor, bits: int | None = None, limits: EndpointLimits | None = None
) -> Target:
    """Open what the user named and look at it on a few of the photographs.

    Args:
        target: a run directory; ``module:name``; a ``.pt`` (TorchScript) or ``.onnx`` file; an ``http(s)``
            address; or ``phash``, ``dhash``, ``whash``, ``pdq``.
        images: (n, 3, H, W) float in [0, 1], n at least 2.
        bits: K where the user knows it.

    Raises:
        ValueError: none of these, or a model that is broken (``Broken``).
        FileNotFoundError, ImportError: a file or a module is missing.
    """
    if target.startswith(("http://", "https://")):
        return _open_endpoint(target, images, bits, limits or EndpointLimits())
    if target in NAMES:
        known = perceptual(target)
        return _made(target, known.title, known, images, bits, radius=known.radius)
    if _is_run(target):
        hasher, _ = stages.load_victim(load_run(Path(target)))
        if "image" not in hasher.modalities:
            raise ValueError(f"{target} hashes {', '.join(hasher.modalities)}, and an audit needs images")
        if bits is not None and bits != hasher.bits:
            raise ValueError(f"{target} has {hasher.bits} bits, and --bits says {bits}; leave it at auto")
        said = f"It is a run of this package ({hasher.declared} defense), so its weights are known to the attacks."
        return Target(
            target,
            "/".join(Path(target).parts[-2:]),
            hasher,
            True,
            said=(said,),
            foreign=False,
            by_torch=True,
        )
    return _open_model(target, images, bits)


def _open_model(target: str, images: Tensor, bits: int | None) -> Target:
    path = Path(target)
    said: list[str] = []
    if path.suffix == ".onnx":
        model, *said = load_onnx(path, images)
    elif path.suffix in (".pt", ".pth", ".ts", ".torchscript"):
        model = load_torchscript(path)
    elif ":" in target:
        model = load_python(target)
    else:
        raise ValueError(
            f"{target!r} is no run directory, module:name, .pt or .onnx file, http address, nor one of "
            f"{', '.join(NAMES)}{nearest(target, NAMES).partition(' Known')[0]}"
        )
    return _made(target, path.name, model, images, bits, tuple(said))


def _is_run(target: str) -> bool:
    return target not in NAMES and Path(target).is_dir()


def _made(
    name: str,
    title: str,
    model: Call,
    images: Tensor,
    bits: int | None,
    said: tuple[str, ...] = (),
    radius: int | None = None,
) -> Target:
    made = foreign(model, images, name, bits)
    by_torch = isinstance(model, nn.Module) or _has_graph(made.hasher, images[:1])
    return Target(
        name, title, made.hasher, made.gradients, None, radius, (*made.said, *said), by_torch=by_torch
    )


def _has_graph(hasher: Hasher, images: Tensor) -> bool:
    """Whether autograd follows the images up to the logits, though the gradients may be 0."""
    with frozen(hasher), torch.enable_grad():
        return hasher({"image": images.clone().requires_grad_(True)})["image"].logits.requires_grad


def _open_endpoint(url: str, images: Tensor, bits: int | None, limits: EndpointLimits) -> Target:
    endpoint = Endpoint(url, limits.budget, limits.rate, limits.timeout, headers=limits.headers)
    answer = endpoint.check_consistency(images[:1])
    if answer.code is None:
        order = "with distances, in their order" if answer.distances else "without distances"
        said = (f"It answers {len(answer.ids)} ids, nearest first, {order}.",)
        return Target(url, url, None, False, endpoint, said=said)
    made = foreign(endpoint, images, url, bits)
    return Target(url, url, made.hasher, False, endpoint, said=made.said)


def hostile_attacks(target: Target, tier: Tier, eps: float) -> list[AttackSpec]:
    """The attacks of an audit: untargeted lines hide a photograph, targeted ones make it look like another.

    Lines that follow gradients know weights and stored codes. A target without gradients, such as a
    perceptual hash or an endpoint, gets those alone that ask.

    Args:
        bench: of the photographs that are attacked.
        eps: budget in pixels, L-infinity.
    """
    lines: list[AttackSpec] = []
    if target.gradients:
        hide = guided_apgd(eps, tier.steps)
        flip = Attack("flip", Own(), ScaleFree(), APGD(tier.steps), threat_on("image", eps, knowledge="W0"))
        known = threat_on("image", eps, knowledge="W2")
        imitate = Attack("imitate", Anchor(1), ScaleFree(), APGD(tier.steps), known, targeted=True)
        lines += [
            GradientAttack("guided-apgd", hide),
            GradientAttack("flip", flip),
            GradientAttack(
                "mainstay", mainstay(eps, tier.steps, step_size=2.5 * eps / tier.steps, slope="one")
            ),
            GradientAttack("imitate", imitate),
        ]
    # judged by bits, since AP is flat while the photograph is still found first
    asked = threat_on("image", eps, knowledge="B2")
    lines.append(OracleAttack("square", Square(), asked, "codes", "moved", tier.questions))
    return lines
