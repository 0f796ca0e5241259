"""What goes over the wire to a server that samples, and what comes back: two dialects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from v05.rollout.streaming import Request
from v05.rollout.vllm_library import priority, sampling_fields


@dataclass(frozen=True)
class Sampled:
    """An answer as a server reports it; the fields are those of `make_rollout`."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    reason: str | None
    spans: Sequence[tuple[str, int, int]] | None


class Wire(Protocol):
    """A dialect: where requests go, what they say, and how answers are read."""

    path: str
    health: str

    def body(self, request: Request, prompt_ids: Sequence[int], model: str) -> dict[str, Any]:
        """Return the request's JSON."""
        ...

    def read(self, answer: Mapping[str, Any]) -> Sampled:
        """Return what an answer's JSON says; raises KeyError, IndexError or TypeError where it is another thing."""
        ...


class TokensWire:
    """vLLM's token-in token-out endpoint, which also tells the version of the weights that sampled each token."""

    path, health = "/inference/v1/generate", "/health"

    def body(self, request: Request, prompt_ids: Sequence[int], model: str) -> dict[str, Any]:
        """Return the request's JSON."""
        return {
            "model": model,
            "token_ids": list(prompt_ids),
            "sampling_params": sampling_fields(request) | {"detokenize": False},
            "priority": priority(request),
        }

    def read(self, answer: Mapping[str, Any]) -> Sampled:
        """Return what an answer's JSON says."""
        choice = answer["choices"][0]
        entries = choice["logprobs"]["content"]
        return Sampled(
            choice["token_ids"],
            [entry["logprob"] for entry in entries],
            choice["finish_reason"],
            [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"] or ()],
        )


class CompletionsWire:
    """OpenAI's completions with vLLM's `return_token_ids`; tokens carry no version."""

    path, health = "/v1/completions", "/v1/models"

    def body(self, request: Request, prompt_ids: Sequence[int], model: str) -> dict[str, Any]:
        """Return the request's JSON."""
        fields = sampling_fields(request) | {"model": model, "prompt": list(prompt_ids), "return_token_ids": True}
        return fields | {"priority": priority(request)}

    def read(self, answer: Mapping[str, Any]) -> Sampled:
        """Return what an answer's JSON says."""
        choice = answer["choices"][0]
        return Sampled(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"], None)


WIRES: Final[Mapping[str, Wire]] = {"tokens": TokensWire(), "completions": CompletionsWire()}
