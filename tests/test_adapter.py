"""The adapter: against a plain re-statement of the architecture, and its checkpoint read name by name."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from v05.errors import InputError
from v05.value.adapter import QueryAdapter, read_weights, save_adapter
from v05.value.embedder import TokenStates

WIDTH = 20


def randomised(seed: int = 0, queries: int = 168) -> QueryAdapter:
    torch.manual_seed(seed)
    adapter = QueryAdapter(WIDTH, queries)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapter.eval()


def prompts(seed: int = 1) -> TokenStates:
    lengths = torch.tensor([1, 7, 30, 2])
    states = torch.randn(int(lengths.sum()), WIDTH, generator=torch.Generator().manual_seed(seed)) * 3
    return TokenStates(states, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))


def plain(adapter: QueryAdapter, states: TokenStates) -> Tensor:
    """The architecture as the paper words it: one prompt after the other, torch's own attention, float64."""
    adapter = adapter if adapter.static_queries.dtype == torch.float64 else copy.deepcopy(adapter).double()
    rows = []
    for start, end in zip(states.offsets[:-1], states.offsets[1:], strict=True):
        hidden = states.states[start:end].double()
        kv = adapter.proj_kv(hidden)
        linear, norm, gelu, _, last = adapter.generator
        delta = last(gelu(norm(linear(hidden[-1])))).reshape(adapter.static_queries.shape)
        query = adapter.ln_q(adapter.static_queries + delta)
        attended, _ = adapter.mha(query[None], adapter.ln_kv(kv)[None], kv[None])
        rows.append(attended.flatten())
    return torch.stack(rows)


def test_features_equal_the_plain_architecture() -> None:
    adapter, states = randomised(), prompts()
    expected = plain(adapter, states)
    found = adapter(states)
    assert found.shape == (4, 1008)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5


def test_gradients_equal_the_plain_architecture() -> None:
    adapter, states = randomised(queries=12), prompts()
    weights = torch.randn(4, 72, generator=torch.Generator().manual_seed(2))
    exact = copy.deepcopy(adapter).double()
    (plain(exact, states) * weights).sum().backward()
    expected = {name: value.grad for name, value in exact.named_parameters() if value.grad is not None}
    (adapter(states) * weights).sum().backward()
    assert set(expected) == {name for name, _ in adapter.named_parameters()}
    for name, value in adapter.named_parameters():
        assert (value.grad - expected[name]).abs().max() < 1e-4 * (1 + expected[name].abs().max()), name


def test_fresh_queries_do_not_depend_on_the_prompt() -> None:
    adapter = QueryAdapter(WIDTH).eval()
    assert torch.count_nonzero(adapter.generator(torch.randn(3, WIDTH))) == 0
    assert len(adapter.state_dict()) == 17


@pytest.mark.parametrize("prefix", ["adapter_layer.", "module.adapter_layer.", "module.module.adapter_layer."])
def test_a_published_checkpoint_loads_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    adapter, states = randomised(), prompts()
    state = {prefix + name: value for name, value in adapter.state_dict().items()}
    state |= {prefix.replace("adapter_layer", "backbone") + "embed_tokens.weight": torch.zeros(3)}
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "v0.pt")
    weights, rest = read_weights(tmp_path / "v0.pt")
    loaded = QueryAdapter.from_state(weights, "v0.pt")
    assert rest == {"epoch": 3}
    assert torch.equal(loaded(states), adapter(states))
    assert not loaded.training


def test_safetensors_and_half_precision_load(tmp_path: Path) -> None:
    adapter = randomised(queries=5)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    weights, _ = read_weights(tmp_path / "adapter.safetensors")
    assert set(weights) == {f"adapter_layer.{name}" for name in adapter.state_dict()}
    halves = {name: value.bfloat16() for name, value in weights.items()}
    loaded = QueryAdapter.from_state(halves, "adapter")
    assert loaded.static_queries.shape == (5, 6)
    assert loaded.static_queries.dtype == torch.float32


def test_missing_unexpected_and_misshapen_names_are_said() -> None:
    state = {f"adapter_layer.{name}": value for name, value in randomised().state_dict().items()}
    del state["adapter_layer.mha.out_proj.bias"]
    state["adapter_layer.extra"] = torch.zeros(1)
    state["classifier.weight"] = torch.zeros(1)
    state["adapter_layer.ln_q.weight"] = torch.zeros(7)
    with pytest.raises(InputError) as error:
        QueryAdapter.from_state(state, "v0.pt")
    message = str(error.value)
    assert message.startswith("v0.pt: missing: adapter_layer.mha.out_proj.bias; unexpected: classifier.weight, adapter")
    assert "adapter_layer.ln_q.weight [7] instead of [6]" in message
    with pytest.raises(InputError, match=r"missing: adapter_layer.static_queries.* and 11 more"):
        QueryAdapter.from_state({}, "empty.pt")


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"state_dict": {}}, r"holds \['state_dict'\]"),
        ([1, 2], "holds list"),
        ({"model_state_dict": {"a": Evil()}}, "cannot be read"),
        (b"no archive", "cannot be read"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, capsys, content: object, reason: str) -> None:
    file = tmp_path / "v0.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(InputError, match=reason):
        read_weights(file)
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"absent\.pt: No such file"):
        read_weights(tmp_path / "absent.pt")
