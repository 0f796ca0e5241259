"""policy_loss (PPO with dual clip) beside torch, eager and compiled, and verl's function.

The torch rivals compute the loss alone, ours the loss and eleven metrics, verl's the loss and three. Sequences have
equal lengths, so verl's padded layout has no padding: the input that favours it most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contender, compiled, of_backends, rival
from benchmarks.rivals import forward_backward
from benchmarks.timing import Run
from v05.kernels import policy_loss

FULL, QUICK = [(4, 1024), (64, 1024), (1024, 1024)], [(4, 1024)]
LARGE = [(16384, 1024)]  # on a GPU
LOW, HIGH, DUAL = 0.2, 0.28, 3.0


def eager(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """The clipped loss over tokens, with an advantage per token."""
    ratio = torch.exp((logprobs - old).clamp(-20, 20))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * DUAL), loss)
    return ((loss * weights).sum(),)


class VerlConfig(SimpleNamespace):
    """The fields that verl's loss reads of its actor's configuration."""

    def get(self, name: str, default: object = None) -> object:
        return getattr(self, name, default)


def case(sequences: int, length: int, device: torch.device, seed: int = 0) -> Case:
    rng = torch.Generator().manual_seed(seed)
    tokens = sequences * length
    logprobs = -torch.randn(tokens, generator=rng).abs().to(device)
    old = (logprobs.cpu() + 0.2 * torch.randn(tokens, generator=rng)).to(device)
    advantages = torch.randn(sequences, generator=rng).to(device)
    weights = torch.full((tokens,), 1 / tokens, device=device)
    offsets = torch.arange(0, tokens + 1, length, device=device)
    per_token = advantages.repeat_interleave(length)
    upstream = [torch.ones((), device=device)]
    options = dict(clip_low=LOW, clip_high=HIGH, dual_clip=DUAL)

    def verl(algos: ModuleType) -> Run:
        shape, mask = (sequences, length), torch.ones(sequences, length, device=device)
        config = VerlConfig(clip_ratio=LOW, clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=DUAL)
        config.global_batch_info = {}
        before, gains = old.view(shape), per_token.view(shape)

        def loss(x: Tensor) -> Sequence[Tensor]:
            return (algos.compute_policy_loss_vanilla(before, x.view(shape), gains, mask, "token-mean", config)[0],)

        return forward_backward(loss, logprobs, upstream)

    def ours(backend: str | None = None) -> Run:
        def loss(x: Tensor) -> Sequence[Tensor]:
            named = dict(sequence_offsets=offsets, backend=backend)
            return (policy_loss(x, old, advantages, weights, **named, **options).loss,)

        return forward_backward(loss, logprobs, upstream)

    def plain(function: Callable[..., Sequence[Tensor]]) -> Run:
        return forward_backward(lambda x: function(x, old, per_token, weights), logprobs, upstream)

    return Case(
        op="policy_loss",
        shape=f"{tokens} tokens, {sequences} sequences",
        dtype="float32",
        direction="forward + backward",
        bytes=tokens * 4 * (3 + 1) + sequences * 12,
        flops=tokens * 12,
        contenders=[
            Contender(OURS, ours()),
            Contender("torch eager", plain(eager)),
            Contender("torch.compile", plain(compiled(eager))),
            *of_backends(ours, device),
            rival("verl", "verl.trainer.ppo.core_algos", verl),
            Contender("TRL", None, "computed inside its trainer, no function to call"),
            Contender("Liger", None, "its GRPO loss on given logits is a GPU kernel"),
        ],
        device=device,
        elements=tokens,
        another=lambda other: case(sequences, length, device, other),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    full = FULL + (LARGE if device.type == "cuda" else [])
    yield from (case(sequences, length, device) for sequences, length in (QUICK if quick else full))
