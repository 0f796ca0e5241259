"""linear_policy_loss: every variant against policy_loss of linear_logprob, chunks, masks, gradients and bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from v05.kernels import linear_logprob, linear_policy_loss, policy_loss
from v05.kernels.linear_logprob import policy_pass
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, METRICS, SURROGATES
from v05.testing import assert_as_exact_as, error_against, poisoned_outputs, ragged_tokens

BACKENDS = ["reference", "cpu"]
COLUMNS, FEATURES = 4500, 24


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(sequences=12, longest=9, seed=3, dtype=torch.float32, columns=COLUMNS):
    """hidden, weight, bias, targets and ragged tokens whose old log-probs are near those of the layer."""
    data = ragged_tokens(sequences, 0, longest, seed=seed, dtype=dtype)
    rng = torch.Generator().manual_seed(seed)
    tokens = len(data.weights)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    hidden, weight, bias = normal(tokens, FEATURES), 0.4 * normal(columns, FEATURES), normal(columns)
    targets = torch.randint(columns, (tokens,), generator=rng)
    logprob = linear_logprob(hidden, weight, targets, bias=bias).logprob
    old, ref, sampler = ((logprob + 0.2 * normal(tokens)).to(dtype) for _ in range(3))
    data = data._replace(old_logprobs=old, ref_logprobs=ref, sampler_logprobs=sampler)
    masked = data.weights == 0
    hidden[masked], targets[masked] = float("nan"), 10**12
    return (hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets), data


def companions(data, surrogate="ppo", kl="none", sampler_correction="none", **options):
    options |= dict(surrogate=surrogate, kl=kl, sampler_correction=sampler_correction)
    if kl != "none":
        options |= dict(ref_logprobs=data.ref_logprobs, kl_coef=0.3)
    if sampler_correction != "none":
        options |= dict(sampler_logprobs=data.sampler_logprobs, sampler_cap=1.2)
    if "cov" in surrogate:
        options.setdefault("covariance_selected", torch.arange(len(data.weights)) % 3 == 0)
    if surrogate == "ppo":
        options |= dict(dual_clip=3.0)
    return options


def run(layer, data, backend="cpu", dtype=None, scale=1.5, **options):
    """Loss, metrics, gradients of hidden, weight and bias."""
    if dtype is not None:
        data = data._make(x.to(dtype) if x.is_floating_point() else x for x in data)
    *matrices, targets = layer
    given = [x.detach().to(dtype or x.dtype).requires_grad_() for x in matrices]
    loss, metrics = linear_policy_loss(
        *given[:2],
        targets,
        data.old_logprobs,
        data.advantages,
        data.weights,
        bias=given[2],
        sequence_offsets=data.sequence_offsets,
        backend=backend,
        **companions(data, **options),
    )
    assert list(metrics) == [*METRICS, "entropy_sum"]
    assert not any(value.requires_grad for value in metrics.values())
    gradients = torch.autograd.grad(loss * scale, given)
    return [loss.detach(), torch.stack(list(metrics.values())), *gradients]


def compare(layer, data, chunk=20_000, **options):
    exact = run(layer, data, "reference", torch.float64, **options)
    same = run(layer, data, "reference", **options)
    with poisoned_outputs():
        actual = run(layer, data, "cpu", chunk=chunk, **options)
    for result, like, truth in zip(actual, same, exact, strict=True):
        assert result.dtype == like.dtype
        assert_as_exact_as(result, like, truth, max(1e-5 if result.dtype == torch.float32 else 1e-11, 0))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogates(surrogate, level, dtype):
    compare(*make(dtype=dtype), surrogate=surrogate, level=level)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("level", LEVELS)
def test_kl(kl, level):
    compare(*make(seed=5), kl=kl, level=level)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_sampler_corrections(correction, level):
    compare(*make(seed=6), sampler_correction=correction, level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_entropy_bonus_and_temperatures(level):
    layer, data = make(seed=7)
    compare(layer, data, entropy_coef=0.2, level=level)
    compare(layer, data, entropy_coef=-0.1, temperature=0.7, level=level)
    rows = torch.linspace(0.6, 1.5, len(data.weights), dtype=torch.float64)
    rows[data.weights == 0] = float("nan")
    compare(layer, data, temperature=rows, level=level)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", LEVELS)
def test_half_inputs(dtype, level):
    (hidden, weight, bias, targets), data = make(seed=8)
    layer = (hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets)
    exact = run(layer, data, "reference", torch.float64, level=level)
    actual = run(layer, data, chunk=20_000, level=level)
    assert [x.dtype for x in actual] == [torch.float32, torch.float32, dtype, dtype, dtype]
    for result, truth in zip(actual, exact, strict=True):
        scale = truth.abs().max().clamp(min=1e-3)
        assert (result.double() - truth).abs().max() < (1e-5 if result.dtype == torch.float32 else 1e-2) * scale


@pytest.mark.parametrize("level", LEVELS)
def test_a_loss_scale_reaches_gradients_of_float16_before_they_are_rounded(level):
    (hidden, weight, _, targets), data = make(seed=8)
    data = data._replace(weights=data.weights * 2.0**-30)  # in float16, gradients without the scale are 0
    gradients = []
    for backend, dtype in (("cpu", torch.float16), ("reference", torch.float64)):
        own = [x.half().to(dtype).requires_grad_() for x in (hidden, weight)]
        options = dict(sequence_offsets=data.sequence_offsets, level=level, entropy_coef=0.1, backend=backend)
        loss = linear_policy_loss(*own, targets, data.old_logprobs, data.advantages, data.weights, **options).loss
        gradients.append(torch.autograd.grad(2.0**30 * loss, own))
    for actual, exact in zip(*gradients, strict=True):
        assert (actual.double() - exact).abs().max() < 1e-2 * exact.abs().max()


def test_is_policy_loss_of_linear_logprob_bit_for_bit():
    """A policy that has not moved has ratios of exactly 1 where both ops made its log-probs."""
    (hidden, weight, bias, targets), data = make()
    kept = torch.where(data.weights != 0, targets, -100)
    logprob, entropy = linear_logprob(hidden, weight, kept, bias=bias)
    options = dict(sequence_offsets=data.sequence_offsets)
    expected = policy_loss(logprob, logprob, data.advantages, data.weights, **options)
    layer = [x.clone().requires_grad_() for x in (hidden, weight)]
    for chunk in (None, 1, 50_000):
        actual = linear_policy_loss(
            *layer, targets, logprob, data.advantages, data.weights, bias=bias, chunk=chunk, **options
        )
        assert actual.loss == expected.loss
        assert all(torch.equal(value, actual.metrics[name]) for name, value in expected.metrics.items())
        assert actual.metrics["ratio_sum"] == actual.metrics["tokens"] == (data.weights != 0).sum()
        assert actual.metrics["entropy_sum"] == entropy.sum()


@pytest.mark.parametrize("level", LEVELS)
def test_chunks_give_the_same_gradients(level):
    layer, data = make(sequences=20)
    whole = run(layer, data, level=level)
    for chunk in (1, 3 * COLUMNS, 2**20):
        parts = [run(layer, data, level=level, chunk=chunk) for _ in range(2)]
        assert all(torch.equal(*pair) for pair in zip(*parts, strict=True))
        assert all(error_against(*pair) < 2e-6 for pair in zip(parts[0], whole, strict=True))


def test_only_wanted_gradients_are_made(monkeypatch):
    layer, data = make()
    full = run(layer, data, scale=1.0)[2:]
    for which in range(3):
        given = [x.clone().requires_grad_(i == which) for i, x in enumerate(layer[:3])]
        rest = (layer[3], data.old_logprobs, data.advantages, data.weights)
        options = dict(bias=given[2], sequence_offsets=data.sequence_offsets, dual_clip=3.0)
        linear_policy_loss(*given[:2], *rest, **options).loss.backward()
        assert torch.equal(given[which].grad, full[which])
        assert all(x.grad is None for i, x in enumerate(given) if i != which)
    monkeypatch.setattr(policy_pass, "_rows_by_rows", lambda *_: pytest.fail("made gradients"))
    with torch.no_grad():
        assert not linear_policy_loss(*given[:2], *rest, **options).loss.requires_grad


def test_products_are_counted(monkeypatch):
    """Three products where gradients are made in the forward pass, four where sequences come first; of all tokens, for
    cispo leaves none without a gradient."""
    from v05.kernels.linear_logprob.cpu import Cpu

    layer, data = make(columns=100)
    multiplied, plain = [], Cpu.multiply
    count = int((data.weights != 0).sum())

    def counting(self, left, right, out, adds):
        multiplied.append(left.shape[0] * left.shape[1] * right.shape[0])
        plain(self, left, right, out, adds)

    monkeypatch.setattr(Cpu, "multiply", counting)
    for level, products in (("token", 3), ("sequence", 4)):
        multiplied.clear()
        run(layer, data, level=level, surrogate="cispo")
        assert sum(multiplied) == products * count * 100 * FEATURES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by", [0.25, 0.3, 0.0, float("inf"), float("nan")])
def test_stored_gradients_are_scaled_where_they_are(dtype, by):
    """Before they are rounded; but where the graph is kept, and so is what is stored."""
    (*matrices, targets), data = make(dtype=dtype, columns=60)
    given = [x.requires_grad_() for x in matrices]
    rest = (targets, data.old_logprobs, data.advantages, data.weights)
    loss = linear_policy_loss(*given[:2], *rest, bias=given[2], sequence_offsets=data.sequence_offsets).loss
    stored = loss.grad_fn.saved_tensors
    places, upstream = [x.data_ptr() for x in stored], loss.new_tensor(by)
    expected = [(x.to(loss.dtype) * by).to(x.dtype) for x in stored]
    for kept in (True, True, False):
        made = torch.autograd.grad(loss, given, upstream, retain_graph=kept)
        for gradient, value, place in zip(made, expected, places, strict=True):
            torch.testing.assert_close(gradient, value, rtol=0, atol=0, equal_nan=True)
            assert (gradient.data_ptr() == place) == (not kept)


def test_advantages_per_token_and_a_selection_of_its_own(backend):
    layer, data = make()
    lengths = data.sequence_offsets.diff()
    spread = data._replace(advantages=data.advantages.repeat_interleave(lengths))
    per_sequence, per_token = (run(layer, given, backend, chunk=9000) for given in (data, spread))
    assert all(torch.equal(*pair) for pair in zip(per_sequence, per_token, strict=True))
    chosen = run(layer, data, backend, surrogate="kl_cov", covariance_selected=None)
    assert chosen[1][METRICS.index("covariance_selected")] == 1


def test_no_tokens_and_none_that_counts(backend):
    (hidden, weight, bias, targets), data = make()
    masked = data._replace(weights=torch.zeros_like(data.weights))
    assert not any(value.any() for value in run((hidden, weight, bias, targets), masked, backend))
    empty = data._make(x[:0] if x.numel() == len(targets) else x for x in data)
    empty = empty._replace(advantages=torch.zeros(2), sequence_offsets=torch.zeros(3, dtype=torch.int64))
    results = run((hidden[:0], weight, bias, targets[:0]), empty, backend)
    assert not any(value.any() for value in results)
    assert results[3].shape == weight.shape


def test_opcheck():
    (hidden, weight, _, targets), data = make(sequences=3, columns=30)
    hidden, targets = hidden.nan_to_num(0).requires_grad_(), targets.clamp(max=29)
    tokens = (data.old_logprobs, data.advantages, data.weights, data.sequence_offsets, None, None, None)
    numbers = [0.2, 0.2, float("inf"), 1.0, 1.05, 1.0, 0.0, 0.5, 2.0]
    op = torch.ops.v05.linear_policy_loss.default
    for needs, weights in (([True, True, False], True), ([True, False, False], False)):
        own = weight.detach().requires_grad_(weights)
        work = ([0, 0, 0, 0], numbers, 0.1, needs, 4096, "cpu")
        torch.library.opcheck(op, (hidden, own, None, targets, None, 0.9, *tokens, *work))


def test_compiles_without_a_break():
    layer, data = make(sequences=4, columns=60)
    hidden, weight, bias, targets = layer
    hidden, targets = hidden.nan_to_num(0), targets.clamp(max=59)

    def loss(x, w, b):
        rest = (targets, data.old_logprobs, data.advantages, data.weights)
        return (
            linear_policy_loss(x, w, *rest, bias=b, sequence_offsets=data.sequence_offsets, entropy_coef=0.1).loss * 2
        )

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        given = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        value = function(*given)
        results.append([value.detach(), *torch.autograd.grad(value, given)])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("targets", 5, COLUMNS, rf"targets\[5\] is {COLUMNS}; allowed: 0 to {COLUMNS - 1}$"),
        ("targets", 5, -100, r"targets\[5\] is -100"),
        ("hidden", 5, float("nan"), r"hidden\[5\] has the logit nan by weight\[0\]"),
        ("weights", 5, float("inf"), r"weights\[5\] is inf \(sequence \d+\); allowed: finite"),
        ("old_logprobs", 5, float("nan"), r"old_logprobs\[5\] is nan"),
        ("ref_logprobs", 5, float("inf"), r"ref_logprobs\[5\] is inf"),
        ("advantages", 2, float("nan"), r"advantages\[2\] is nan"),
        ("sequence_offsets", 1, 10**6, r"sequence_offsets\[2\] is \d+; allowed: 1000000"),
        ("temperature", 5, 0.0, r"temperature\[5\] is 0"),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_bad_values_are_named(backend, level, field, row, value, message):
    layer, data = make()
    data = data._replace(weights=torch.ones_like(data.weights))
    hidden, weight, bias, targets = layer
    layer = [hidden.nan_to_num(0.1), weight, bias, targets.clamp(max=COLUMNS - 1)]
    options = dict(level=level, kl="k3")
    if field == "temperature":
        options["temperature"] = torch.ones(len(targets))
        options["temperature"][row] = value
    else:
        given = {"hidden": layer[0], "targets": layer[3], **data._asdict()}[field]
        given[row] = value
    with pytest.raises(ValueError, match=message):
        run(layer, data, backend, chunk=2 * COLUMNS, **options)


def test_bad_arguments_are_named(backend):
    layer, data = make()
    for options, message in (
        (dict(entropy_coef=float("nan")), "entropy_coef is nan; allowed: a finite number"),
        (dict(chunk=-1), "chunk is -1"),
        (dict(surrogate="grpo"), "surrogate is 'grpo'; allowed: 'ppo'"),
        (dict(clip_low=-1.0), "clip_low is -1.0"),
        (dict(sampler_logprobs=data.sampler_logprobs), "sampler_logprobs is given"),
        (dict(temperature=0.0), "temperature is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(layer, data, backend, **options)
    with pytest.raises(ValueError, match="old_logprobs has 3 elements"):
        run(layer, data._replace(old_logprobs=torch.zeros(3)), backend)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    surrogate=st.sampled_from(list(SURROGATES)),
    level=st.sampled_from(LEVELS),
    chunk=st.sampled_from([1, 80, 10**6]),
    corrupt=st.sampled_from(["", "hidden", "weight", "targets", "weights", "old_logprobs", "advantages"]),
    value=st.sampled_from([float("nan"), float("inf"), -1.0]),
    seed=st.integers(0, 1000),
)
def test_malformed_or_right(lengths, surrogate, level, chunk, corrupt, value, seed):
    """Either a right answer, the same as the reference's, or an error that says what is wrong, the same too."""
    (hidden, weight, bias, targets), data = make(len(lengths), 4, seed, columns=40)
    targets = targets.clamp(max=39) if seed % 2 else targets
    fields = {"hidden": hidden, "weight": weight, "targets": targets, **data._asdict()}
    if corrupt and fields[corrupt].numel():
        flat = fields[corrupt].view(-1)
        flat[seed % len(flat)] = -1 if corrupt == "targets" else value
    outcomes = []
    for backend in BACKENDS:
        try:
            outcomes.append(
                run((hidden, weight, bias, targets), data, backend, chunk=chunk, surrogate=surrogate, level=level)
            )
        except ValueError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert "allowed" in outcomes[0]
        assert outcomes[0] == outcomes[1]
    else:
        assert corrupt == "weight" or all(value.isfinite().all() for value in outcomes[1])  # 0 of an infinite weight
        assert all(error_against(*pair) < 1e-4 for pair in zip(outcomes[1], outcomes[0], strict=True))
