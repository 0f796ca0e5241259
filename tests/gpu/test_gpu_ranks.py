"""Ops with the vocabulary split between two processes that share the device, against one process."""

from datetime import timedelta

import linear
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from common import DEVICE, KERNELS, assert_close, reproducible, rows_of, run_token_logprob, scaled, widened
from emulated import EMULATED, install

TEMPERATURE = 0.7


def logits_of(dtype):
    return rows_of(48, scaled(9001, 903), dtype, seed=4)


def layer_of(dtype):
    return linear.layer_of(48, scaled(256, 32), scaled(9001, 903), dtype, seed=4)


def slice_of(columns, rank):
    """The columns of one of two ranks: about a third, and the rest."""
    return (slice(0, columns // 3), slice(columns // 3, columns))[rank]


# By op: its inputs, the function that runs it, the field that is split, in which dimension, and its backends.
OPS = {
    "token_logprob": (logits_of, run_token_logprob, "logits", 1, KERNELS, torch.bfloat16),
    "token_logprob in float32": (logits_of, run_token_logprob, "logits", 1, KERNELS, torch.float32),
}
if not EMULATED:
    OPS |= {
        "linear_logprob": (layer_of, linear.run_linear_logprob, "weight", 0, linear.KERNELS, torch.bfloat16),
        "linear_policy_loss": (layer_of, linear.run_linear_policy_loss, "weight", 0, linear.KERNELS, torch.bfloat16),
    }


def work(rank, store, folder):
    if EMULATED:
        install()
    start = dict(init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=100))
    dist.init_process_group("gloo", **start)
    found = {}
    for name, (make, run, field, axis, backends, dtype) in OPS.items():
        data = make(dtype)
        whole = getattr(data, field)
        own = slice_of(whole.shape[axis], rank)
        part = data._replace(**{field: whole[own] if axis == 0 else whole[:, own]})
        for backend in backends:
            for check_values in (False, True):
                options = dict(temperature=TEMPERATURE, group=dist.group.WORLD, check_values=check_values)
                found[name, backend, check_values] = run(backend, part, **options)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_know_what_one_knows(tmp_path):
    multiprocessing.spawn(work, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", map_location=DEVICE) for rank in range(2))
    for (name, backend, check_values), outputs in first.items():
        make, run, field, axis, _, dtype = OPS[name]
        data = make(dtype)
        with reproducible():
            same = run("reference", data, temperature=TEMPERATURE)
            exact = run("reference", widened(data), temperature=TEMPERATURE)
        split = "gradient" if field == "logits" else "by_weight"
        other = second[name, backend, check_values]
        joined = outputs | {split: torch.cat([outputs[split], other[split]], axis)}
        for key, value in outputs.items():
            assert key == split or torch.equal(value.nan_to_num(7), other[key].nan_to_num(7)), (name, backend, key)
        check = assert_close if field == "logits" else linear.assert_near
        check(joined, same, exact)
