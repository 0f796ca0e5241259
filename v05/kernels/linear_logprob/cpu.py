"""linear_logprob on the CPU: products by csrc/cpu/linear_logprob.cpp, softmaxes by csrc/cpu/token_logprob.cpp."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from v05.kernels import _cpu, segments
from v05.kernels.linear_logprob import one_pass, passes
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.token_logprob import cpu as token_logprob
from v05.kernels.token_logprob.softmax import SKIPPED, Partial, Softmax

SLICE = 4096  # columns of logits that one product makes: fixed, so that a row's sums are always cut the same way


class Cpu:
    """The engine of a CPU."""

    rounds = False
    widest = 2048  # the fastest of 1024 to 16384, by a tenth: what is made of a slice is then still in the cache

    def slice_width(self, columns: int) -> int:
        """Columns of logits in one product."""
        return min(columns, SLICE)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, adds: bool) -> None:
        """out `[m, n]` = left `[m, k]` times right `[n, k]` transposed, or is increased by it; left may be wide.

        An element has the same bits whatever the other rows and columns are, and however many threads there are.
        """
        _cpu.matrix_product(
            segments.DTYPES.index(right.dtype),
            left.dtype == out.dtype,
            (left.data_ptr(), *left.stride()),
            (right.data_ptr(), *right.stride()),
            out.shape[0],
            out.shape[1],
            left.shape[1],
            out.data_ptr(),
            out.stride(0),
            adds,
        )

    def statistics(self, logits: Tensor, given: Inputs) -> Partial | None:
        """Of one slice of logits, of rows that all count; None where one is NaN or inf."""
        targets = given.targets.clamp(min=0)
        _, entropy, statistics, bad = token_logprob.unchecked(
            logits, targets, given.temperatures, given.temperature, SKIPPED
        )
        if bad >= 0:
            return None
        target = logits.gather(1, targets[:, None]).squeeze(1)
        return Partial(statistics[0], statistics[1], entropy, torch.where(given.targets >= 0, target, 0))

    def join(self, slices: list[Partial], given: Inputs) -> Partial:
        """Puts slices of the same rows together, in their order."""
        if len(slices) == 1:
            return slices[0]
        fields = [torch.stack(field) for field in zip(*slices, strict=True)]
        count, rows = fields[0].shape
        joined = fields[0].new_empty(3, rows)
        _cpu.join_slices(
            [field.data_ptr() for field in fields[:3]],
            count,
            rows,
            segments.address(given.temperatures),
            given.temperature,
            joined.data_ptr(),
            joined.dtype == torch.float64,
        )
        return Partial(joined[0], joined[1], joined[2], fields[3].sum(0))

    def gradient(
        self,
        logits: Tensor,
        given: Inputs,
        softmax: Softmax,
        by_logprob: Tensor | None,
        by_entropy: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradient of the logits, in their place or in out."""
        return token_logprob.token_logprob_backward(
            logits,
            given.targets,
            given.temperatures,
            given.temperature,
            SKIPPED,
            softmax.entropy.contiguous(),
            softmax.statistics,
            by_logprob,
            by_entropy,
            logits if out is None else out,
        )

    def buffer_dtype(self, given: Inputs) -> torch.dtype:
        """That of logits."""
        return given.wide

    def gradient_again(
        self, buffer: Tensor, given: Inputs, softmax: Softmax, by_logprob: Tensor | None, by_entropy: Tensor | None
    ) -> Tensor:
        """Gradient of the logits of one slice, which have the bits that they had before."""
        passes.make_logits(self, given, buffer)
        return self.gradient(buffer, given, softmax, by_logprob, by_entropy)


forward = partial(passes.forward, Cpu())
backward = partial(passes.backward, Cpu())
forward_backward = partial(one_pass.forward_backward, Cpu())


def two_passes(given: Inputs, needs: passes.Needs) -> bool:
    """Whether a loss by token is faster here with log-probs before gradients; so it is where products are fast.

    Measured with 256 and 512 tokens and a vocabulary of 32,000: in bfloat16 a tenth faster, and without a float32 copy
    of the weight's gradient; in float32 the one pass is faster by a third.
    """
    return given.weight.dtype == torch.bfloat16
