"""linear_logprob: what is refused, and by which words; any input gives a right answer or a clear error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_layers import BACKENDS, DTYPES, INF, compare

from v05.kernels import linear_logprob


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


GOOD = (torch.zeros(3, 5), torch.zeros(7, 5), torch.tensor([0, -100, 6]))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(5), *GOOD[1:]), {}, r"hidden has shape \[5\]"),
        ((torch.zeros(3, 0), torch.zeros(7, 0), GOOD[2]), {}, r"hidden has shape \[3, 0\]"),
        ((GOOD[0], torch.zeros(0, 5), GOOD[2]), {}, r"weight has shape \[0, 5\]; allowed: at least one row"),
        ((GOOD[0], torch.zeros(7, 4), GOOD[2]), {}, r"weight has shape \[7, 4\]; allowed: \[V, 5\]"),
        ((GOOD[0].int(), GOOD[1], GOOD[2]), {}, "hidden is torch.int32"),
        ((GOOD[0], GOOD[1].double(), GOOD[2]), {}, "weight is torch.float64; allowed: torch.float32"),
        ((*GOOD[:2], GOOD[2].int()), {}, "targets is torch.int32"),
        ((*GOOD[:2], GOOD[2][:2]), {}, r"targets has shape \[2\]; allowed: \[3\]"),
        ((*GOOD[:2], torch.tensor([0, 7, 9])), {}, r"targets\[1\] is 7; allowed: 0 to 6, or ignore_index -100"),
        ((*GOOD[:2], torch.tensor([0, 2, -1])), {}, r"targets\[2\] is -1"),
        (GOOD, {"bias": torch.zeros(6)}, "bias has 6 elements; allowed: 7"),
        (GOOD, {"bias": torch.zeros(7, dtype=torch.int64)}, "bias is torch.int64"),
        (GOOD, {"temperature": 0.0}, "temperature is 0; allowed: 1e-06 to 1e"),
        (GOOD, {"temperature": torch.ones(2)}, r"temperature has shape \[2\]"),
        (GOOD, {"temperature": torch.tensor([1.0, 0.0, 0.0])}, r"temperature\[2\] is 0"),
        (GOOD, {"chunk": 0}, "chunk is 0; allowed: None, or an int of at least 1"),
        (GOOD, {"chunk": 2.5}, "chunk is 2.5"),
        (GOOD, {"backend": "tpu"}, "backend is 'tpu'"),
    ],
)
def test_refusals(backend, arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        linear_logprob(*arguments, **{"backend": backend, **options})


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_logit_is_named(backend, value, dtype):
    hidden, weight, targets = torch.ones(9, 4, dtype=dtype), torch.ones(5000, 4, dtype=dtype), torch.arange(9)
    targets[2] = -100
    hidden[2, 1] = value  # ignored: does not matter
    assert linear_logprob(hidden, weight, targets, backend=backend).logprob[2] == 0
    hidden[6, 3] = hidden[8, 1] = value
    with pytest.raises(ValueError, match=rf"hidden\[6\] has the logit {value} by weight\[0\]; allowed: finite or -inf"):
        linear_logprob(hidden, weight, targets, backend=backend)
    weight[4500, 2] = value
    with pytest.raises(ValueError, match=rf"hidden\[0\] has the logit {value} by weight\[4500\]"):
        linear_logprob(hidden[:2], weight, targets[:2], backend=backend)


@given(data=st.data())
def test_any_input_gives_a_right_answer_or_a_clear_error(data):
    rows, features = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 20))
    columns = data.draw(st.sampled_from([1, 2, 5, 40, 4097]))
    dtype = data.draw(st.sampled_from(DTYPES))
    seed, scale = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.0, 1.0, 10.0]))
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=rng, dtype=torch.float64)
    hidden[torch.rand(rows, generator=rng) < 0.2] = data.draw(st.sampled_from([0.0, INF, float("nan"), 65504.0]))
    weight = (torch.randn(columns, features, generator=rng, dtype=torch.float64) * scale).to(dtype)
    hidden = hidden.to(dtype)
    bias = torch.randn(columns, generator=rng).to(dtype) if data.draw(st.booleans()) else None
    if bias is not None:
        bias[torch.rand(columns, generator=rng) < 0.3] = data.draw(st.sampled_from([0.0, -INF, INF, float("nan")]))
    choices = st.one_of(st.integers(0, columns - 1), st.sampled_from([-100, -1, columns]))
    targets = torch.tensor(data.draw(st.lists(choices, min_size=rows, max_size=rows)), dtype=torch.int64)
    options = {"temperature": data.draw(st.sampled_from([1.0, 0.3, 0.0, float("nan")]))}
    options |= {"chunk": data.draw(st.sampled_from([None, 1, 100, -1]))}
    kept = targets != -100
    logits = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    bad = kept & ((targets < 0) | (targets >= columns) | ~(logits < torch.finfo(torch.float32).max).all(1))
    if bad.any() or not options["temperature"] > 0 or options["chunk"] == -1:
        messages = []
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=r"is .*; allowed|has .*; allowed") as caught:
                linear_logprob(hidden, weight, targets, bias=bias, backend=backend, **options)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    else:
        largest = float(torch.where(kept[:, None], logits, 0).nan_to_num(neginf=0).abs().max()) if rows else 0
        slack = 0 if dtype == torch.float64 else 2**-21 * largest / options["temperature"]  # a float32 logit's own
        compare(hidden, weight, targets, bias, slack, **options)
