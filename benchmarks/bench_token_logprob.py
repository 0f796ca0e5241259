"""token_logprob with entropy beside what a trainer would write, torch.compile of it, TRL, verl and Liger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contender, compiled, rival
from benchmarks.rivals import forward_backward, without_gradient
from v05.kernels import token_logprob

Both = Callable[[Tensor], Sequence[Tensor]]
FULL = [(2048, 32000, torch.float32), (2048, 32000, torch.bfloat16), (256, 151936, torch.bfloat16)]
QUICK = [(256, 32000, torch.float32)]
LARGE = [(8192, 151936, torch.bfloat16)]  # on a GPU
TINY = (16, 1024, torch.float32)


def eager(logits: Tensor, targets: Tensor) -> Sequence[Tensor]:
    """log_softmax in float32, gather, and entropy from it."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def functions(targets: Tensor) -> dict[str, tuple[str, Callable[..., Both]]]:
    """Each contender: the modules it needs, and a function of them that makes logits -> (logprob, entropy)."""

    def trl(utils: ModuleType) -> Both:
        chosen, entropy = utils.selective_log_softmax, utils.entropy_from_logits
        return lambda x: (chosen(x, targets).float(), entropy(x).float())

    def verl(functional: ModuleType) -> Both:
        chosen, entropy = functional.logprobs_from_logits, functional.entropy_from_logits
        return lambda x: (chosen(x, targets, inplace_backward=False).float(), entropy(x).float())

    def flash_attn(module: ModuleType) -> Both:
        raise AttributeError("flash-attn's cross-entropy has no entropy and needs a GPU")

    fast = compiled(lambda x: eager(x, targets))
    return {
        OURS: ("", lambda: lambda x: token_logprob(x, targets)),
        "torch eager": ("", lambda: lambda x: eager(x, targets)),
        "torch.compile": ("", lambda: fast),
        "TRL": ("trl.trainer.utils", trl),
        "verl": ("verl.utils.torch_functional", verl),
        "flash-attn": ("flash_attn.ops.triton.cross_entropy", flash_attn),
    }


def case(rows: int, columns: int, dtype: torch.dtype, backward: bool, device: torch.device) -> Case:
    rng = torch.Generator(device).manual_seed(0)
    logits = (torch.randn(rows, columns, generator=rng, device=device) * 3).to(dtype)
    targets = torch.randint(columns, (rows,), generator=rng, device=device)
    upstream = [torch.randn(rows, generator=rng, device=device) for _ in range(2)]
    contenders = []
    for name, (modules, make) in functions(targets).items():

        def bound(*loaded: ModuleType, make: Callable[..., Both] = make) -> Callable[[], Sequence[Tensor]]:
            both = make(*loaded)
            return forward_backward(both, logits, upstream) if backward else without_gradient(lambda: both(logits))

        contenders.append(rival(name, modules, bound))
    contenders.append(Contender("Liger", None, "no log-prob with entropy of given logits on a CPU"))
    elements = rows * columns
    return Case(
        op="token_logprob",
        shape=f"{rows} x {columns}",
        dtype=str(dtype).removeprefix("torch."),
        direction="forward + backward" if backward else "forward",
        bytes=elements * logits.element_size() * (3 if backward else 1) + rows * 16,
        flops=elements * (14 if backward else 6),
        contenders=contenders,
        device=device,
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    full = (LARGE if device.type == "cuda" else []) + FULL
    for rows, columns, dtype in (QUICK if quick else full) + [TINY]:
        for backward in (False, True):
            yield case(rows, columns, dtype, backward, device)
