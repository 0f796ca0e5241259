"""Custom ops: eager calls go past torch's dispatcher, unless something listens there, and derive the same."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from v05.kernels import linear_logprob, linear_policy_loss, policy_loss, query_attention, token_logprob
from v05.kernels.custom import custom_op
from v05.kernels.policy_loss.options import Inputs, Kinds, Numbers
from v05.kernels.query_attention.buffers import make_outputs
from v05.testing import ragged_states, ragged_tokens

calls: list[str] = []


@custom_op("v05_test::scaled")
def scaled(values: Tensor, by: float, more: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of all times a number, and how many there are."""
    calls.append(type(values).__name__)
    return torch.stack([values, *more]).sum(0) * by, torch.tensor(1 + len(more))


@scaled.register_fake
def _(values: Tensor, by: float, more: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), values.new_empty((), dtype=torch.int64)


def _save(ctx, inputs, output):
    _, ctx.by, ctx.more = inputs[0], inputs[1], len(inputs[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, _):
    if gradient is None:
        return None, None, [None] * ctx.more
    own = gradient * ctx.by if ctx.needs_input_grad[0] else None
    return own, None, [gradient * ctx.by] * ctx.more


scaled.register_autograd(_backward, setup_context=_save)


@custom_op("v05_test::double_", mutates_args=("values",))
def double_(by: float, values: Tensor) -> None:
    """Doubles the memory of a tensor, as a kernel does: autograd sees nothing of it."""
    values.numpy()[...] *= 2


@double_.register_fake
def _(by: float, values: Tensor) -> None:
    return None


class Listener(TorchDispatchMode):
    """Names of the ops that go through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A subclass."""


def dispatched(call) -> list[str]:
    """Names of custom ops that the profiler sees in a call."""
    with torch.profiler.profile() as profile:
        call()
    return [event.name for event in profile.events() if "v05_test::" in event.name]


def test_an_eager_call_skips_the_dispatcher():
    x = torch.ones(3)
    assert dispatched(lambda: scaled(x, 2.0, [x])) == []
    assert dispatched(lambda: scaled(x.requires_grad_(), 2.0, [x])) == []
    assert dispatched(lambda: scaled(torch.nn.Parameter(x), 2.0, [x])) == []


def test_who_listens_at_the_dispatcher_hears_the_call():
    x = torch.ones(3)
    with Listener() as listener:
        scaled(x, 2.0, [x])
    assert "v05_test.scaled.default" in listener.heard
    assert dispatched(lambda: scaled(x.as_subclass(Own), 2.0, [x])) == ["v05_test::scaled"]
    assert dispatched(lambda: scaled(x, 2.0, [x.as_subclass(Own)])) == ["v05_test::scaled"]
    with torch.device("cpu"):
        assert dispatched(lambda: scaled(x, 2.0, [x])) == ["v05_test::scaled"]
    with pytest.raises(RuntimeError, match="Batching rule not implemented for v05_test::scaled"):
        torch.vmap(lambda row: scaled(row, 2.0, [row])[0])(torch.ones(2, 3))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        calls.clear()
        assert scaled(fake, 2.0, [fake])[0].shape == x.shape
        assert not calls


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_a_trace_holds_the_op():
    traced = torch.jit.trace(lambda x: scaled(x, 2.0, [x])[0], torch.ones(3), check_trace=False)
    assert "v05_test::scaled" in str(traced.graph)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_are_those_of_the_op(wanted):
    def run(op):
        x, y = (torch.ones(3).requires_grad_(want) for want in wanted)
        out, count = op(x, 3.0, [y, torch.zeros(3)])
        assert not count.requires_grad
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        return x.grad, y.grad

    for ours, theirs in zip(run(scaled), run(torch.ops.v05_test.scaled.default), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def _losses():
    """A scalar of every op that derives, by what it is a function of."""
    rng = torch.Generator().manual_seed(0)
    data = ragged_tokens(4, 1, 4, seed=1)
    tokens, offsets = len(data.weights), data.sequence_offsets
    targets = torch.randint(10, (tokens,), generator=rng)
    weight = torch.randn(10, 5, generator=rng)
    rest = (data.old_logprobs, data.advantages, data.weights)

    def by_policy(logprobs, **options):
        return policy_loss(logprobs, *rest, sequence_offsets=offsets, level="sequence", **options).loss

    def by_logits(logits, **options):
        logprob, entropy = token_logprob(logits, targets, **options)
        return (logprob * data.weights).sum() + entropy.square().sum()

    def by_hidden(hidden, **options):
        logprob, entropy = linear_logprob(hidden, weight, targets, **options)
        return (logprob * data.weights).sum() + entropy.square().sum()

    def by_layer(hidden, **options):
        return linear_policy_loss(hidden, weight, targets, *rest, sequence_offsets=offsets, **options).loss

    sizes = {by_policy: (), by_logits: (10,), by_hidden: (5,), by_layer: (5,)}
    return [(loss, torch.randn(3, tokens, *size, generator=rng)) for loss, size in sizes.items()]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("loss", "samples"), _losses(), ids=lambda given: getattr(given, "__name__", ""))
def test_what_torch_func_derives(loss, samples):
    expected = []
    for sample in samples:
        leaf = sample.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(leaf), leaf)[0])
    value, pull = torch.func.vjp(loss, samples[1])
    assert torch.equal(pull(torch.ones(()))[0], expected[1])
    assert torch.equal(torch.func.grad(loss)(samples[0]), expected[0])
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(samples), torch.stack(expected))
    assert torch.equal(torch.func.vmap(loss)(samples)[1], value)


