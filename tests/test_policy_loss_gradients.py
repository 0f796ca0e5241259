"""policy_loss: gradients, splits, same bits, and torch.compile."""

import itertools
import math

import pytest
import torch
from policy_losses import ARRAYS, options_for, run

from v05.kernels import policy_loss, select_by_covariance
from v05.kernels.policy_loss.options import LEVELS, SURROGATES, make_kinds, make_numbers
from v05.testing import RaggedTokens, offsets_of, ragged_tokens

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck_of_the_reference(level):
    data = ragged_tokens(5, 0, 5, seed=6, dtype=torch.float64)
    for surrogate, kl in zip(("ppo", "sapo", "gpg", "kl_cov"), ("none", "k1", "k2", "k3"), strict=True):
        own = dict(covariance_selected=data.logprobs < -0.5) if surrogate == "kl_cov" else {}
        options = options_for(data, kl, "token_truncate", surrogate=surrogate, level=level, **own)

        def loss(logprobs, options=options):
            rest = (data.old_logprobs, data.advantages, data.weights)
            return policy_loss(
                logprobs, *rest, sequence_offsets=data.sequence_offsets, backend="reference", **options
            ).loss

        assert torch.autograd.gradcheck(loss, data.logprobs.clone().requires_grad_())


@pytest.mark.parametrize(("surrogate", "level"), list(itertools.product(SURROGATES, LEVELS)))
def test_a_split_batch_has_the_same_gradient(backend, surrogate, level):
    data = ragged_tokens(24, 0, 30, seed=9)
    options = dict(surrogate=surrogate, level=level, kl="k3", sampler_correction="sequence_mask")
    selected = None
    if "cov" in surrogate:
        selected = select_by_covariance(
            data.logprobs,
            data.old_logprobs,
            data.advantages,
            data.weights,
            sequence_offsets=data.sequence_offsets,
            surrogate=surrogate,
            fraction=0.05,
            bounds=(0.1, 5.0),
            generator=torch.Generator().manual_seed(0),
        )
        assert selected.any()
    whole = run(data, backend, covariance_selected=selected, **options)
    for ways in (2, 4):
        losses, gradients, sums = [], [], []
        for part in range(ways):
            first, last = 24 * part // ways, 24 * (part + 1) // ways
            offsets = data.sequence_offsets[first : last + 1]
            tokens = slice(int(offsets[0]), int(offsets[-1]))
            piece = [value[tokens] for value in data[:4]] + [data.advantages[first:last], data.weights[tokens]]
            chosen = None if selected is None else selected[tokens]
            loss, gradient, metrics = run(
                RaggedTokens(*piece, offsets - offsets[0]), backend, covariance_selected=chosen, **options
            )
            losses.append(loss), gradients.append(gradient), sums.append(torch.stack(list(metrics.values())))
        assert sum(losses).item() == pytest.approx(whole[0].item(), rel=1e-6, abs=1e-7)
        torch.testing.assert_close(torch.cat(gradients), whole[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(sum(sums), torch.stack(list(whole[2].values())), rtol=1e-6, atol=1e-5)


def test_same_bits_from_run_to_run_and_from_any_number_of_threads():
    data = ragged_tokens(900, 0, 90, seed=12)
    for level, correction, surrogate in itertools.product(LEVELS, ("none", "sequence_truncate"), ("ppo", "sapo")):
        options = dict(level=level, sampler_correction=correction, surrogate=surrogate, kl="k3")
        first = run(data, **options)
        for _ in range(10):
            torch.testing.assert_close(run(data, **options), first, rtol=0, atol=0)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            torch.testing.assert_close(run(data, **options), first, rtol=0, atol=0)
        finally:
            torch.set_num_threads(threads)


def shuffled(data, order):
    """The sequences in another order, and where each token of the result came from."""
    pieces = [torch.arange(int(data.sequence_offsets[i]), int(data.sequence_offsets[i + 1])) for i in order]
    source = torch.cat(pieces)
    offsets = offsets_of(data.sequence_offsets.diff()[order])
    tokens = {name: getattr(data, name)[source] for name in ARRAYS}
    return RaggedTokens(**tokens, advantages=data.advantages[order], sequence_offsets=offsets), source


@pytest.mark.parametrize("level", LEVELS)
def test_a_token_has_the_same_bits_whatever_else_is_in_the_batch(level):
    data = ragged_tokens(60, 0, 700, seed=13)
    for surrogate, correction in (("ppo", "none"), ("sapo", "sequence_truncate"), ("cispo", "token_mask")):
        options = dict(level=level, surrogate=surrogate, kl="k3", sampler_correction=correction)
        gradient = run(data, **options)[1]
        for seed in range(20):
            order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[: 60 - seed]
            other, source = shuffled(data, order)
            assert torch.equal(run(other, **options)[1], gradient[source])


def test_upstream_gradients_scale_and_graphs_are_freed():
    data = ragged_tokens(5, 1, 9, seed=2)
    logprobs = data.logprobs.clone().requires_grad_()
    rest = (data.old_logprobs, data.advantages, data.weights)
    result = policy_loss(logprobs, *rest, sequence_offsets=data.sequence_offsets)
    (3 * result.loss).backward()
    torch.testing.assert_close(logprobs.grad, 3 * run(data)[1])
    assert policy_loss(data.logprobs, *rest, sequence_offsets=data.sequence_offsets).loss.requires_grad is False


def test_a_gradient_may_be_written_into_where_the_graph_is_kept():
    ones = torch.ones(4)
    leaf = (-ones).requires_grad_()
    loss = policy_loss(leaf, -ones, ones[:1], ones, sequence_offsets=torch.tensor([0, 4])).loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, leaf)
    assert second.tolist() == [-1.0] * 4


def test_opcheck():
    data = ragged_tokens(6, 0, 6)
    fixed = (data.old_logprobs, data.advantages, data.weights, data.sequence_offsets)
    for names in (("ppo", "token", "none", "none"), ("kl_cov", "sequence", "k3+", "sequence_mask")):
        kinds = make_kinds(*names)
        numbers = make_numbers(kinds, 0.2, 0.2, None, (1.0, 1.05), 1.0, 0.1, None, 2.0)
        full = names[0] != "ppo"
        extra = (data.ref_logprobs, data.sampler_logprobs, data.logprobs < -1) if full else (None, None, None)
        arguments = (data.logprobs.clone().requires_grad_(), *fixed, *extra, list(kinds), list(numbers), "cpu")
        torch.library.opcheck(torch.ops.v05.policy_loss.default, arguments)


def test_compiles_whole_forward_and_backward():
    def step(data, surrogate):
        logprobs = data.logprobs * 1.5
        rest = (data.old_logprobs, data.advantages, data.weights)
        options = options_for(data, "k3", surrogate=surrogate)
        result = policy_loss(logprobs, *rest, sequence_offsets=data.sequence_offsets, **options)
        return result.loss * 2, result.metrics["ratio_sum"]

    for surrogate in ("ppo", "kl_cov"):
        compiled = torch.compile(step, fullgraph=True, dynamic=True)
        for sequences in (5, 8):
            data = ragged_tokens(sequences, 1, 9, seed=sequences)
            results = []
            for function in (compiled, step):
                logprobs = data.logprobs.clone().requires_grad_()
                loss, ratio = function(data._replace(logprobs=logprobs), surrogate)
                loss.backward()
                results.append((loss.detach(), ratio, logprobs.grad))
            torch.testing.assert_close(*results)


def test_compiles_for_batches_that_shrink_to_one_sequence():
    def step(data):
        rest = (data.old_logprobs, data.advantages, data.weights)
        return policy_loss(data.logprobs, *rest, sequence_offsets=data.sequence_offsets).loss

    compiled = torch.compile(step, fullgraph=True)
    for sequences in (4, 3, 1):
        data = ragged_tokens(sequences, 2, 9, seed=sequences)
        torch.testing.assert_close(compiled(data), step(data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", [0.25, 1.0, -3.0, 0.0, math.inf, math.nan])
def test_a_stored_gradient_is_scaled_where_it_is(dtype, by):
    """But where the graph is kept, and so is what is stored; NaN and inf come out as of any other product."""
    data = ragged_tokens(5, 0, 9, dtype=dtype)
    leaf = data.logprobs.clone().requires_grad_()
    rest = (data.old_logprobs, data.advantages, data.weights)
    loss = policy_loss(leaf, *rest, sequence_offsets=data.sequence_offsets).loss
    (stored,) = loss.grad_fn.saved_tensors
    place, expected, upstream = stored.data_ptr(), stored * by, loss.new_tensor(by)
    for kept in (True, True, False):
        before = stored.clone()
        (gradient,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=kept)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)
        assert (gradient.data_ptr() == place) == (not kept)
        assert not kept or torch.equal(stored, before)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_that_the_op_itself_handed_out_is_not_written_into():
    ones = torch.ones(4)
    given = ((-ones).requires_grad_(), -ones, ones[:1], ones, torch.tensor([0, 4]), None, None, None)
    numbers = [0.2, 0.2, float("inf"), 1.0, 1.05, 1.0, 0.0, 0.5, 2.0]
    loss, gradient, _ = torch.ops.v05.policy_loss(*given, [0] * 4, numbers, "cpu")
    (3 * loss).backward()
    assert given[0].grad.tolist() == [-3.0] * 4
    assert gradient.tolist() == [-1.0] * 4
