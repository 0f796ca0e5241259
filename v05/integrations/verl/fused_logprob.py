"""`linear_logprob` with the signature of verl's fused log-prob."""

import torch.distributed as dist
from torch import Tensor

from v05.kernels import linear_logprob

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy, in the place of `verl.utils.kernel.linear_cross_entropy`.

    Args:
        hidden: `[..., H]` floating.
        weight: `[V, H]`: the output layer, or this rank's rows of it.
        labels: `[...]` int64.
        temperature: divides the logits.
        reduction: of the log-probs: `"none"`, `"sum"` or `"mean"`; entropy is never reduced.
        dist_process_group: ranks among which the vocabulary is split.

    Returns:
        `(logprobs, entropy)`, float32: `[T]` each, T the number of labels; logprobs a scalar where reduced.

    Raises:
        ValueError: an unknown reduction, or shapes and values that `linear_logprob` does not allow.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; allowed: {', '.join(map(repr, REDUCTIONS))}")
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    logprobs, entropy = linear_logprob(flat, weight, targets, temperature=temperature, group=dist_process_group)
    return (logprobs if reduction == "none" else getattr(logprobs, reduction)()), entropy
