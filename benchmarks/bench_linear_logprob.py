"""linear_logprob and linear_policy_loss beside what a trainer would write, TRL, verl, Liger and cut-cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import OURS, Case, Contender, Run, compiled, rival
from benchmarks.rivals import without_gradient
from v05.kernels import linear_logprob, linear_policy_loss, policy_loss

Layer = Callable[[Tensor, Tensor], Sequence[Tensor]]
# Tokens, features, vocabulary: two 8B models and Qwen3-4B on a GPU, a small model on a CPU.
LARGE = [(8192, 4096, 128256), (8192, 4096, 151936), (8192, 2560, 151936)]
SMALL = [(512, 512, 32000)]
QUICK = [(128, 256, 8000)]
CHUNK = 1024  # tokens at a time of the rivals that do not choose themselves
LENGTH = 64  # tokens of a sequence


def rows_of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of a chunk, from float32 logits."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def chosen_of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """The log-prob alone, for a loss that asks for nothing else."""
    return (torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None]).squeeze(1),)


def chunked(part: Callable[..., tuple[Tensor, ...]], hidden: Tensor, weight: Tensor, targets: Tensor):
    """A loop over chunks of tokens, each computed once more in the backward pass."""
    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    parts = [checkpoint(part, some, weight, own, use_reentrant=False) for some, own in pieces]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def functions(targets: Tensor, device: torch.device) -> dict[str, tuple[str, Callable[..., Layer]]]:
    """Each contender: the modules it needs, and a function of them that makes a layer: (logprob, entropy) of both."""
    fast = compiled(rows_of_torch)

    def trl(kernels: ModuleType) -> Layer:
        apply = kernels.ChunkedLogProbFunction.apply
        return lambda x, w: apply(x, w, None, targets, 1.0, 4096, None, 1.0, ("entropy",))[:2]

    def verl_torch(functional: ModuleType) -> Layer:
        return lambda x, w: functional.FusedLinearForPPO(chunk_size=CHUNK)(x, w, targets)

    def verl_triton(module: ModuleType) -> Layer:
        if device.type != "cuda":
            raise AttributeError("verl's Triton kernel needs a GPU")
        return lambda x, w: module.linear_cross_entropy(x, w, targets, 1.0, "none")

    def liger(module: ModuleType) -> Layer:
        apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply

        def run(x: Tensor, w: Tensor) -> Sequence[Tensor]:
            nll, entropy = apply(x, w, targets, 1.0, -100, 1, True)
            return -nll, entropy

        return run

    def cut(module: ModuleType) -> Layer:
        """No entropy: zeros stand for it, so its row says that it differs."""
        return lambda x, w: (
            -module.linear_cross_entropy(x, w, targets, reduction="none").float(),
            x.sum(1).float() * 0,
        )

    return {
        OURS: ("", lambda: lambda x, w: linear_logprob(x, w, targets)),
        "torch chunked": ("", lambda: lambda x, w: chunked(rows_of_torch, x, w, targets)),
        "torch.compile": ("", lambda: lambda x, w: chunked(fast, x, w, targets)),
        "TRL": ("trl.kernels", trl),
        "verl": ("verl.utils.experimental.torch_functional", verl_torch),
        "verl Triton": ("verl.utils.kernel.linear_cross_entropy", verl_triton),
        "Liger": ("liger_kernel.ops.fused_linear_scaled_cross_entropy", liger),
        "cut-cross-entropy": ("cut_cross_entropy", cut),
    }


def with_gradients(function: Layer, leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> Run:
    """Calls function on hidden and weight and backpropagates; returns the outputs and both gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def run() -> Sequence[Tensor]:
        outputs = function(*leaves)
        return (*outputs, *torch.autograd.grad(list(outputs), leaves, list(upstream)))

    return run


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets; logits have a standard deviation of 2."""
    tokens, features, columns = shape
    rng = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, features, generator=rng, device=device).to(dtype)
    weight = (torch.randn(columns, features, generator=rng, device=device) * (2 / features**0.5)).to(dtype)
    return hidden, weight, torch.randint(columns, (tokens,), generator=rng, device=device)


def silent(targets: Tensor, half: bool) -> Tensor:
    """Tokens `[T]` bool whose gradient is 0: in every other sequence, where it is so of half of them, or none."""
    return (torch.arange(len(targets), device=targets.device) // LENGTH % 2 == 0) & half


def described(
    op: str, shape: tuple[int, int, int], hidden: Tensor, products: int, half: bool, contenders: list[Contender]
) -> Case:
    """The case: every operand is read once per product, every gradient written once."""
    tokens, features, columns = shape
    operands = (tokens + columns) * features * hidden.element_size()
    return Case(
        op=op,
        shape=f"{tokens} x {features} x {columns}" + (", half of the gradients 0" if half else ""),
        dtype=str(hidden.dtype).removeprefix("torch."),
        direction="forward" if products == 1 else "forward + backward",
        bytes=operands * (1 if products == 1 else 3),
        flops=2 * tokens * features * columns * products,
        contenders=contenders,
        device=hidden.device,
        tolerance=1e-3 if hidden.dtype == torch.float32 else 5e-2,
    )


def logprob_case(
    shape: tuple[int, int, int], dtype: torch.dtype, backward: bool, half: bool, device: torch.device
) -> Case:
    hidden, weight, targets = inputs(shape, dtype, device)
    upstream = [torch.linspace(-1, 1, len(targets), device=device).masked_fill_(silent(targets, half), 0)] * 2
    contenders = []
    for name, (modules, make) in functions(targets, device).items():

        def bound(*loaded: ModuleType, make: Callable[..., Layer] = make) -> Run:
            layer = make(*loaded)
            if backward:
                return with_gradients(layer, (hidden, weight), upstream)
            return without_gradient(lambda: layer(hidden, weight))

        contenders.append(rival(name, modules, bound))
    products = 2 if half else 3
    return described("linear_logprob", shape, hidden, products if backward else 1, half, contenders)


def policy_case(shape: tuple[int, int, int], dtype: torch.dtype, half: bool, device: torch.device) -> Case:
    """PPO on the log-probs: loss and both gradients."""
    hidden, weight, targets = inputs(shape, dtype, device)
    sequences = len(targets) // LENGTH
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets).logprob + 0.1
    advantages = torch.linspace(-1, 1, sequences, device=device).masked_fill_(silent(targets, half)[::LENGTH], 0)
    weights = torch.full_like(old, 1 / len(old))
    rest = (old, advantages, weights)
    offsets = torch.arange(sequences + 1, device=device) * LENGTH

    def fused(x: Tensor, w: Tensor) -> Sequence[Tensor]:
        return (linear_policy_loss(x, w, targets, *rest, sequence_offsets=offsets).loss,)

    def two_ops(x: Tensor, w: Tensor) -> Sequence[Tensor]:
        return (policy_loss(linear_logprob(x, w, targets).logprob, *rest, sequence_offsets=offsets).loss,)

    def by_torch(x: Tensor, w: Tensor) -> Sequence[Tensor]:
        ratio = (chunked(chosen_of_torch, x, w, targets)[0] - old).exp()
        each = advantages.repeat_interleave(LENGTH)
        return (torch.maximum(-each * ratio, -each * ratio.clamp(0.8, 1.2)).mean(),)

    def liger(module: ModuleType) -> Run:
        own = module.LigerFusedLinearGRPOLoss(beta=0.0, compiled=device.type == "cuda", use_ref_model=False)
        mask = torch.ones(sequences, LENGTH, device=device)

        def run(x: Tensor, w: Tensor) -> Sequence[Tensor]:
            places = (targets.view(sequences, LENGTH), mask, advantages)
            folded = x.view(sequences, LENGTH, -1)
            return (own(folded, w, *places, old_per_token_logps=old.view(sequences, LENGTH))[0],)

        return with_gradients(run, (hidden, weight), upstream)

    upstream = [torch.ones((), device=device)]
    mine = {OURS: fused, "v05, two ops": two_ops, "torch chunked": by_torch}
    contenders = [Contender(name, with_gradients(layer, (hidden, weight), upstream)) for name, layer in mine.items()]
    contenders.append(rival("Liger chunked", "liger_kernel.chunked_loss.grpo_loss", liger))
    return described("linear_policy_loss", shape, hidden, 2 if half else 3, half, contenders)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    on_gpu = device.type == "cuda"
    shapes = QUICK if quick else LARGE if on_gpu else SMALL
    for shape in shapes:
        for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
            yield logprob_case(shape, dtype, False, False, device)
            for half in (False, True):
                yield logprob_case(shape, dtype, True, half, device)
                yield policy_case(shape, dtype, half, device)
