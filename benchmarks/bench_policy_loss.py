"""policy_loss (PPO with dual clip, GSPO) beside torch, eager and compiled, and verl's; from logits, beside Liger's.

The torch rivals compute the loss alone, ours the loss and eleven metrics, verl's the loss and three. Sequences have
equal lengths, so that padded layouts have no padding, and torch reads one advantage a sequence: the input that favours
them most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contender, compiled, of_backends, rival
from benchmarks.rivals import forward_backward
from benchmarks.timing import Run
from v05.kernels import policy_loss, token_logprob

FULL, QUICK = [(4, 1024), (64, 1024), (1024, 1024)], [(4, 1024)]
LARGE = [(16384, 1024)]  # on a GPU
LOGITS, LOGITS_LARGE = (4, 64, 32000, torch.float32), (8, 1024, 151936, torch.bfloat16)
LOW, HIGH, DUAL = 0.2, 0.28, 3.0


def eager(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """The clipped loss over tokens; all `[B, L]` but advantages, which may be `[B, 1]`."""
    ratio = torch.exp((logprobs - old).clamp(-20, 20))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * DUAL), loss)
    return ((loss * weights).sum(),)


def packed(sequences: int, length: int, device: torch.device, seed: int) -> list[Tensor]:
    """logprobs, old_logprobs, advantages, weights and sequence_offsets, the mean over tokens as the weights."""
    rng = torch.Generator().manual_seed(seed)
    tokens = sequences * length
    logprobs = -torch.randn(tokens, generator=rng).abs()
    old = logprobs + 0.2 * torch.randn(tokens, generator=rng)
    advantages, weights = torch.randn(sequences, generator=rng), torch.full((tokens,), 1 / tokens)
    offsets = torch.arange(0, tokens + 1, length)
    return [values.to(device) for values in (logprobs, old, advantages, weights, offsets)]


def eager_by_sequence(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """GSPO's clipped loss (arXiv 2507.18071): a ratio per sequence; all `[B, L]` but advantages `[B, 1]`."""
    mean = (logprobs - old).mean(1, keepdim=True)
    ratio = torch.exp((logprobs - logprobs.detach() + mean.detach()).clamp(-20, 20))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH))
    return ((loss * weights).sum(),)


def case(sequences: int, length: int, device: torch.device, level: str = "token", seed: int = 0) -> Case:
    """PPO with dual clip by token, or GSPO, where every token waits for its whole sequence."""
    tokens, shape, gspo = sequences * length, (sequences, length), level == "sequence"
    logprobs, old, advantages, weights, offsets = packed(sequences, length, device, seed)
    padded = (old.view(shape), advantages[:, None], weights.view(shape))
    by_torch = eager_by_sequence if gspo else eager
    upstream = [torch.ones((), device=device)]
    bounds = dict(clip_low=LOW, clip_high=HIGH) | ({} if gspo else dict(dual_clip=DUAL))

    def verl(algos: ModuleType, configs: ModuleType) -> Run:
        mask, gains = torch.ones(shape, device=device), padded[1].expand(shape)
        own = dict(clip_ratio=LOW, clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=DUAL)
        config = configs.ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **own)
        loss = algos.compute_policy_loss_gspo if gspo else algos.compute_policy_loss_vanilla
        rest = (gains, mask, "seq-mean-token-mean" if gspo else "token-mean", config)
        return forward_backward(lambda x: (loss(padded[0], x.view(shape), *rest)[0],), logprobs, upstream)

    def ours(backend: str | None = None) -> Run:
        def loss(x: Tensor) -> Sequence[Tensor]:
            named = dict(sequence_offsets=offsets, level=level, backend=backend)
            return (policy_loss(x, old, advantages, weights, **named, **bounds).loss,)

        return forward_backward(loss, logprobs, upstream)

    def plain(function: Callable[..., Sequence[Tensor]]) -> Run:
        return forward_backward(lambda x: function(x.view(shape), *padded), logprobs, upstream)

    return Case(
        op="policy_loss",
        shape=f"{'GSPO, ' if gspo else ''}{tokens} tokens, {sequences} sequences",
        dtype="float32",
        direction="forward + backward",
        bytes=tokens * 4 * (3 + 1) + sequences * 12,
        flops=tokens * 12,
        contenders=[
            Contender(OURS, ours()),
            Contender("torch eager", plain(by_torch)),
            Contender("torch.compile", plain(compiled(by_torch))),
            *of_backends(ours, device),
            rival("verl", "verl.trainer.ppo.core_algos verl.workers.config", verl),
            Contender("TRL", None, "computed inside its trainer, no function to call"),
            Contender("Liger", None, "no loss of given log-probs; from logits it has a case of its own"),
        ],
        device=device,
        elements=0 if gspo else tokens,
        another=lambda other: case(sequences, length, device, level, other),
    )


