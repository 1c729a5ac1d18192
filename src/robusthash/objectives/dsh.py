"""DSH: contrastive loss on squared distances of real codes, and a pull of every value to +-1."""

from __future__ import annotations

from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.types import HashOutput
from robusthash.objectives.pairwise import WeightedPairs


@register("objective", "dsh", paper="Liu et al., CVPR 2016", evidence="paper+code", state="measured")
class DSH(WeightedPairs):
    """DSH: similar codes together, dissimilar ones at least a margin apart, values near +-1.

    L = (1/K) mean_ij w_ij [S_ij D_ij / 2 + (1 - S_ij) max(0, m - D_ij) / 2] + alpha mean ||v| - 1|, D_ij =
    ||v_i - U_j||^2, which is 4 times the Hamming distance of +-1 codes. The paper's head is ``linear``,
    without tanh; ``tanh`` works as well. One forward and backward pass an item, and O(N K) for its pairs.

    Args:
        margin: m in multiples of K, 2 in the paper: codes half of all bits apart are far enough.
        alpha: weight of the last term, 0.01 as in the paper; DeepHash-pytorch's is 0.1 / K in this form.
        balance: see ``WeightedPairs``; the paper draws pairs from each batch instead.

    Differs: pairs are those of an item with the memory, as in DeepHash-pytorch; all is divided by K, so that
    learning rates do not depend on the bits.
    """

    def __init__(self, margin: float = 2.0, alpha: float = 0.01, balance: bool = False) -> None:
        if margin <= 0:
            raise ValueError(f"margin must be above 0, or nothing keeps codes apart, got {margin:g}")
        super().__init__(balance)
        self.margin = margin
        self.alpha = alpha

    def pair_losses(self, output: HashOutput, similar: Tensor, codes: Tensor) -> Tensor:
        bits = codes.shape[1]
        # by norms and products, since (B, N, K) differences would not fit into memory
        squares = output.code.square().sum(1, keepdim=True) + codes.square().sum(1)
        distances = (squares - 2.0 * output.code @ codes.T).clamp_min(0.0)
        apart = (self.margin * bits - distances).relu()
        return (similar * distances + (1.0 - similar) * apart) / (2.0 * bits)

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.alpha * (output.code.abs() - 1.0).abs().mean(1)
