"""Checks of the victim by its behaviour: repeated passes, precision, train mode, inputs, its class."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robusthash.attacks.threat_model import Threat
from robusthash.core.hamming import sign
from robusthash.core.runtime import default_dtype
from robusthash.core.types import Batch, Inputs
from robusthash.metrics.results import Flag
from robusthash.models.external.wrapper import Broken
from robusthash.models.hasher import Hasher, frozen
from robusthash.robustness.checks.base import CHECKS, above, flag, not_run
from robusthash.robustness.victim_behaviour import mismatches


def require_usable(victim: Hasher, batch: Batch) -> None:
    """Encode a few queries together and one alone, before hours are spent.

    Args:
        batch: clean queries with the modalities that are to be encoded.

    Raises:
        ValueError: NaN or infinite logits, logits that are not (B, bits) numbers, or a model that fails on
            one query.
    """
    for size in (len(batch), 1):
        inputs = {name: values[:size] for name, values in batch.inputs.items()}
        try:
            with frozen(victim), torch.no_grad():
                outputs = victim(inputs)
        except (RuntimeError, IndexError, ValueError) as error:
            if size == 1 and len(batch) > 1:
                raise ValueError(
                    f"the model encodes {len(batch)} queries but fails on one alone "
                    f"({str(error).splitlines()[0]}); it must not squeeze or normalise over the batch"
                ) from error
            raise
        for name, logits in ((name, output.logits) for name, output in outputs.items()):
            if tuple(logits.shape) != (size, victim.bits):
                raise ValueError(
                    f"the model declares {victim.bits} bits and gives {name} logits of shape "
                    f"{tuple(logits.shape)} for {size} queries; it must give ({size}, {victim.bits})"
                )
            if bad := int((~torch.isfinite(logits)).sum()):
                raise ValueError(
                    f"the model gives {bad} NaN or infinite values of {logits.numel()} for {name}; "
                    "train it again with a smaller rate, or look for a division by 0"
                )


def logits_of(victim: Hasher, inputs: Inputs) -> Tensor:
    """(B, K) logits of the first modality, in eval mode."""
    with frozen(victim), torch.no_grad():
        return next(iter(victim(inputs).values())).logits


def f1_repeated(victim: Hasher, inputs: Inputs) -> Flag:
    """Passes over the same inputs. Codes that differ are red; logits alone, or a declared randomness, amber.

    Differs: five passes where two are specified, since two draws of few sizes or masks may well agree.
    """
    first, *others = [logits_of(victim, inputs) for _ in range(5)]
    changed = torch.stack([_other_answer(victim, first, other) for other in others]).any(0)
    differ = float(changed.double().mean())
    if differ > 0:
        return flag("F1", differ, "amber" if victim.declared == "randomised" else "red")
    if max(float((first - other).abs().max()) for other in others) > 1e-4 * first.abs().median().clamp_min(
        1e-12
    ):
        return flag(
            "F1", 0.0, "amber", remedy="the logits change between calls, though no code did: attack by EOT"
        )
    return flag("F1", 0.0, "pass")


def _other_answer(victim: Hasher, first: Tensor, other: Tensor) -> Tensor:
    """(B,) bool: another code; of vectors one that is off by more than rounding."""
    if victim.distance == "hamming":
        return (sign(first) != sign(other)).any(1)
    return (first - other).norm(dim=1) > 1e-4 * first.norm(dim=1)


def f16_precision(victim: Hasher, inputs: Inputs) -> Flag:
    """Codes in float32 against float64, and bits that are nearly 0: |u| under 1e-4 of the median |u|.

    Differs: the specified margin of 1e-4 is relative to the size of the logits, whatever their scale.
    """
    if victim.distance != "hamming":
        return not_run("F16", f"a search by {victim.distance} distance has no bits near 0")
    single = logits_of(victim, inputs)
    try:
        with default_dtype(torch.float64):
            double = logits_of(in_double(victim), as_double(inputs))
    except (RuntimeError, Broken) as error:
        return not_run("F16", f"the model does not run in float64 ({str(error).splitlines()[0]})")
    differ = float((sign(single) != sign(double)).double().mean())
    thin = float((single.abs() < 1e-4 * single.abs().median()).double().mean())
    if differ <= CHECKS["F16"].threshold < thin:
        remedy = f"{thin:.1%} of the bits lie within 1e-4 of 0: enlarge the margins"
        return flag("F16", differ, "amber", remedy=remedy)
    return above("F16", differ)


def in_double(victim: Hasher) -> Hasher:
    """A copy in float64.

    Raises:
        RuntimeError: it cannot be copied, as a scripted model.
    """
    try:
        return copy.deepcopy(victim).double()
    except (TypeError, AttributeError) as error:
        raise RuntimeError(f"it cannot be copied: {error}") from error


def as_double(inputs: Inputs) -> Inputs:
    """The inputs with floating-point values in float64."""
    return {n: values.double() if values.is_floating_point() else values for n, values in inputs.items()}


_FLAG_AT = {"batch_norm": 5}  # position of train or training among the arguments; 2 for every dropout
_TRAINED = {"batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d"}
_TRAINED |= {"alpha_dropout", "feature_dropout", "feature_alpha_dropout"}


class _Watch(TorchFunctionMode):
    """Sees every torch function of a forward pass: calls in train mode, and tensors that carry gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[str] = []
        self.differentiated = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").rstrip("_")
        if name in _TRAINED:
            at = _FLAG_AT.get(name, 2)
            training = kwargs.get("training", kwargs.get("train"))
            if training if training is not None else (len(args) > at and bool(args[at])):
                self.trained.append(name)
        # gradients although the caller has switched them off
        carries = isinstance(result, Tensor) and result.requires_grad
        if carries or func in (torch.autograd.grad, torch.Tensor.backward):
            self.differentiated = True
        return result


