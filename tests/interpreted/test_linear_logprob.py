"""linear_logprob and linear_policy_loss in Triton against the reference: dtypes, odd sizes, bits, ignored rows."""

import pytest
import torch

from v05.kernels import linear_logprob, linear_policy_loss, policy_loss
from v05.kernels.linear_logprob import passes, triton
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.tiles import INTERPRETED
from v05.testing import FLOORS, assert_as_exact_as, error_against, poisoned_outputs, ragged_tokens

INFINITY = float("inf")
SPLIT = 256  # columns of a program here, a sixteenth of a GPU's: four tiles


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    monkeypatch.setattr(triton, "SPLIT", SPLIT)


def layer(rows, features, columns, dtype, bias, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=rng, dtype=torch.float64)
    weight = torch.randn(columns, features, generator=rng, dtype=torch.float64) / 3
    own = torch.randn(columns, generator=rng, dtype=torch.float64) if bias else None
    targets = torch.randint(columns, (rows,), generator=rng)
    hidden[1::5], targets[1::5] = float("nan"), -100
    if bias and columns > 2:
        own[columns // 2] = -INFINITY
        targets[targets == columns // 2] = 0
    return [None if x is None else x.to(dtype) for x in (hidden, weight, own)], targets


def run(given, targets, backend, temperature, dtype=None, **options):
    given = [None if x is None else x.to(dtype or x.dtype).requires_grad_() for x in given]
    with poisoned_outputs():
        outputs = linear_logprob(
            *given[:2], targets, bias=given[2], temperature=temperature, backend=backend, **options
        )
        scale = torch.linspace(0.5, 2, len(targets), dtype=outputs.logprob.dtype)
        gradients = torch.autograd.grad(
            (scale * outputs.logprob + 0.3 * outputs.entropy).sum(), [x for x in given if x is not None]
        )
    return [x.detach() for x in (*outputs, *gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [(1, 1, 1), (19, 33, 70), (18, 40, SPLIT + 130), (1, 8, 8), (45, 72, 328)],  # the last two as sm_90 has it
)
@pytest.mark.parametrize("bias", [False, True])
def test_against_the_reference(dtype, rows, features, columns, bias):
    given, targets = layer(rows, features, columns, dtype, bias)
    temperature = torch.linspace(0.5, 1.5, rows, dtype=torch.float64) if bias else 0.7
    actual = run(given, targets, "triton", temperature)
    same, exact = (run(given, targets, "reference", temperature, kind) for kind in (None, torch.float64))
    for index, (result, like, truth) in enumerate(zip(actual, same, exact, strict=True)):
        floor = 2 * max(FLOORS[result.dtype], error_against(like, truth))
        # the gradient of a logit is rounded to the operands' dtype, by the interpreter towards zero
        half = result.dtype in (torch.bfloat16, torch.float16) and index >= 2
        assert_as_exact_as(result, like, truth, 8 * FLOORS[result.dtype] if half else floor)


def hopper_launches(monkeypatch):
    """The kernels of sm_90 that are launched from now on."""
    launched = []
    for name in ("sums_kernel", "hopper_gradient_kernel"):
        kernel = getattr(triton, name)

        class Spy:
            def __getitem__(self, grid, name=name, kernel=kernel):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(triton, name, Spy())
    return launched


def test_what_the_copy_engine_takes_goes_to_the_kernels_of_sm_90(monkeypatch):
    launched = hopper_launches(monkeypatch)
    both = ["sums_kernel", "hopper_gradient_kernel"]
    whole = layer(5, 24, 48, torch.bfloat16, True)
    for dtype, features, columns, expected in (
        (torch.bfloat16, 24, 48, both),
        (torch.float16, 24, 48, both),
        (torch.float32, 24, 48, []),
        (torch.bfloat16, 20, 48, []),
        (torch.bfloat16, 24, 46, both[:1]),  # the gradient's rows begin anywhere
    ):
        hidden, weight, bias = (x[..., :features].to(dtype) for x in whole[0])
        run([hidden, weight[:columns].contiguous(), bias.repeat(3)[:columns]], whole[1] % 40, "triton", 1.0)
        assert launched == expected, (dtype, features, columns)
        launched.clear()
    hidden, weight = whole[0][:2]
    shifted = torch.cat([weight.new_zeros(4), weight.flatten()])[4:].view_as(weight)
    for odd in (shifted, weight.t().contiguous().t(), weight[:1].expand(48, -1)):
        same = [linear_logprob(hidden, w, whole[1], backend="triton") for w in (odd, odd.contiguous().clone())]
        assert len(launched) == (2 if odd.stride(1) != 1 else 1)  # elements of a row that lie apart are copied
        assert all(error_against(*pair) < 1e-6 for pair in zip(*same, strict=True))
        launched.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_taken_in_turns(monkeypatch, dtype):
    given, targets = layer(50, 16, 72, dtype, True)
    temperature = torch.linspace(0.5, 1.5, 50, dtype=torch.float64)
    whole = run(given, targets, "triton", temperature)
    monkeypatch.setattr(triton, "ROWS_SUMMED", 16)
    for actual, expected in zip(run(given, targets, "triton", temperature), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_the_vocabulary_backward(monkeypatch, dtype):
    """Each finished at once in the weight's own dtype, or summed up over some rows at a time."""
    given, targets = layer(45, 16, 200, dtype, True)
    whole = run(given, targets, "triton", 0.7)
    monkeypatch.setattr(passes, "BACKWARD_COLUMNS", 64)
    for chunk in (45 * 64, 20 * 64):
        for actual, expected in zip(run(given, targets, "triton", 0.7, chunk=chunk), whole, strict=True):
            assert error_against(actual, expected) < (2e-2 if actual.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 1), (torch.bfloat16, 8)])
def test_a_maximum_that_arrives_late_and_rows_of_minus_infinity(dtype, features):
    weight = torch.linspace(-600, 300, SPLIT + 200)[:, None].expand(-1, features).contiguous().to(dtype)
    hidden = torch.tensor([[1.0], [-1.0], [0.5]]).expand(-1, features).to(dtype) / features
    targets = torch.tensor([SPLIT + 199, 0, 5])
    for bias in (None, torch.full((len(weight),), -INFINITY, dtype=dtype)):
        results = [linear_logprob(hidden, weight, targets, bias=bias, backend=b) for b in ("triton", "reference")]
        for pair in zip(*results, strict=True):
            torch.testing.assert_close(*pair, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 20), (torch.bfloat16, 24)])
