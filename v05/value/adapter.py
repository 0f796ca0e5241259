"""The residual query adapter of V0: a prompt's token states to 168 queries x width 6 = 1,008 features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from v05.errors import InputError
from v05.files import write_tensors
from v05.kernels import query_attention
from v05.kernels.query_attention.rules import AttentionWeights
from v05.value.embedder import TokenStates
from v05.value.memory import under

QUERIES: Final = 168
HEADS: Final = 3
WIDTH: Final = 6
BOTTLENECK: Final = 128
DROPOUT: Final = 0.2
PREFIX: Final = "adapter_layer."


class QueryAdapter(nn.Module):
    """Queries of the prompt's last token, attending over all of its tokens; parameters as in the published checkpoint.

    kv = proj_kv(h); delta = generator(h_last); q = static_queries + delta; features = mha(ln_q(q), ln_kv(kv), kv).
    Source: V0, arXiv 2602.03584.
    """

    def __init__(self, width: int, queries: int = QUERIES, backend: str | None = None) -> None:
        """Make an adapter with fresh weights; `delta` starts at 0.

        Args:
            width: of a token state.
            queries: per prompt.
            backend: of `query_attention`.
        """
        super().__init__()
        self.backend = backend
        self.static_queries = nn.Parameter(torch.randn(queries, WIDTH))
        final = nn.Linear(BOTTLENECK, queries * WIDTH)
        nn.init.zeros_(final.weight)
        nn.init.zeros_(final.bias)
        self.generator = nn.Sequential(
            nn.Linear(width, BOTTLENECK),
            nn.LayerNorm(BOTTLENECK),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            final,
        )
        self.proj_kv = nn.Linear(width, WIDTH)
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    @property
    def features(self) -> int:
        """Return the features per prompt."""
        return self.static_queries.numel()

    def forward(self, states: TokenStates) -> Tensor:
        """Return the features of each prompt.

        Args:
            states: token states [T, D] floating with offsets [B + 1].

        Returns:
            [B, queries * 6] in the dtype of the weights.
        """
        dtype = self.static_queries.dtype
        delta = self.generator(states.last.to(dtype)).unflatten(1, self.static_queries.shape)
        weights = AttentionWeights(
            self.proj_kv.weight,
            self.proj_kv.bias,
            self.ln_q.weight,
            self.ln_q.bias,
            self.ln_kv.weight,
            self.ln_kv.bias,
            self.mha.in_proj_weight,
            self.mha.in_proj_bias,
            self.mha.out_proj.weight,
            self.mha.out_proj.bias,
        )
        tokens, queries = states.states.to(dtype), self.static_queries + delta
        return query_attention(
            tokens, states.offsets, queries, weights, heads=HEADS, eps=self.ln_q.eps, backend=self.backend
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], where: str, backend: str | None = None) -> QueryAdapter:
        """Return an adapter with the weights named `adapter_layer.*`; any `module.` before it is taken off.

        Args:
            state: tensors by name; `backbone.*` is passed over.
            where: they come from, for errors.
            backend: of `query_attention`.

        Raises:
            InputError: names are missing, unexpected, or have another shape.
        """
        own, strange = {}, []
        for name, value in state.items():
            bare = name
            while bare.startswith("module."):
                bare = bare.removeprefix("module.")
            if bare.startswith(PREFIX):
                own[bare.removeprefix(PREFIX)] = value
            elif not bare.startswith("backbone."):
                strange.append(name)
        width = own["proj_kv.weight"].shape[-1] if "proj_kv.weight" in own else 1
        queries = len(own["static_queries"]) if "static_queries" in own else QUERIES
        adapter = cls(width, queries, backend)
        wanted = adapter.state_dict()
        check_names(wanted, own, strange, where)
        adapter.load_state_dict({name: value.to(wanted[name].dtype) for name, value in own.items()})
        return adapter.eval()


def check_names(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], strange: list[str], where: str) -> None:
    """Raise InputError naming the first few parameters that are missing, unexpected or of another shape."""
    missing = [PREFIX + name for name in wanted if name not in given]
    unexpected = strange + [PREFIX + name for name in given if name not in wanted]
    shapes = [
        f"{PREFIX}{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    said = [
        f"{kind}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if names[6:] else ''}"
        for kind, names in faults
        if names
    ]
    if said:
        raise InputError(f"{where}: {'; '.join(said)}; allowed: the parameters of V0's adapter, {PREFIX}*")


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint, and what else it holds.

    Args:
        file: safetensors, or a torch file that holds `model_state_dict`; only tensors and plain values are unpickled.

    Raises:
        InputError: the file is not there, or is neither.
    """
    allowed = "allowed: a .safetensors file, or a torch file with model_state_dict"
    try:
        if file.suffix == ".safetensors":
            return load_file(file), {}
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; {allowed}") from None
    except Exception as error:  # a damaged file raises any of a dozen kinds
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise InputError(f"{file} cannot be read: {reason}; {allowed}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        held = sorted(map(str, content))[:6] if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{file} holds {held}; {allowed}")
    return content["model_state_dict"], {key: value for key, value in content.items() if key != "model_state_dict"}


def save_adapter(adapter: QueryAdapter, file: Path) -> None:
    """Write the weights under the checkpoint's names as safetensors."""
    write_tensors(file, under(PREFIX, adapter.state_dict()))
