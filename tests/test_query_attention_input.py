"""query_attention: what is refused, and by which words; any input gives a right answer or a clear error."""

import math

import pytest
import torch
from attention_runs import BACKENDS, DTYPES, attend, compare
from hypothesis import given
from hypothesis import strategies as st

from v05.kernels import AttentionWeights
from v05.testing import ragged_states


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


GOOD = ragged_states([2, 1], count=4, size=5)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (dict(states=torch.zeros(3)), {}, r"states has shape \[3\]"),
        (dict(states=torch.zeros(3, 0)), {}, r"states has shape \[3, 0\]"),
        (dict(states=torch.zeros(3, 5, dtype=torch.int32)), {}, "states is torch.int32"),
        (dict(offsets=GOOD.offsets.int()), {}, "offsets is torch.int32"),
        (dict(offsets=GOOD.offsets[None]), {}, r"offsets has shape \[1, 3\]"),
        (dict(offsets=torch.tensor([1, 2, 3])), {}, r"offsets\[0\] is 1; allowed: 0"),
        (dict(offsets=torch.tensor([0, 4, 3])), {}, r"offsets\[2\] is 3; allowed: 4"),
        (dict(offsets=torch.tensor([0, 1, 2])), {}, r"offsets\[2\] is 2; allowed: 3"),
        (dict(offsets=torch.tensor([0, 1, 4])), {}, r"offsets\[2\] is 4; allowed: 3"),
        (dict(queries=GOOD.queries[0]), {}, r"queries has shape \[4, 6\]; allowed: three dimensions"),
        (dict(queries=GOOD.queries[:, :0]), {}, r"queries has shape \[2, 0, 6\]"),
        (dict(queries=GOOD.queries[:1]), {}, r"queries has shape \[1, 4, 6\]; allowed: \[2, 4, 6\]"),
        (dict(queries=GOOD.queries.int()), {}, "queries is torch.int32"),
        ({}, {"heads": 2}, r"queries has shape \[2, 4, 6\]; allowed: \[2, 4, 4\]"),
        ({}, {"heads": 0}, "heads is 0; allowed: 1 to 4"),
        ({}, {"heads": 5}, "heads is 5"),
        ({}, {"eps": 0.0}, "eps is 0.0; allowed: above 0"),
        ({}, {"eps": math.nan}, "eps is nan"),
        (dict(in_weight=torch.zeros(6, 6)), {}, r"weights.in_weight has shape \[6, 6\]; allowed: \[18, 6\]"),
        (dict(out_bias=torch.zeros(6, dtype=torch.int64)), {}, "weights.out_bias is torch.int64"),
        (dict(projection_weight=torch.zeros(6, 4)), {}, r"weights.projection_weight has shape \[6, 4\]"),
        ({}, {"backend": "tpu"}, "backend is 'tpu'"),
    ],
)
def test_refusals(backend, changes, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        attend(GOOD._replace(**changes), **{"backend": backend, **options})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_state_is_named(backend, value, dtype):
    for row, column in ((0, 0), (40, 1029), (44, 5)):
        data = ragged_states([0, 45], count=2, size=1030, dtype=dtype)
        data.states[row, column] = value
        with pytest.raises(ValueError, match=rf"states\[{row}, {column}\] is {value}; allowed: finite"):
            attend(data, backend)


@pytest.mark.parametrize("name", ["queries", *AttentionWeights._fields])
@pytest.mark.parametrize("lengths", [[2, 3], [0, 0]])
def test_a_bad_query_or_weight_is_named(backend, name, lengths):
    data = ragged_states(lengths, count=3, size=9)
    getattr(data, name).view(-1)[-1] = math.nan
    with pytest.raises(ValueError, match=rf"{name}\[.*\] is nan; allowed: finite"):
        attend(data, backend)


@given(data=st.data())
def test_any_input_gives_a_right_answer_or_a_clear_error(data):
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 33, 70]), max_size=4))
    heads, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    options = dict(heads=heads, count=count, size=data.draw(st.integers(1, 40)), seed=data.draw(st.integers(0, 2**31)))
    dtype, scale = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([0.0, 1.0, 4.0]))
    given_data = ragged_states(lengths, dtype=dtype, scale=scale, **options)
    odd = data.draw(st.sampled_from([None, "states", "queries", "in_weight", "offsets"]))
    if odd is not None and getattr(given_data, odd).numel():
        values = getattr(given_data, odd).view(-1)
        place = data.draw(st.integers(0, values.numel() - 1))
        value = data.draw(st.integers(-2, 200) if odd == "offsets" else st.sampled_from([math.nan, math.inf, 3.0]))
        values[place] = value
    offsets = given_data.offsets
    fine = int(offsets[0]) == 0 and int(offsets[-1]) == len(given_data.states) and bool((offsets.diff() >= 0).all())
    if fine and all(value.isfinite().all() for value in given_data):
        compare(given_data, least=1e-10 if dtype == torch.float64 else 2e-3)
        return
    messages = []
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"is .*; allowed") as caught:
            attend(given_data, backend, heads=heads)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