def test_same_bits_alone_in_any_order_and_beside_ignored_rows(dtype, features):
    """Of numbers whose products are exact: the interpreter's products depend on the place in a tile, a GPU's do not."""
    rows = 2 * INTERPRETED.rows + 5
    given, targets = layer(rows, features, SPLIT + 70, torch.float32, False)
    hidden, weight = (((8 * x).round() / 8).to(dtype) for x in given[:2])
    whole = linear_logprob(hidden, weight, targets, backend="triton")
    for seed in range(5):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: rows - 6 * seed]
        part = linear_logprob(hidden[order], weight, targets[order], backend="triton")
        assert all(torch.equal(*pair) for pair in zip(part, (values[order] for values in whole), strict=True))
    for row in (0, 17):
        alone = linear_logprob(hidden[row : row + 1], weight, targets[row : row + 1], backend="triton")
        assert [value.item() for value in alone] == [value[row].item() for value in whole]


def test_no_rows_and_none_that_counts():
    weight = torch.ones(9, 7)
    results = run([torch.zeros(0, 7), weight, None], torch.zeros(0, dtype=torch.int64), "triton", 1.0)
    assert [list(value.shape) for value in results] == [[0], [0], [0, 7], [9, 7]]
    results = run([torch.full((3, 7), float("nan")), weight, None], torch.full((3,), -100), "triton", 1.0)
    assert not any(value.any() for value in results)


