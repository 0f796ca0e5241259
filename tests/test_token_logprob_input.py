"""token_logprob: what is refused, and by which words; any input gives a right answer or a clear error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_rows import BACKENDS, DTYPES, INF, compare

from v05.kernels import token_logprob


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


GOOD = (torch.zeros(3, 5), torch.tensor([0, -100, 4]))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(5), GOOD[1]), {}, r"logits has shape \[5\]"),
        ((torch.zeros(3, 0), GOOD[1]), {}, r"logits has shape \[3, 0\]"),
        ((torch.zeros(1, 3, 5), GOOD[1]), {}, r"logits has shape \[1, 3, 5\]; .* as of logits.flatten\(0, -2\) and"),
        ((torch.zeros(3, 5, dtype=torch.int32), GOOD[1]), {}, "logits is torch.int32"),
        ((GOOD[0], GOOD[1].int()), {}, "targets is torch.int32"),
        ((GOOD[0], GOOD[1][:2]), {}, r"targets has shape \[2\]; allowed: \[3\]"),
        ((GOOD[0], torch.tensor([0, 5, 7])), {}, r"targets\[1\] is 5; allowed: 0 to 4, or ignore_index -100"),
        ((GOOD[0], torch.tensor([0, 2, -1])), {}, r"targets\[2\] is -1"),
        (GOOD, {"temperature": 0.0}, "temperature is 0; allowed: 1e-06 to 1e"),
        (GOOD, {"temperature": float("nan")}, "temperature is nan"),
        (GOOD, {"temperature": -1}, "temperature is -1"),
        (GOOD, {"temperature": torch.ones(2)}, r"temperature has shape \[2\]"),
        (GOOD, {"temperature": torch.ones(3, dtype=torch.int64)}, "temperature is torch.int64"),
        (GOOD, {"temperature": torch.tensor([1.0, 0.0, 0.0])}, r"temperature\[2\] is 0"),
        (GOOD, {"temperature": torch.tensor([float("nan"), 1.0, 1.0])}, r"temperature\[0\] is nan"),
        (GOOD, {"backend": "tpu"}, "backend is 'tpu'"),
    ],
)
def test_refusals(backend, arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        token_logprob(*arguments, **{"backend": backend, **options})


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("column", [0, 5, 2047, 2048, 4999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_logit_is_named(backend, value, column, dtype):
    logits, targets = torch.zeros(9, 5000, dtype=dtype), torch.arange(9)
    logits[6, column] = logits[8, 1] = value
    with pytest.raises(ValueError, match=rf"logits\[6, {column}\] is {value}; allowed: finite or -inf"):
        token_logprob(logits, targets, backend=backend)


@given(data=st.data())
def test_any_input_gives_a_right_answer_or_a_clear_error(data):
    rows, columns = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    seed, scale = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=rng, dtype=torch.float64) * scale).to(dtype)
    odd = data.draw(st.sampled_from([0.0, -INF, INF, float("nan"), 65504.0]))
    logits[torch.rand(rows, columns, generator=rng) < data.draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))] = odd
    logits = logits.clamp(max=torch.finfo(dtype).max) if odd == -INF else logits
    choices = st.one_of(st.integers(0, columns - 1), st.sampled_from([-100, -1, columns]))
    targets = torch.tensor(data.draw(st.lists(choices, min_size=rows, max_size=rows)), dtype=torch.int64)
    temperature = data.draw(st.sampled_from([1.0, 0.3, 1e-6, 0.0, float("nan")]))
    kept = targets != -100
    bad = kept & ((targets < 0) | (targets >= columns) | ~(logits < INF).all(1))
    if bad.any() or not temperature > 0:
        messages = []
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=r"is .*; allowed") as caught:
                token_logprob(logits, targets, temperature=temperature, backend=backend)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    else:
        compare(logits, targets, temperature=temperature)


def test_rows_are_as_long_as_32_bits_count():
    with pytest.raises(ValueError, match="logits has 1073741825 columns; allowed: up to 1073741824"):
        token_logprob(torch.empty(0, 2**30 + 1), torch.empty(0, dtype=torch.int64))