@pytest.mark.parametrize(("loss", "samples"), _losses(), ids=lambda given: getattr(given, "__name__", ""))
def test_what_torch_func_does_not_derive_is_refused(loss, samples):
    """Second derivatives and those in forward mode, which the reference has."""

    def slope(x, **options):
        return torch.func.grad(lambda y: loss(y, **options))(x).square().sum()

    message = r"loss|logprob has a first derivative in reverse mode alone; backend='reference' has more"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(slope)(samples[0])
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(loss, (samples[0],), (samples[1],))
    assert torch.func.grad(lambda x: slope(x, backend="reference"))(samples[0]).any()
    along = torch.func.jvp(lambda x: loss(x, backend="reference"), (samples[0],), (samples[1],))[1]
    torch.testing.assert_close(along, (torch.func.grad(loss)(samples[0]) * samples[1]).sum(), check_dtype=False)


@pytest.mark.parametrize(("loss", "samples"), _losses(), ids=lambda given: getattr(given, "__name__", ""))
def test_plain_autograd_leaves_no_derivative_out(loss, samples):
    """In forward mode, and of several gradients at once: neither is 0 without a word."""
    message = r"loss|logprob has a first derivative in reverse mode alone; backend='reference' has more"
    for leaf in (samples[0].clone(), samples[0].clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            loss(forward_ad.make_dual(leaf, samples[1]))
    value = loss(leaf)
    with forward_ad.dual_level():
        assert loss(samples[0]) == value
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(value, leaf, forward_ad.make_dual(torch.ones(()), torch.ones(())), retain_graph=True)
        along = forward_ad.unpack_dual(loss(forward_ad.make_dual(samples[0], samples[1]), backend="reference")).tangent
    torch.testing.assert_close(along, (torch.autograd.grad(value, leaf)[0] * samples[1]).sum(), check_dtype=False)
    with pytest.raises(RuntimeError, match=r"(loss|logprob) is given several gradients at once"):
        torch.autograd.grad(loss(leaf), leaf, torch.ones(2), is_grads_batched=True)


def _scalars():
    """A scalar of every op that derives, and of what is split among ranks, by a leaf."""
    data = ragged_states([3, 4], count=2, size=5)

    def by_states(states, **options):
        features = query_attention(states, data.offsets, data.queries, data.weights, heads=3, **options)
        return features.square().sum()

    alone = [(loss, samples[0]) for loss, samples in _losses()]
    return [(*given, False) for given in (*alone, (by_states, data.states))] + [(*given, True) for given in alone[2:]]


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize(("loss", "sample", "split"), _scalars(), ids=lambda given: getattr(given, "__name__", ""))
def test_a_second_derivative_is_refused(loss, sample, split, listening, request):
    """Both of the direct path and of the custom op, which is called where a mode listens."""
    options = {"group": request.getfixturevalue("group")} if split else {}
    leaf = sample.clone().requires_grad_()

    def value(**options):
        with Listener() if listening else contextlib.nullcontext():
            return loss(leaf.sin(), **options) + leaf.square().sum()

    (first,) = torch.autograd.grad(value(**options), leaf)
    assert not first.requires_grad
    for retain in (True, False):
        (kept,) = torch.autograd.grad(value(**options), leaf, create_graph=True, retain_graph=retain)
        assert torch.equal(kept, first)
    (kept,) = torch.autograd.grad(value(**options), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="has a first derivative in reverse mode alone; backend='reference' has mo"):
        torch.autograd.grad(kept.square().sum(), leaf)
    (kept,) = torch.autograd.grad(value(backend="reference"), leaf, create_graph=True)
    assert torch.autograd.grad(kept.square().sum(), leaf)[0].isfinite().all()


def test_no_gradient_where_autograd_is_off():
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not scaled(x, 2.0, [])[0].requires_grad
    with torch.inference_mode():
        assert scaled(x, 2.0, [])[0].is_inference()


def test_what_it_writes_into_has_a_new_version():
    x, w = torch.ones(3), torch.ones(3, requires_grad=True)
    product = w * x
    double_(1.0, x)
    assert x.tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_what_cuda_returns_of_a_policy_loss_shares_no_memory(monkeypatch):
    cuda = pytest.importorskip("v05.kernels.policy_loss.cuda", exc_type=ImportError)
    native = SimpleNamespace(policy_blocks=lambda *_: 1, policy_loss=lambda *_: None)
    monkeypatch.setattr(cuda, "_cuda", native)
    monkeypatch.setattr(cuda, "stream_of", lambda _: 0)
    x, offsets = torch.ones(4), torch.tensor([0, 4])
    returned = cuda.policy_loss(
        Inputs(x, x, x[:1], x, offsets, None, None, None), Kinds(0, 0, 0, 0), Numbers(*[1.0] * 9)
    )
    assert len({values.untyped_storage().data_ptr() for values in returned}) == 3  # or the dispatcher refuses them


def test_what_cuda_returns_of_an_attention_shares_no_memory(monkeypatch):
    cuda = pytest.importorskip("v05.kernels.query_attention.cuda", exc_type=ImportError)
    native = SimpleNamespace(attention_backward_scratch=lambda *_: 1, query_attention_backward=lambda *_: None)
    monkeypatch.setattr(cuda, "_cuda", native)
    monkeypatch.setattr(cuda, "stream_of", lambda _: 0)
    data = ragged_states([3, 4], count=2, size=5)
    features, saved = make_outputs(data.states, data.queries, 3)
    with Listener() as listener:
        returned = cuda.query_attention_backward(*data[:3], list(data.weights), saved, features, 3, 1e-5, True)
    assert [values.shape for values in returned] == [values.shape for values in (data.states, *data[2:])]
    assert len({values.untyped_storage().data_ptr() for values in returned}) == 12
    assert set(listener.heard) == {"aten.new_empty.default"}  # what is computed is computed in one native call


def test_compiles_without_a_break():
    def loss(x):
        return scaled(x, 2.0, [x * x])[0].sum()

    x, y = (torch.arange(3.0).requires_grad_() for _ in range(2))
    loss(x).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(y).backward()
    assert torch.equal(x.grad, y.grad)
    torch.library.opcheck(torch.ops.v05_test.scaled.default, (x, 2.0, [y]))