def eager_from_logits(logits: Tensor, chosen: Tensor, old: Tensor, gains: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """The loss of the chosen tokens' log-probs; logits `[B, L, V]`, the others `[B, L - 1]`."""
    log_p = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, chosen[..., None]).squeeze(2)
    return eager(log_p, old, gains, weights)


def case_from_logits(
    sequences: int, length: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Case:
    """token_logprob, then policy_loss, on padded logits whose last position predicts nothing."""
    rng = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(sequences, length, vocabulary, generator=rng, device=device).to(dtype)
    chosen = torch.randint(vocabulary, (sequences, length - 1), generator=rng, device=device)
    old = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, chosen[..., None]).squeeze(2)
    old = old + 0.2 * torch.randn(old.shape, generator=rng, device=device)
    advantages = torch.randn(sequences, generator=rng, device=device)
    gains, weights = advantages[:, None].expand(old.shape), torch.full_like(old, 1 / old.numel())
    pad = torch.nn.functional.pad
    targets, flat_old, flat_weights = pad(chosen, (0, 1), value=-100), pad(old, (0, 1)), pad(weights, (0, 1))
    offsets = torch.arange(0, sequences * length + 1, length, device=device)
    upstream = [torch.ones((), device=device)]

    def ours(backend: str | None = None) -> Run:
        def loss(x: Tensor) -> Sequence[Tensor]:
            logprobs = token_logprob(x.flatten(0, 1), targets.flatten(), backend=backend).logprob
            given = (logprobs, flat_old.flatten(), advantages, flat_weights.flatten())
            bounds = dict(clip_low=LOW, clip_high=HIGH, dual_clip=DUAL)
            return (policy_loss(*given, sequence_offsets=offsets, backend=backend, **bounds).loss,)

        return forward_backward(loss, logits, upstream)

    def plain(function: Callable[..., Sequence[Tensor]]) -> Run:
        return forward_backward(lambda x: function(x, chosen, old, gains, weights), logits, upstream)

    def liger(module: ModuleType) -> Run:
        if device.type != "cuda":
            raise AttributeError("its Triton loss needs a GPU")
        options = dict(
            beta=0.0, temperature=1.0, eps_low=LOW, eps_high=HIGH, inplace=False, loss_type="dapo", reduce=True
        )

        def loss(x: Tensor) -> Sequence[Tensor]:
            return (module.triton_grpo_loss(x, old, None, chosen, advantages, **options)[0],)

        return forward_backward(loss, logits, upstream)

    elements = logits.numel()
    return Case(
        op="policy_loss",
        shape=f"from logits, {sequences} x {length} x {vocabulary}",
        dtype=str(dtype).removeprefix("torch."),
        direction="forward + backward",
        bytes=elements * logits.element_size() * 3,
        flops=elements * 8,
        contenders=[
            Contender(OURS, ours()),
            Contender("torch eager", plain(eager_from_logits)),
            Contender("torch.compile", plain(compiled(eager_from_logits))),
            *of_backends(ours, device),
            rival("Liger, no dual clip", "liger_kernel.transformers.grpo_loss", liger),
        ],
        device=device,
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    full = FULL + (LARGE if device.type == "cuda" else [])
    yield from (case(sequences, length, device) for sequences, length in (QUICK if quick else full))
    if not quick:
        for sequences, length in (FULL[1:] + LARGE) if device.type == "cuda" else FULL[2:]:
            yield case(sequences, length, device, "sequence")
        yield case_from_logits(*(LOGITS_LARGE if device.type == "cuda" else LOGITS), device)
