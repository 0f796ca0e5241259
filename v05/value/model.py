"""V0: a prompt, what a policy did on other prompts, and from both the probability that it succeeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from v05.errors import InputError
from v05.value import features
from v05.value.adapter import QueryAdapter, read_weights
from v05.value.cache import DEFAULT_LIMIT, EmbeddingCache
from v05.value.embedder import QWEN, CachedEmbedder, Embedder, TransformersEmbedder, sentence_embedder
from v05.value.head import SEARCH_STEPS, Context, GaussianProcessHead, Head, check_outcomes
from v05.value.memory import forget_oldest
from v05.value.regression_head import RegressionHead
from v05.value.tabpfn_head import TabPFNHead

MEMORY: Final = 4096  # prompts whose features stay at hand
ROUNDING: Final = 8 * torch.finfo(torch.float32).eps  # of a mean of float32 rewards, relative to the largest


class Record(NamedTuple):
    """What one policy did: N prompts, and the mean reward of each, [N] floating."""

    prompts: Sequence[str]
    outcomes: Tensor


class Conditioned:
    """V0 with the contexts of one or several policies taken in; predicts any number of prompts from them."""

    def __init__(
        self, model: V0, records: Sequence[Record], reward_range: tuple[float, float], start: Tensor | None, steps: int
    ) -> None:
        """Fit one head a policy, or one head to all of them; see `V0.condition`."""
        contexts = [model.context(record, reward_range) for record in records]
        self.describe = model.describe
        self.joint: GaussianProcessHead | None = None
        self.heads: list[Head[Any]] = []
        if model.make_head is None:
            self.joint = GaussianProcessHead(model.background, start, steps)
            self.joint.fit_policies(contexts)
            return
        for context in contexts:
            head = model.make_head()
            head.fit(context.features, context.outcomes)
            self.heads.append(head)

    def predict(self, prompts: Sequence[str], policy: int = 0) -> Tensor:
        """Return the probability that policy number `policy` succeeds at each prompt, [M] float32."""
        features = self.describe(prompts)
        if self.joint is not None:
            return self.joint.predict_policy(policy, features)
        return self.heads[policy].predict(features)


class V0:
    """The generalist value model; no parameter changes when the policy does, only the context.

    `V0.embedded()` works offline: sentence vectors, letters and structure of a prompt, and a Gaussian process.
    `V0.from_pretrained(...)` is the published architecture: language model, query adapter, TabPFN.
    """

    def __init__(
        self,
        describe: Callable[[Sequence[str]], Any],
        make_head: Callable[[], Head[Any]] | None = None,
        background: Sequence[Record] = (),
        reward_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        """Put a model together; see `embedded` and `from_pretrained`.

        Args:
            describe: prompts to features: a tensor, or a `Described`.
            make_head: gives a new head for one policy; None for one Gaussian process over all policies.
            background: records of other policies, for that process.
            reward_range: of the background's outcomes.
        """
        self.compute, self.make_head = describe, make_head
        self.memory: dict[str, Any] = {}
        self.background = [self.context(record, reward_range) for record in background]

    @classmethod
    def embedded(
        cls,
        background: Sequence[Record] = (),
        *,
        reward_range: tuple[float, float] = (-1.0, 1.0),
        cache: Path | None = None,
        cache_limit: int = DEFAULT_LIMIT,
        embedder: Embedder | None = None,
    ) -> V0:
        """Return the model that needs no download.

        Args:
            background: records of other policies on prompts of the same kind; optional.
            reward_range: of the background's outcomes.
            cache: SQLite file that keeps embeddings; None for none.
            cache_limit: its size at most, in bytes.
            embedder: gives wording and sentence of a prompt; None for the one that the extra `v0` installs.

        Raises:
            InputError: the extra `v0` is not installed.
        """
        found: Embedder = embedder or sentence_embedder()
        chosen = CachedEmbedder(found, EmbeddingCache(cache, cache_limit)) if cache else found
        return cls(lambda prompts: features.describe(prompts, chosen), None, background, reward_range)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: Path,
        head: Path | None = None,
        *,
        backbone: str | Path | Embedder = QWEN,
        device: str = "cpu",
        cache: Path | None = None,
        cache_limit: int = DEFAULT_LIMIT,
        estimators: int = 4,
        backend: str | None = None,
    ) -> V0:
        """Return the published model.

        Args:
            checkpoint: of the adapter, such as `v_0_for_grpo_training.pt`, or what `v05 fit-adapter` wrote.
            head: TabPFN checkpoint, such as `tabpfn-v2.5-classifier-v2.5_default.ckpt`; None for kernel regression on
                the adapter's features, which needs no weights.
            backbone: folder or name of the language model, or an embedder.
            device: where backbone and adapter run.
            cache: SQLite file that keeps token states; None for none.
            cache_limit: its size at most, in bytes.
            estimators: of TabPFN.
            backend: of `query_attention`.

        Raises:
            InputError: a file or a package is missing, or the checkpoint is another model's.
        """
        state, _ = read_weights(checkpoint)
        adapter = QueryAdapter.from_state(state, str(checkpoint), backend).to(device)
        found = TransformersEmbedder.from_pretrained(backbone, device) if isinstance(backbone, str | Path) else backbone
        if found.width != (width := adapter.proj_kv.in_features):
            raise InputError(f"{checkpoint} wants a backbone of width {width}, not {found.width}; allowed: its own")
        embedder = CachedEmbedder(found, EmbeddingCache(cache, cache_limit)) if cache else found
        if head is not None:
            TabPFNHead.check(head)
        return cls(
            lambda prompts: adapt(adapter, embedder, prompts, torch.device(device)),
            RegressionHead if head is None else lambda: TabPFNHead(head, estimators, device=device),
        )

    def predict(
        self,
        context_prompts: Sequence[str],
        outcomes: Tensor | Sequence[float],
        prompts: Sequence[str],
        *,
        reward_range: tuple[float, float] = (-1.0, 1.0),
    ) -> Tensor:
        """Return the probability that the policy behind the context succeeds at each prompt.

        Args:
            context_prompts: N prompts that the policy was tried on; 256 is usual.
            outcomes: its mean reward on each, [N].
            prompts: M prompts to predict.
            reward_range: smallest and largest reward.

        Returns:
            [M] float32 from 0 to 1; the expected reward is `low + (high - low) * probability`.

        Raises:
            ValueError: lengths disagree, or an outcome lies outside the range.
        """
        record = Record(context_prompts, torch.as_tensor(outcomes))
        return self.predict_policies([record], [prompts], reward_range=reward_range)[0]

    def predict_policies(
        self,
        records: Sequence[Record],
        prompts: Sequence[Sequence[str]],
        *,
        reward_range: tuple[float, float] = (-1.0, 1.0),
    ) -> list[Tensor]:
        """Return the probabilities of several policies at once; with the embedded head they inform each other.

        Args:
            records: Q contexts.
            prompts: for each policy the prompts to predict.
            reward_range: of all outcomes.

        Returns:
            Q tensors as `predict` gives one.

        Raises:
            ValueError: as `predict`; or there are not as many lists of prompts as contexts.
        """
        if len(records) != len(prompts):
            raise ValueError(f"prompts has {len(prompts)} lists; allowed: {len(records)}, one a context")
        conditioned = self.condition(records, reward_range=reward_range)
        return [conditioned.predict(part, number) for number, part in enumerate(prompts)]

    def condition(
        self,
        records: Sequence[Record],
        *,
        reward_range: tuple[float, float] = (-1.0, 1.0),
        start: Tensor | None = None,
        steps: int = SEARCH_STEPS,
    ) -> Conditioned:
        """Take in the contexts of the policies; done once a policy version, however many prompts are asked for.

        Args:
            records: Q contexts.
            reward_range: of all outcomes.
            start: hyper-parameters of the Gaussian process to search from, such as `Conditioned.joint.parameters`.
            steps: of that search; 0 keeps `start`.

        Raises:
            ValueError: as `predict`.
        """
        return Conditioned(self, records, reward_range, start, steps)

    def describe(self, prompts: Sequence[str]) -> Any:
        """Return the features of each prompt; those of the last `MEMORY` prompts are kept."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.memory]
        if not prompts:
            return self.compute([])
        fresh = self.compute(missing) if missing else None
        rows = {prompt: self.memory[prompt] for prompt in prompts if prompt in self.memory}
        rows |= {prompt: row_of(fresh, number) for number, prompt in enumerate(missing)}
        for prompt in dict.fromkeys(prompts):
            self.memory.pop(prompt, None)
            self.memory[prompt] = rows[prompt]
        forget_oldest(self.memory, MEMORY)
        return stack([rows[prompt] for prompt in prompts])

    def context(self, record: Record, reward_range: tuple[float, float]) -> Context[Any]:
        low, high = reward_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"reward_range is {reward_range}; allowed: smallest, then a larger largest, both finite")
        outcomes = torch.as_tensor(record.outcomes, dtype=torch.float64).detach()
        rates = (outcomes - low) / (high - low)
        inside, rounding = rates.clamp(0, 1), ROUNDING * max(abs(low), abs(high)) / (high - low)
        rates = torch.where((rates - inside).abs() <= rounding, inside, rates)
        try:
            check_outcomes(rates, len(record.prompts), "outcomes")
        except ValueError as error:
            raise ValueError(f"{error}, once [{low:g}, {high:g}] is mapped to [0, 1]") from None
        return Context(self.describe(record.prompts), rates)


def adapt(adapter: QueryAdapter, embedder: Embedder, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Return the adapter's features of each prompt, [N, F] float32 on the CPU."""
    if not prompts:
        return torch.zeros(0, adapter.features)
    states = embedder.embed(prompts)
    moved = states._replace(states=states.states.to(device), offsets=states.offsets.to(device))
    with torch.inference_mode():
        return adapter(moved).float().cpu()


def row_of(described: Any, number: int) -> Any:
    """Return one prompt's features, whether they are a tensor or a `Described`."""
    if isinstance(described, Tensor):
        return described[number].clone()
    return features.Described(*(block[number].clone() for block in described))


def stack(rows: Sequence[Any]) -> Any:
    """Return features of several prompts, from `row_of` of each."""
    if isinstance(rows[0], Tensor):
        return torch.stack(list(rows))
    return features.Described(*(torch.stack(blocks) for blocks in zip(*rows, strict=True)))
