"""Calls every launcher of the CUDA module on CPU tensors, where there is no driver, and prints what each one says.

A host function that calls a device function ends the process without a word: nvcc lets it pass inside templates.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from v05.kernels import device, dispatch, group_advantage, policy_loss, query_attention, shrinkage, token_logprob
from v05.kernels.query_attention.buffers import make_outputs
from v05.testing import ragged_groups, ragged_states, ragged_tokens

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def of_groups(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    for size in (3, 9000):
        data = ragged_groups(size, 1, 5, dtype=dtype)
        for fusion in ("v05", "calibrated"):
            yield f"{fusion} of {size}", partial(shrinkage, *data, fusion=fusion, backend="cuda")
        for scale in ("none", "batch"):
            options = dict(prior=data.prior, scale=scale, backend="cuda")
            yield f"advantage by {scale} of {size}", partial(group_advantage, *data[:2], **options)


def of_tokens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    scale = dispatch.implementation("policy_loss", "cuda").scale_
    for longest in (9, 5000):
        data = ragged_tokens(3, longest, longest, dtype=dtype)
        given = (data.logprobs, data.old_logprobs, data.advantages, data.weights)
        for level in ("token", "sequence"):
            options = dict(sequence_offsets=data.sequence_offsets, level=level, backend="cuda")
            yield f"policy_loss by {level} of {longest}", partial(policy_loss, *given, **options)
        yield f"scale of {longest}", partial(scale, data.logprobs, torch.ones((), dtype=dtype))


def of_rows(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    logits, targets = torch.zeros(2, 9, dtype=dtype), torch.tensor([1, 2])
    wide = torch.zeros(2, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    backward = dispatch.implementation("token_logprob", "cuda").token_logprob_backward
    yield "token_logprob", partial(token_logprob, logits, targets, backend="cuda")
    yield "token_logprob backward", partial(backward, logits, targets, None, 1.0, -100, wide[0], wide, wide[0], wide[1])


def of_states(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    backward = dispatch.implementation("query_attention", "cuda").query_attention_backward
    for heads in (1, 2, 3, 4):
        data = ragged_states([3, 0, 170], count=5, heads=heads, size=24, dtype=dtype)
        given = (data.states, data.offsets, data.queries)
        features, saved = make_outputs(data.states, data.queries, heads)
        forward = partial(query_attention, *given, data.weights, heads=heads, backend="cuda")
        yield f"query_attention of {heads}", forward
        for wanted in (False, True):
            rest = (list(data.weights), saved, features, heads, 1e-5, wanted)
            yield f"query_attention backward of {heads}, {wanted}", partial(backward, *given, *rest)


def main() -> None:
    device.stream_of = lambda tensor: 0
    dispatch._DEVICES["cuda"] = ("cpu",)
    for dtype in DTYPES:
        for calls in (of_groups, of_tokens, of_rows, of_states):
            for name, call in calls(dtype):
                if calls is of_tokens and dtype in (torch.bfloat16, torch.float16):
                    continue  # cast before they get there
                try:
                    call()
                    said = "nothing"
                except RuntimeError as error:
                    said = str(error)
                print(f"{dtype} {name}: {said}", flush=True)


if __name__ == "__main__":
    main()
