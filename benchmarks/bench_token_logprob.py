"""token_logprob with entropy beside what a trainer would write, torch.compile of it, TRL, verl and Liger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contender, compiled, of_backends, rival
from benchmarks.rivals import forward_backward, without_gradient
from benchmarks.timing import Run
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
        both = utils.selective_log_softmax_and_entropy
        return lambda x: tuple(values.float() for values in both(x, targets))

    def verl(functional: ModuleType) -> Both:
        chosen, entropy = functional.logprobs_from_logits, functional.entropy_from_logits
        return lambda x: (chosen(x, targets, inplace_backward=False).float(), entropy(x).float())

    return {
        OURS: ("", lambda: lambda x: token_logprob(x, targets)),
        "torch eager": ("", lambda: lambda x: eager(x, targets)),
        "torch.compile": ("", lambda: lambda x: compiled(eager)(x, targets)),
        "TRL": ("trl.trainer.utils", trl),
        "verl": ("verl.utils.torch_functional", verl),
    }


def flash_attn(logits: Tensor, targets: Tensor, backward: bool, device: torch.device) -> Contender:
    """flash-attn's cross-entropy, which is our log-prob with the sign turned."""
    name = "flash-attn, no entropy"
    if backward or device.type != "cuda":
        return Contender(name, None, "has no entropy, so another gradient" if backward else "needs a GPU")

    def make(module: ModuleType) -> Run:
        return without_gradient(lambda: (-module.cross_entropy_loss(logits, targets)[0],))

    return rival(name, "flash_attn.ops.triton.cross_entropy", make)


def case(rows: int, columns: int, dtype: torch.dtype, backward: bool, device: torch.device, seed: int = 0) -> Case:
    rng = torch.Generator(device).manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=rng, device=device) * 3).to(dtype)
    targets = torch.randint(columns, (rows,), generator=rng, device=device)
    upstream = [torch.randn(rows, generator=rng, device=device) for _ in range(2)]

    def timed(both: Both) -> Run:
        return forward_backward(both, logits, upstream) if backward else without_gradient(lambda: both(logits))

    contenders = [
        rival(name, modules, lambda *loaded, make=make: timed(make(*loaded)))
        for name, (modules, make) in functions(targets).items()
    ]
    contenders += of_backends(lambda name: timed(lambda x: token_logprob(x, targets, backend=name)), device)
    contenders.append(flash_attn(logits, targets, backward, device))
    contenders.append(Contender("Liger", None, "no log-prob with entropy of given logits"))
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
        elements=elements,
        another=lambda other: case(rows, columns, dtype, backward, device, other),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    full = (LARGE if device.type == "cuda" else []) + FULL
    for rows, columns, dtype in (QUICK if quick else full) + [TINY]:
        for backward in (False, True):
            yield case(rows, columns, dtype, backward, device)
