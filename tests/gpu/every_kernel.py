"""Launches every variant of every kernel of a backend once, on small ragged inputs: what compute-sanitizer watches.

python tests/gpu/every_kernel.py --backend cuda --part groups
"""

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import (
    COMBINATIONS,
    DEVICE,
    DRY_RUN,
    DTYPES,
    on_device,
    rows_of,
    run_advantage,
    run_policy_loss,
    run_query_attention,
    run_shrinkage,
    run_token_logprob,
    tokens_of,
)
from linear import layer_of, run_linear_logprob, run_linear_policy_loss

from v05.kernels import dispatch
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, SURROGATES
from v05.testing import ragged_groups, ragged_states

WORKING = (torch.float32, torch.float64)


def groups_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in DTYPES:
        data = on_device(ragged_groups(67, 0, 21, values=(-1.0, 0.3, 1.0), dtype=dtype))
        for own, centred in itertools.product((False, True), repeat=2):
            options = dict(leave_one_out=own, advantages=centred)
            yield f"shrinkage {dtype} {options}", partial(run_shrinkage, backend, data, **options)
        large = on_device(ragged_groups(900, 4, 21, dtype=dtype))
        for size, given in (("small", data), ("large", large)):
            for weighed in (False, True):
                options = dict(estimator="reinforce_plus_plus", lengths=given.rewards.abs() if weighed else None)
                yield f"moments {dtype} {size} {weighed}", partial(run_advantage, backend, given, **options)
        for values, own in itertools.product(((-1.0, 1.0), (-1.0, 0.3, 1.0)), (False, True)):
            chosen = on_device(ragged_groups(67, 0, 21, values=values, dtype=dtype))
            state = torch.ones(7, device=DEVICE) if own else None
            options = dict(fusion="calibrated", leave_one_out=own, advantages=True, state=state)
            yield f"calibrated {dtype} {values} {own}", partial(run_shrinkage, backend, chosen, **options)
        many = on_device(ragged_groups(5_000, 0, 5, dtype=dtype))
        yield f"calibrated {dtype} many", partial(run_shrinkage, backend, many, fusion="calibrated")
        for estimator, scale in COMBINATIONS:
            options = dict(estimator=estimator, scale=scale)
            yield f"advantage {dtype} {options}", partial(run_advantage, backend, data, **options)


def policy_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    chosen = [dict(surrogate=surrogate, level=level) for surrogate, level in itertools.product(SURROGATES, LEVELS)]
    chosen += [dict(kl=kl) for kl in KLS]
    chosen += [dict(level=level, correction=kind) for level, kind in itertools.product(LEVELS, CORRECTIONS)]
    for dtype in WORKING:
        data = tokens_of(23, 150, dtype)
        long = tokens_of(2, 2600, dtype)
        spread = data._replace(advantages=data.logprobs + 1)
        for options in chosen if dtype == torch.float32 else chosen[::5]:
            yield f"policy_loss {dtype} {options}", partial(run_policy_loss, backend, data, **options)
        for level in LEVELS:
            yield f"policy_loss {dtype} long, by {level}", partial(run_policy_loss, backend, long, level=level)
            yield (
                f"policy_loss {dtype} advantages by token, by {level}",
                partial(run_policy_loss, backend, spread, level=level),
            )


def logprob_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype, columns in itertools.product(DTYPES, (1, 301, 4104)):
        data = rows_of(9, columns, dtype)
        shifted = torch.cat([data.logits.new_zeros(1), data.logits.flatten()])[1:].view(9, columns)
        rows = torch.linspace(0.5, 1.5, 9, dtype=torch.float64, device=DEVICE)
        name = f"token_logprob {dtype} {columns} columns"
        for use in ("logprob", "entropy", "both"):
            yield f"{name}, gradient of {use}", partial(run_token_logprob, backend, data, use=use)
        yield f"{name}, temperature by row", partial(run_token_logprob, backend, data, temperature=rows)
        yield f"{name}, not aligned", partial(run_token_logprob, backend, data._replace(logits=shifted))


def attention_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype, heads, wanted in itertools.product(DTYPES, (1, 3, 4), (False, True)):
        data = on_device(ragged_states([3, 0, 70, 1], count=37, heads=heads, size=141, dtype=dtype))
        call = partial(run_query_attention, backend, data, for_states=wanted)
        yield f"query_attention {dtype}, {heads} heads, gradient of the states {wanted}", call


def linear_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    if dispatch.why_not("linear_logprob", backend, DEVICE.type) is not None:
        return
    for dtype, (features, columns) in itertools.product(DTYPES, ((48, 301), (48, 520), (37, 4500))):
        data = layer_of(19, features, columns, dtype)
        rows = torch.linspace(0.5, 1.5, 19, dtype=torch.float64, device=DEVICE)
        name = f"linear_logprob {dtype} {features} x {columns}"
        yield name, partial(run_linear_logprob, backend, data, chunk=2000)
        options = dict(temperature=rows, bias=data.weight[:, 0])
        yield f"{name}, temperature by row, bias", partial(run_linear_logprob, backend, data, **options)
        for level in LEVELS:
            yield f"linear_policy_loss {name}, by {level}", partial(run_linear_policy_loss, backend, data, level=level)


PARTS = {"groups": (groups_calls, policy_calls), "rows": (logprob_calls, linear_calls, attention_calls)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", action="append", help="may be repeated; cuda and triton if not given")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be repeated; all if not given")
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    options = parser.parse_args()
    chosen = [calls for part in options.part or PARTS for calls in PARTS[part]]
    failed = 0
    for backend in options.backend or ("cuda", "triton"):
        for name, call in itertools.chain(*(calls(backend) for calls in chosen)):
            if options.only not in name:
                continue
            print(f"{backend} {name}", flush=True)
            try:
                call()
                if not DRY_RUN:
                    torch.cuda.synchronize()
            except Exception:
                failed += 1
                traceback.print_exc()
    print(f"{failed} calls failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
