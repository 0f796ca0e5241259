"""V0's prior for a batch of prompts beside the same architecture one prompt at a time, as its authors' code runs it.

Token states are given: the backbone costs both the same. The head is kernel regression, which needs no weights; both
fit it once, so that the difference is the adapter's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contender
from v05.value.adapter import QUERIES, WIDTH, QueryAdapter
from v05.value.embedder import TokenStates, join
from v05.value.regression_head import RegressionHead

SIZE = 384
FULL, QUICK = [(512, 256)], [(32, 32)]


def prompts(count: int, seed: int) -> TokenStates:
    """Random token states of prompts of 40 to 400 tokens, evenly spread on a log scale."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [round(40 * math.exp(math.log(10) * row / max(count - 1, 1))) for row in range(count)]
    return join([torch.randn(length, SIZE, generator=generator) for length in lengths], SIZE, 0)


def one_by_one(adapter: QueryAdapter, states: TokenStates) -> Tensor:
    """Features with torch.nn.MultiheadAttention, one prompt after the other."""
    rows = []
    for hidden in states.states.split(states.offsets.diff().tolist()):
        kv = adapter.proj_kv(hidden)[None]
        delta = adapter.generator(hidden[-1:]).unflatten(1, adapter.static_queries.shape)
        query = adapter.ln_q(adapter.static_queries + delta)
        rows.append(adapter.mha(query, adapter.ln_kv(kv), kv, need_weights=False)[0].flatten(1))
    return torch.cat(rows)


def case(count: int, context: int, device: torch.device) -> Case:
    torch.manual_seed(0)
    adapter = QueryAdapter(SIZE).to(device).eval()
    torch.nn.init.normal_(adapter.generator[4].weight, std=0.1)
    known, asked = (
        part._replace(states=part.states.to(device), offsets=part.offsets.to(device))
        for part in (prompts(context, 0), prompts(count, 1))
    )
    outcomes = torch.rand(context, generator=torch.Generator().manual_seed(2))

    def run(batched: bool) -> Sequence[Tensor]:
        with torch.inference_mode():
            first, second = (adapter(s) if batched else one_by_one(adapter, s) for s in (known, asked))
            head = RegressionHead()
            head.fit(first.cpu(), outcomes)
            return second, head.predict(second.cpu())

    tokens = len(known.states) + len(asked.states)
    return Case(
        op="v0_prior",
        shape=f"{count} prompts, context {context}, {tokens:,} tokens of {SIZE}",
        dtype="float32",
        direction="forward",
        bytes=tokens * SIZE * 4 + (count + context) * QUERIES * WIDTH * 4,
        flops=tokens * (2 * SIZE * WIDTH + QUERIES * 3 * 9),
        contenders=[
            Contender(OURS, lambda: run(True)),
            Contender("torch eager", lambda: run(False)),
        ],
        device=device,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    yield from (case(*sizes, device) for sizes in (QUICK if quick else FULL))
