"""Hash heads: features (B, D) -> (logits (B, K), the code an objective sees (B, K), logit scale)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robusthash.core.registry import register


@register("head", "tanh", state="measured")
class TanhHead(nn.Module):
    """Linear layer and tanh: the head of almost every published deep hashing model."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.linear = nn.Linear(width, bits)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.linear(features)
        return logits, torch.tanh(logits), 1.0


@register("head", "linear", state="measured")
class LinearHead(nn.Module):
    """Linear layer; the objective sees the logits, and attacks divide by their running mean size."""

    size: Tensor

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.linear = nn.Linear(width, bits)
        # running mean of |logit|, so that an attack's tanh does not saturate
        self.register_buffer("size", torch.ones(()))

    def mapped(self, features: Tensor) -> Tensor:
        """Input of the linear layer: the features themselves."""
        return features

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.linear(self.mapped(features))
        if self.training:
            self.size.lerp_(logits.detach().abs().mean().to(self.size.dtype), 0.1)
        return logits, logits, float(self.size)


@register("head", "kernel", paper="SDH, CVPR 2015; SePH, CVPR 2015", evidence="paper", state="measured")
class KernelHead(LinearHead):
    """Linear layer on Gaussian similarities to anchors, exp(-|x - a|^2 / (2 s^2)); for shallow hashing.

    Args:
        anchors: their number M. The recipe ``shallow`` takes training items, and s^2 is then the mean squared
            distance to them; until then they are normal random numbers, and s^2 = D.
    """

    anchors: Tensor
    spread: Tensor

    def __init__(self, width: int, bits: int, anchors: int = 500) -> None:
        if anchors < 1:
            raise ValueError(f"anchors must be at least 1, got {anchors}")
        super().__init__(anchors, bits)
        self.register_buffer("anchors", torch.randn(anchors, width))
        self.register_buffer("spread", torch.full((), float(width)))

    def place(self, items: Tensor) -> None:
        """Take (M, D) features of items as anchors; ``settle`` the spread afterwards."""
        self.anchors.copy_(items)

    def settle(self, features: Tensor) -> None:
        """Set the spread to the mean squared distance of (N, D) features to the anchors."""
        self.spread.copy_(self._squares(features).mean())

    def _squares(self, features: Tensor) -> Tensor:
        squares = features.square().sum(1, keepdim=True) + self.anchors.square().sum(1)
        return (squares - 2.0 * features @ self.anchors.T).clamp_min(0.0)

    def mapped(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, M) similarities."""
        return torch.exp(-self._squares(features) / (2.0 * self.spread.clamp_min(1e-12)))


@register("head", "meta-embedding", paper="LTHNet, SIGIR 2021", evidence="paper+code", state="measured")
class MetaEmbeddingHead(nn.Module):
    """LTHNet's head: class means, weighed by attention and a selector, added to the item's own features.

    d = relu(F features), p = softmax(A d) over classes, m = p M with the class means M of d, e = tanh(S d),
    z = d + e m, code = tanh(H z). M is renewed from the training set before training and after every epoch,
    and attacks differentiate through attention and selector with M fixed.

    Args:
        classes: C, as many as the data set has.
        hidden: width of d, 2000 in the authors' code; ours for small nets is 512.
    """

    means: Tensor

    def __init__(self, width: int, bits: int, classes: int = 10, hidden: int = 512) -> None:
        super().__init__()
        if classes < 1 or hidden < 1:
            raise ValueError(f"classes and hidden must be at least 1, got {classes} and {hidden}")
        self.bits = bits
        self.inner = nn.Linear(width, hidden)
        self.attention = nn.Linear(hidden, classes)
        self.selector = nn.Linear(hidden, hidden)
        self.linear = nn.Linear(hidden, bits)
        self.register_buffer("means", torch.zeros(classes, hidden))

    def direct(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, hidden) d."""
        return torch.relu(self.inner(features))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        direct = self.direct(features)
        memory = self.attention(direct).softmax(1) @ self.means
        logits = self.linear(direct + torch.tanh(self.selector(direct)) * memory)
        return logits, torch.tanh(logits), 1.0


@register("head", "batchnorm", state="measured")
class BatchNormHead(nn.Module):
    """Bias-free linear layer and batch normalisation, which balances each bit (OrthoHash, NeurIPS 2021)."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.linear = nn.Linear(width, bits, bias=False)
        self.norm = nn.BatchNorm1d(bits)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.norm(self.linear(features))
        return logits, torch.tanh(logits), 1.0


@register("head", "mlp", state="measured")
class MLPHead(nn.Module):
    """Linear layers with ReLU between and tanh: the hash layer of SFCL and DSARH.

    Args:
        hidden: width of the hidden layer, 512 in both papers, or the widths of several; DSARH's image net
            after the convolutions is ``[4096, 512]``.
    """

    def __init__(self, width: int, bits: int, hidden: int | Sequence[int] = 512) -> None:
        super().__init__()
        sizes = list(hidden) if isinstance(hidden, Sequence) else [hidden]
        if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(f"hidden must be widths of at least 1 (without: 'tanh'), got {hidden!r}")
        self.bits = bits
        layers: list[nn.Module] = []
        for inputs, outputs in zip((width, *sizes), sizes, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], bits))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.layers(features)
        return logits, torch.tanh(logits), 1.0


def dense(inputs: int, widths: Sequence[int], dropout: float = 0.0, batchnorm: bool = False) -> nn.Sequential:
    """Linear layers of ``widths``, each with ReLU; ``batchnorm`` before it, ``dropout`` after it.

    Raises:
        ValueError: no width, or one below 1.
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be at least one positive number, got {list(widths)}")
    layers: list[nn.Module] = []
    for before, after in zip((inputs, *widths), widths, strict=False):
        layers.append(nn.Linear(before, after))
        layers += [nn.BatchNorm1d(after)] if batchnorm else []
        layers.append(nn.ReLU())
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)