@pytest.fixture(params=[False, True])
def on_device(request, monkeypatch):
    """Whether rows that do not count stay, as on a device, which is not asked how many there are."""
    if request.param:
        monkeypatch.setattr(Inputs, "counting", lambda self: None)
        monkeypatch.setattr(Inputs, "without_skipped", lambda self: (self.zeroed(), None))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [20, 24])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_row_that_a_loss_masks_spoils_nothing(on_device, dtype, features, level):
    """Not even as NaN, though no target says that it is ignored: its gradients of log-prob and entropy are 0."""
    given, targets = layer(45, features, 90, dtype, True)
    masked, targets = targets < 0, targets.clamp(min=0)  # masked rows are NaN
    offsets, advantages = torch.tensor([0, 20, 45]), torch.tensor([1.0, -0.5])
    made = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        hidden, weight, bias = (x.to(kind) for x in given)
        hidden = hidden if backend == "triton" else hidden.nan_to_num(0)
        own = [x.requires_grad_() for x in (hidden, weight, bias)]
        logprob, entropy = linear_logprob(*own[:2], targets, bias=own[2], backend=backend)
        weights = torch.where(masked, 0, 0.1).to(logprob.dtype)
        rest = (torch.full_like(logprob, -4), advantages.to(logprob.dtype), weights)
        loss = policy_loss(logprob, *rest, sequence_offsets=offsets, level=level, backend=backend).loss
        bonus = torch.where(masked, 0, entropy).sum() / 50
        made.append(torch.autograd.grad(loss - bonus, own))
    for actual, exact in zip(*made, strict=True):
        assert error_against(actual, exact) < {torch.float16: 1e-2, torch.bfloat16: 6e-2}.get(dtype, 1e-5)
    assert not made[0][0][masked].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_gradient_change_no_other(on_device, dtype):
    given, targets = layer(45, 24, 90, dtype, False)
    hidden, weight = (x.nan_to_num(0).requires_grad_() for x in given[:2])
    outputs, silent = linear_logprob(hidden, weight, targets, backend="triton"), torch.arange(45) % 3 == 1
    by = [torch.linspace(-1, 1, 45)] * 2
    both = [torch.autograd.grad(tuple(outputs), (hidden, weight), by, retain_graph=True)]
    both.append(torch.autograd.grad(tuple(outputs), (hidden, weight), [x.masked_fill(silent, 0) for x in by]))
    assert error_against(both[1][0][~silent], both[0][0][~silent]) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert not both[1][0][silent].any()
    assert both[1][1].isfinite().all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("dtype", "features"),
    [
        *((kind, 20) for kind in (torch.float32, torch.float64, torch.float16)),
        *((torch.bfloat16, n) for n in (6, 8, 24)),
    ],
)
@pytest.mark.parametrize("silent", [False, True])
def test_policy_loss(on_device, level, dtype, features, silent):
    """With and without silent tokens; in bfloat16 summed up in float32, with logits made twice as on sm_90, and
    with the gradients of logits kept."""
    data = ragged_tokens(6, 0, 9, seed=4, dtype=dtype)
    given, targets = layer(len(data.weights), features, 90, dtype, True)
    weights = torch.where(targets >= 0, data.weights, 0)
    data.advantages[::2] *= not silent
    results = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        own = [x.to(kind).requires_grad_() for x in given]
        floats = [x.to(kind) for x in (data.old_logprobs - 3, data.advantages, weights)]
        loss, metrics = linear_policy_loss(
            *own[:2],
            targets,
            *floats,
            bias=own[2],
            sequence_offsets=data.sequence_offsets,
            level=level,
            entropy_coef=0.0 if silent else 0.1,
            chunk=200,
            backend=backend,
        )
        results.append([loss.detach(), torch.stack(list(metrics.values())), *torch.autograd.grad(2 * loss, own)])
    for actual, exact in zip(*results, strict=True):
        half = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
        assert error_against(actual, exact) < half.get(actual.dtype, 1e-5)
