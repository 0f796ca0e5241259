"""linear_logprob and linear_policy_loss with the vocabulary split among 2 and 4 processes, against one process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

from v05.kernels import linear_logprob, linear_policy_loss
from v05.testing import error_against, ragged_tokens

ROWS, FEATURES, COLUMNS = 40, 24, 4700
CUTS = {2: [0, 4301, 4700], 4: [0, 5, 1200, 4200, 4700]}  # slices of every size, one of more than a product's width


def layer(dtype=torch.float32):
    """hidden, weight, bias, targets; some are ignored."""
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, FEATURES, generator=rng, dtype=torch.float64)
    weight = torch.randn(COLUMNS, FEATURES, generator=rng, dtype=torch.float64) / 2
    bias = torch.randn(COLUMNS, generator=rng, dtype=torch.float64)
    bias[:5] = -float("inf")  # all of the first of four ranks
    targets = torch.randint(5, COLUMNS, (ROWS,), generator=rng)
    hidden[3::9], targets[3::9] = float("nan"), -100
    return [x.to(dtype) for x in (hidden, weight, bias)], targets


def logprobs(given, targets, silent=None, **options):
    """With both gradients 0 in silent rows."""
    temperature = torch.linspace(0.6, 1.4, ROWS)
    given = [x.clone().requires_grad_() for x in given]
    outputs = linear_logprob(*given[:2], targets, bias=given[2], temperature=temperature, chunk=40_000, **options)
    by = [torch.linspace(-1, 1, ROWS), torch.full((ROWS,), 0.3)]
    if silent is not None:
        by = [values.masked_fill(silent, 0) for values in by]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(tuple(outputs), given, by))]


def loss(given, targets, level="token", entropy_coef=0.05, silent=0, **options):
    """With advantages of 0 in the first sequences, as many as are silent."""
    data = ragged_tokens(8, 5, 5, seed=2)
    data.advantages[:silent] = 0
    weights = torch.where(targets >= 0, 0.1 + data.weights, 0)
    given = [x.clone().requires_grad_() for x in given]
    result = linear_policy_loss(
        *given[:2],
        targets,
        data.old_logprobs - 7,
        data.advantages,
        weights,
        bias=given[2],
        sequence_offsets=data.sequence_offsets,
        level=level,
        entropy_coef=entropy_coef,
        chunk=40_000,
        **options,
    )
    gradients = torch.autograd.grad(2 * result.loss, given)
    return [result.loss.detach(), torch.stack(list(result.metrics.values())), *gradients]


def everything(given, targets, **options):
    """What is compared, by name."""
    found = {"logprob": logprobs(given, targets, **options)}
    found |= {level: loss(given, targets, level, **options) for level in ("token", "sequence")}
    for name, rows in (("some", torch.arange(ROWS) % 3 == 1), ("all", torch.ones(ROWS, dtype=torch.bool))):
        found[f"{name} silent"] = logprobs(given, targets, rows, **options)
    for level, silent in (("token", 5), ("token", 8), ("sequence", 5)):
        found[f"{level}, {silent} silent"] = loss(given, targets, level, 0.0, silent, **options)
    return found


def drawn(rank, given, targets, **options):
    """Losses without tokens drawn at random, where every rank draws others."""
    torch.manual_seed(rank)
    return torch.stack([loss(given, targets, surrogate="clip_cov", **options)[0] for _ in range(8)])


def refused(given, targets, **options):
    """The messages of bad input, which every rank must give, so that none is left waiting."""
    messages = []
    for value, named in ((COLUMNS, options), (-1, options), (7, options | {"backend": "reference"})):
        wrong = targets.clone()
        wrong[7] = value
        with pytest.raises(ValueError, match="allowed") as caught:
            linear_logprob(*given[:2], wrong, bias=given[2], **named)
        messages.append(str(caught.value))
    return messages


def filled(values, place, value):
    values = values.clone()
    values[place] = value
    return values


# Bad input of one rank alone, made of its hidden, weight, bias and targets; and what all of them then raise.
SPOILT = {
    "shape": (lambda h, w, b, t: (h, w[:, 1:], b, t), "ValueError rank 1: weight has shape ["),
    "dtype": (lambda h, w, b, t: (h, w.double(), b, t), "TypeError rank 1: weight is torch.float64; allowed: torch"),
    "weight": (lambda h, w, b, t: (h, filled(w, 2, float("nan")), b, t), "ValueError rank 1: hidden[0] has the logit"),
    "bias": (
        lambda h, w, b, t: (h, w, filled(b, 3, float("inf")), t),
        "ValueError rank 1: hidden[0] has the logit inf",
    ),
    "target": (lambda h, w, b, t: (h, w, b, filled(t, 7, 10**6)), "ValueError rank 1: targets[7] is 1000000; allowed"),
    "count": (lambda h, w, b, t: (h, w, b, filled(t, 7, -100)), "ValueError rows that count of hidden and targets are"),
}


def refused_alike(rank, given, targets, **options):
    """What every rank says where one of them alone is given bad input, by what it is and the op that was asked."""
    messages = {}
    for what, (spoil, _) in SPOILT.items():
        *spoilt, wrong = spoil(*given, targets) if rank == 1 else (*given, targets)
        for check_values in (False, True):
            with pytest.raises((ValueError, TypeError)) as caught:
                linear_logprob(*spoilt[:2], wrong, bias=spoilt[2], check_values=check_values, chunk=9000, **options)
            messages[what, check_values] = f"{caught.type.__name__} {caught.value}"
        for level in ("token", "sequence"):
            with pytest.raises((ValueError, TypeError)) as caught:
                loss(spoilt, wrong, level, **options)
            messages[what, level] = f"{caught.type.__name__} {caught.value}"
    for name, value in (("level", "none"), ("clip_low", float("nan")), ("dual_clip", 0.5)):
        with pytest.raises(ValueError, match="rank 1: ") as caught:
            loss(given, targets, **({name: value} if rank == 1 else {}) | options)
        messages[name, ""] = f"ValueError {caught.value}"
    return messages


def nothing(given, targets, group):
    """No rows, and rows that are all ignored."""
    hidden, weight, bias = given
    for some, wanted in ((hidden[:0], targets[:0]), (hidden, torch.full_like(targets, -100))):
        outputs = linear_logprob(some, weight.requires_grad_(), wanted, bias=bias, group=group)
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in outputs), weight)
        assert [len(value) for value in outputs] == [len(wanted)] * 2
        assert not any(value.any() for value in (*outputs, gradient))


def work(rank, world, store, folder):
    torch.set_num_threads(1)
    start = dict(init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", **start)
    given, targets = layer()
    first, last = CUTS[world][rank : rank + 2]
    own = [given[0], given[1][first:last], given[2][first:last]]
    results = everything(own, targets, group=dist.group.WORLD), refused(own, targets, group=dist.group.WORLD)
    alike = refused_alike(rank, own, targets, group=dist.group.WORLD)
    nothing([x.clone() for x in own], targets, dist.group.WORLD)
    again = everything(own, targets, group=dist.group.WORLD)
    assert all(torch.equal(*pair) for name in again for pair in zip(results[0][name], again[name], strict=True))
    selected = drawn(rank, own, targets, group=dist.group.WORLD)
    torch.save((*results, alike, selected), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_know_what_one_process_knows(world, tmp_path):
    multiprocessing.spawn(work, (world, tmp_path / "store", tmp_path), nprocs=world)
    given, targets = layer()
    alone = everything(given, targets)
    results, messages, alike, selected = zip(
        *(torch.load(tmp_path / f"{rank}.pt") for rank in range(world)), strict=True
    )
    for name, expected in alone.items():
        for index, value in enumerate(expected):
            parts = [result[name][index] for result in results]
            if index < 3:  # outputs, and hidden's gradient, are the same on every rank
                assert all(torch.equal(part, parts[0]) for part in parts)
                joined = parts[0]
            else:
                joined = torch.cat(parts)
            assert error_against(joined, value) < 4e-6, (name, index)
    assert all(torch.equal(losses, selected[0]) for losses in selected)
    torch.testing.assert_close(selected[0], drawn(0, given, targets))
    assert len(selected[0].unique()) > 1
    first, second, third = messages[0]
    assert first == f"targets[7] is {COLUMNS}; allowed: 0 to {COLUMNS - 1}, or ignore_index -100"
    assert second.startswith("targets[7] is -1")
    assert third.startswith("group is given and backend is 'reference'")
    assert all(given == messages[0] for given in messages)
    assert all(given == alike[0] for given in alike)
    for (what, how), text in alike[0].items():
        assert what not in SPOILT or text.startswith(SPOILT[what][1]), (what, how, text)


def test_memory_is_where_the_inputs_are_whatever_the_default_device(group):
    given, targets = layer()
    hidden, weight, bias = (x.requires_grad_() for x in given)
    with torch.device("meta"):
        outputs = linear_logprob(hidden, weight, targets, bias=bias, group=group)
        (outputs.logprob + outputs.entropy).sum().backward()
    for ours, theirs in zip(outputs, linear_logprob(hidden, weight, targets, bias=bias), strict=True):
        assert torch.equal(ours, theirs)
    assert {x.grad.device.type for x in (hidden, weight, bias)} == {"cpu"}


@pytest.mark.parametrize("field", ["hidden", "weight", "bias", "targets", "weights", "advantages"])
def test_a_tensor_without_memory_of_its_own_is_named(field, group):
    mesh = init_device_mesh("cpu", (1,))
    (hidden, weight, bias), targets = layer()
    given = dict(hidden=hidden, weight=weight, bias=bias, targets=targets)
    rest = dict(old_logprobs=torch.zeros(ROWS), advantages=torch.ones(1), weights=torch.ones(ROWS))
    rest["sequence_offsets"] = torch.tensor([0, ROWS])
    changed = {name: distribute_tensor(x, mesh, [Replicate()]) if name == field else x for name, x in given.items()}
    others = {name: distribute_tensor(x, mesh, [Replicate()]) if name == field else x for name, x in rest.items()}
    message = f"^{field} is a DTensor, which has no memory of its own; allowed with a group: this rank's own part"
    if field in given:
        with pytest.raises(TypeError, match=message):
            linear_logprob(**changed, group=group)
    with pytest.raises(TypeError, match=message):
        linear_policy_loss(**changed, **others, group=group)
