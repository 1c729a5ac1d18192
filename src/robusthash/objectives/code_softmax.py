"""Code softmax: CSQ's pull of each bit, and cross entropy over the agreement with the class codes."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax

from robusthash.core.registry import register
from robusthash.core.types import HashOutput
from robusthash.objectives.centers import CSQ


@register("objective", "code-softmax", evidence="own", state="measured")
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
