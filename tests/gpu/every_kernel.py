"""Launches every variant of every kernel of a backend once, on small ragged inputs: what compute-sanitizer watches.

python tests/gpu/every_kernel.py --backend cuda
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

from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, SURROGATES
from v05.testing import ragged_groups, ragged_states

WORKING = (torch.float32, torch.float64)


def groups_calls(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in WORKING:
        data = on_device(ragged_groups(67, 0, 21, values=(-1.0, 0.3, 1.0), dtype=dtype))
        for own, centred in itertools.product((False, True), repeat=2):
            options = dict(leave_one_out=own, advantages=centred)
            yield f"shrinkage {dtype} {options}", partial(run_shrinkage, backend, data, **options)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", action="append", help="may be repeated; cuda and triton if not given")
    failed = 0
    for backend in parser.parse_args().backend or ("cuda", "triton"):
        calls = (groups_calls, policy_calls, logprob_calls, attention_calls)
        for name, call in itertools.chain.from_iterable(make(backend) for make in calls):
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