def f15_f19_inside(victim: Hasher, inputs: Inputs) -> tuple[Flag, Flag]:
    """Autograd inside the forward pass, and layers that train although the victim was put in eval mode."""
    with frozen(victim), torch.no_grad(), _Watch() as watch:
        victim(inputs)
        stubborn = [name for name, module in victim.named_modules() if module.training]
    count = max(len(watch.trained), len(stubborn))
    names = f" ({', '.join(sorted({*watch.trained, *stubborn})[:3])})" if count else ""
    trained = flag("F19", count, "red" if count else "pass", remedy=CHECKS["F19"].remedy + names)
    return above("F15", float(watch.differentiated)), trained


def f20_range(victim: Hasher, inputs: Inputs, threat: Threat, clean: float, chance: float) -> Flag:
    """Inputs outside the threat's range or normalised twice, or (amber) clean MAP at chance.

    Once normalised by the customary statistics, pixels in [0, 1] lie within 2.7 of 0; twice, they reach 10.
    Only convolutions of an encoder that take the image itself are looked at.
    """
    for name, values in inputs.items():
        low, high = threat.balls[name].bounds
        worst = float(torch.maximum(low - values, values - high).max())
        if worst > 1e-6:
            remedy = f"{name} inputs leave the range [{low:g}, {high:g}] by {worst:g}: "
            remedy += "normalise inside the model only"
            return flag("F20", worst, "red", threshold=0.0, remedy=remedy)
    reached: list[float] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == inputs["image"].shape:
            reached.append(float(args[0].abs().max()))

    layers = [layer for layer in victim.encoders.modules() if isinstance(layer, nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers] if "image" in inputs else []
    logits_of(victim, inputs)
    for handle in handles:
        handle.remove()
    largest = max(reached, default=0.0)
    if largest > CHECKS["F20"].threshold:
        return flag("F20", largest, "red")
    if clean <= chance + 0.02:
        remedy = (
            f"clean MAP {clean:.3f} is at chance {chance:.3f}: untrained, or not normalised as in training"
        )
        return flag("F20", clean, "amber", threshold=chance + 0.02, remedy=remedy)
    return flag("F20", largest, "pass")


def f23_class(victim: Hasher, inputs: Inputs) -> Flag:
    """The declared class against the observed behaviour."""
    reasons = mismatches(victim, inputs)
    remedy = f"{CHECKS['F23'].remedy} ({'; '.join(reasons)})" if reasons else None
    return flag("F23", len(reasons), "red" if reasons else "pass", remedy=remedy)
