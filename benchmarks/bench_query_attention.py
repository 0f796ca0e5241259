"""The adapter's attention beside torch.nn.MultiheadAttention and SDPA on padded states, and torch.compile of that.

Rivals are given their states padded already: packing costs nothing here, padding costs them nothing either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from benchmarks.harness import OURS, Case, Contender, compiled, of_backends
from benchmarks.rivals import without_gradient
from benchmarks.timing import Run
from v05.kernels import AttentionWeights, query_attention

COUNT, WIDTH, HEADS, SIZE = 168, 6, 3, 1024
SHORTEST, LONGEST = 20, 2048
FULL = [(32, "ragged", torch.float32), (32, "ragged", torch.bfloat16), (64, 256, torch.float32)]
QUICK: list[tuple[int, str | int, torch.dtype]] = [(8, "ragged", torch.float32)]
LARGE = [(512, "ragged", torch.bfloat16)]  # on a GPU
TINY = (4, 32, torch.float32)

Attention = Callable[..., Tensor]


def lengths_of(prompts: int, kind: str | int) -> list[int]:
    """Tokens of each prompt: the same for all, or evenly spread on a log scale, in an order that mixes them."""
    if isinstance(kind, int):
        return [kind] * prompts
    step = math.log(LONGEST / SHORTEST) / max(prompts - 1, 1)
    spread = [round(SHORTEST * math.exp(step * i)) for i in range(prompts)]
    return [spread[i] for i in torch.randperm(prompts, generator=torch.Generator().manual_seed(0)).tolist()]


def around(filled: Tensor, queries: Tensor, w: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, of padded states; the large product runs in the dtype of the states."""
    dtype = filled.dtype
    kv = linear(filled, w.projection_weight.to(dtype), w.projection_bias.to(dtype)).float()
    q = layer_norm(queries, (WIDTH,), w.query_norm_weight, w.query_norm_bias)
    return q, layer_norm(kv, (WIDTH,), w.key_norm_weight, w.key_norm_bias), kv


@cache
def module_of(device: torch.device) -> torch.nn.MultiheadAttention:
    """One whose parameters are replaced at each call."""
    return torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, device=device)


def multihead(filled: Tensor, mask: Tensor, queries: Tensor, *weights: Tensor) -> Tensor:
    """torch.nn.MultiheadAttention."""
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    own = dict(zip(names, weights[6:], strict=True))
    inputs, options = around(filled, queries, AttentionWeights(*weights)), {"key_padding_mask": mask}
    call = torch.func.functional_call(module_of(filled.device), own, inputs, options | {"need_weights": False})
    return call[0].flatten(1)


def sdpa(filled: Tensor, mask: Tensor, queries: Tensor, *weights: Tensor) -> Tensor:
    """The same with scaled_dot_product_attention called by hand."""
    w = AttentionWeights(*weights)
    inputs = zip(around(filled, queries, w), w.in_weight.chunk(3), w.in_bias.chunk(3), strict=True)
    q, k, v = (linear(x, a, b).unflatten(2, (HEADS, -1)).transpose(1, 2) for x, a, b in inputs)
    attended = scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None, None]).transpose(1, 2).flatten(2)
    return linear(attended, w.out_weight, w.out_bias).flatten(1)


def bound(function: Attention, leaves: Sequence[Tensor], upstream: Tensor, backward: bool) -> Run:
    """A call with, or without, the gradients of the queries and all weights."""
    if not backward:
        return without_gradient(lambda: (function(*leaves),))

    def run() -> Sequence[Tensor]:
        features = function(*leaves)
        return (features.detach(), *torch.autograd.grad(features, leaves, upstream))

    return run


def case(
    prompts: int, kind: str | int, dtype: torch.dtype, backward: bool, device: torch.device, seed: int = 0
) -> Case:
    lengths = lengths_of(prompts, kind)
    tokens, longest = sum(lengths), max(lengths)
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device) * scale

    states = normal(tokens, SIZE).to(dtype)
    filled = torch.nn.utils.rnn.pad_sequence(states.split(lengths), batch_first=True)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    mask = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    e = (WIDTH,)
    shapes = ((WIDTH, SIZE), e, e, e, e, e, (3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), e)
    scales = (SIZE**-0.5, *[1.0] * 9)
    weights = [normal(*shape, scale=scale) for shape, scale in zip(shapes, scales, strict=True)]
    leaves = [value.requires_grad_() for value in (normal(prompts, COUNT, WIDTH), *weights)]

    def ours(backend: str | None) -> Attention:
        return lambda q, *w: query_attention(states, offsets, q, AttentionWeights(*w), heads=HEADS, backend=backend)

    functions: dict[str, Attention] = {
        OURS: ours(None),
        "torch eager": partial(multihead, filled, mask),
        "SDPA": partial(sdpa, filled, mask),
        "torch.compile": partial(compiled(sdpa), filled, mask),
    }
    upstream = normal(prompts, COUNT * WIDTH) / prompts
    contenders = [Contender(name, bound(run, leaves, upstream, backward)) for name, run in functions.items()]
    contenders += of_backends(lambda name: bound(ours(name), leaves, upstream, backward), device)
    reads = 2 if backward else 1  # the gradient of the projection reads the states again
    return Case(
        op="query_attention",
        shape=f"{prompts} prompts, {tokens} tokens" + (f" (padded {longest * prompts})" if kind == "ragged" else ""),
        dtype=str(dtype).removeprefix("torch."),
        direction="forward + backward" if backward else "forward",
        bytes=reads * tokens * SIZE * states.element_size() + prompts * COUNT * WIDTH * 8,
        flops=tokens * (2 * SIZE * WIDTH * reads + COUNT * HEADS * (30 if backward else 10)),
        contenders=contenders,
        device=device,
        tolerance=1e-3 if dtype == torch.float32 else 1e-1,
        elements=states.numel(),
        another=lambda other: case(prompts, kind, dtype, backward, device, other),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    full = (LARGE if device.type == "cuda" else []) + FULL
    for prompts, kind, dtype in (QUICK if quick else full) + [TINY]:
        for backward in (False, True):
            yield case(prompts, kind, dtype, backward, device)
