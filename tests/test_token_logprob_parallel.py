"""token_logprob with the columns of the logits split among 2 and 4 processes, against one process and against torch."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from v05.kernels import token_logprob
from v05.testing import assert_as_exact_as, poisoned_outputs

ROWS, COLUMNS, INFINITY = 42, 4700, float("inf")
CUTS = {2: [0, 4301, 4700], 4: [0, 5, 1200, 4200, 4700]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows_of(dtype):
    """Logits and targets: ignored (and NaN), all -inf, masked in all but one slice or in one of them, far apart."""
    rng = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(ROWS, COLUMNS, generator=rng, dtype=torch.float64)
    targets = torch.randint(COLUMNS, (ROWS,), generator=rng)
    kind = torch.arange(ROWS) % 7
    logits[kind == 1], targets[kind == 1] = float("nan"), -100
    logits[kind == 2, :4301] = -INFINITY
    logits[kind == 3, 5:] = -INFINITY
    targets[kind == 3] = 2
    logits[kind == 4, :4200] += 900
    logits[kind == 5] *= 40
    logits[2] = -INFINITY
    return logits.to(dtype), targets


def results_of(logits, targets, columns=slice(None), **options):
    """Log-prob, entropy and gradient by both."""
    own = logits[:, columns].clone().requires_grad_()
    outputs = token_logprob(own, targets, **options)
    upstream = torch.linspace(-1, 1, ROWS, dtype=outputs.logprob.dtype)
    (gradient,) = torch.autograd.grad(outputs, own, (upstream, 0.3 + upstream.flip(0)))
    return [outputs.logprob.detach(), outputs.entropy.detach(), gradient]


CASES = [(dtype, temperature, inplace) for dtype in DTYPES for temperature, inplace in (("rows", False), (0.7, True))]


def temperature_of(temperature):
    if temperature != "rows":
        return temperature
    return torch.linspace(0.6, 1.4, ROWS).masked_fill(torch.arange(ROWS) % 7 == 1, float("nan"))


def filled(values, place, value):
    values = values.clone()
    values[place] = value
    return values


# What one rank alone is given, and what all of them then raise.
SPOILT = {
    "shape": (lambda x, y: (x[:, :0], y), "ValueError rank 1: logits has shape [42, 0]; allowed: two dimensions"),
    "dtype": (lambda x, y: (x.int(), y), "TypeError rank 1: logits is torch.int32; allowed: torch.float32"),
    "logit": (lambda x, y: (filled(x, (6, 3), float("nan")), y), "ValueError rank 1: logits[6, 3] is nan; allowed"),
    "target": (lambda x, y: (x, filled(y, 7, 10**6)), "ValueError rank 1: targets[7] is 1000000; allowed: 0 to 4699"),
    "rows": (lambda x, y: (x[1:], y[1:]), "ValueError rows of logits and targets are ["),
    "count": (lambda x, y: (x, filled(y, 7, -100)), "ValueError rows that count of logits and targets are ["),
}


def refused_alike(rank, logits, targets, group):
    """What every rank says where one of them alone is given bad input."""
    messages = {}
    for what, (spoil, _) in SPOILT.items():
        given = spoil(logits, targets) if rank == 1 else (logits, targets)
        with pytest.raises((ValueError, TypeError)) as caught:
            token_logprob(*given, group=group)
        messages[what] = f"{caught.type.__name__} {caught.value}"
    for value, named in ((COLUMNS, {}), (-1, {}), (7, {"backend": "reference"})):
        with pytest.raises(ValueError, match="allowed") as caught:
            token_logprob(logits, filled(targets, 7, value), group=group, **named)
        messages[f"all {value}"] = str(caught.value)
    return messages


def nothing(logits, targets, group):
    """Outputs and gradient of no rows, and of rows that are all ignored."""
    ignored = torch.full_like(targets, -100)
    for given, wanted in ((logits[:0], targets[:0]), (logits, ignored)):
        leaf = given.clone().requires_grad_()
        outputs = token_logprob(leaf, wanted, group=group)
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in outputs), leaf)
        assert [len(value) for value in (*outputs, gradient)] == [len(wanted)] * 3
        assert not any(value.any() for value in (*outputs, gradient))


def against_torch(world, rank):
    """The largest differences from torch's own cross-entropy of split logits: of log-probs, and of the gradient."""
    mesh = init_device_mesh("cpu", (world,))
    logits = torch.randn(ROWS, 64 * world, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(64 * world, (ROWS,), generator=torch.Generator().manual_seed(2))
    own = logits.chunk(world, 1)[rank]
    leaf = own.clone().requires_grad_()
    with loss_parallel():
        split = DTensor.from_local(leaf, mesh, [Shard(1)], run_check=False)
        loss = F.cross_entropy(split, targets, reduction="none").full_tensor()
        loss.sum().backward()
    ours = own.clone().requires_grad_()
    logprob = token_logprob(ours, targets, group=mesh.get_group()).logprob
    (-logprob).sum().backward()
    return [float((loss + logprob).abs().max()), float((leaf.grad - ours.grad).abs().max())]


def work(rank, world, store, folder):
    torch.set_num_threads(1)
    start = dict(init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", **start)
    columns, group, found = slice(*CUTS[world][rank : rank + 2]), dist.group.WORLD, []
    for dtype, temperature, inplace in CASES:
        options = dict(temperature=temperature_of(temperature), inplace_backward=inplace, group=group)
        with poisoned_outputs():
            found.append(results_of(*rows_of(dtype), columns, **options))
        again = results_of(*rows_of(dtype), columns, **options)
        assert all(torch.equal(*pair) for pair in zip(found[-1], again, strict=True))
    logits, targets = rows_of(torch.float32)
    nothing(logits[:, columns], targets, group)
    messages = refused_alike(rank, logits[:, columns], targets, group)
    torch.save((found, messages, against_torch(world, rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_know_what_one_process_knows(world, tmp_path):
    multiprocessing.spawn(work, (world, tmp_path / "store", tmp_path), nprocs=world)
    found, messages, differences = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(world)), strict=True)
    for place, (dtype, temperature, _) in enumerate(CASES):
        logits, targets = rows_of(dtype)
        options = dict(temperature=temperature_of(temperature), backend="reference")
        same, exact = results_of(logits, targets, **options), results_of(logits.double(), targets, **options)
        parts = [result[place] for result in found]
        for index in range(2):
            assert all(torch.equal(part[index], parts[0][index]) for part in parts)
            assert_as_exact_as(parts[0][index], same[index], exact[index])
        assert_as_exact_as(torch.cat([part[2] for part in parts], 1), same[2], exact[2])
    assert all(given == messages[0] for given in messages)
    for what, (_, text) in SPOILT.items():
        assert messages[0][what].startswith(text), what
    assert (
        messages[0][f"all {COLUMNS}"] == f"targets[7] is {COLUMNS}; allowed: 0 to {COLUMNS - 1}, or ignore_index -100"
    )
    assert messages[0]["all -1"].startswith("targets[7] is -1")
    assert messages[0]["all 7"].startswith("group is given and backend is 'reference'")
    for logprob, gradient in differences:
        assert logprob < 2e-6
        assert gradient < 2e-6


@pytest.mark.parametrize("field", ["logits", "targets"])
def test_a_tensor_without_memory_of_its_own_is_named(field, group):
    given = dict(logits=torch.zeros(3, 5), targets=torch.zeros(3, dtype=torch.int64))
    given[field] = DTensor.from_local(given[field], init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(TypeError, match=f"^{field} is a DTensor, which has no memory of its own; allowed with a group"):
        token_logprob(**given, group=group)
