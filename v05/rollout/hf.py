"""Rollouts through transformers: one batch, left-padded prompts, a key-value cache."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from v05.errors import InputError
from v05.policy import Policy
from v05.rollout.engine import Rollout, check_request
from v05.seeds import seed_of


class TransformersEngine:
    """Samples from its own copy of a policy, in the process of the trainer."""

    def __init__(self, policy: Policy, sequences_at_once: int | None = None) -> None:
        """Copy `policy`; later changes arrive through `update_weights` only.

        Args:
            policy: model and tokenizer.
            sequences_at_once: answers in one batch at most; None for no limit.
        """
        self.sequences_at_once = sequences_at_once
        model = copy.deepcopy(policy.model).eval().requires_grad_(False)
        self.policy = dataclasses.replace(policy, model=model)

    def update_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the policy's weights, by parameter name.

        Args:
            weights: what `state_dict` of the policy's model returns.

        Raises:
            RuntimeError: a name or a shape differs from the model's.
        """
        self.policy.model.load_state_dict(weights)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], counts: Sequence[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample answers; a prompt is read once however many answers it gets.

        Args:
            prompts: non-empty strings over the tokenizer's alphabet.
            counts: how many answers to each, 0 or more.
            seed: fixes every draw of this call.
            temperature: divides the logits, above 0.
            max_new_tokens: limit of an answer's tokens, end token included, 1 or more.

        Returns:
            One list of rollouts per prompt, `counts` long.

        Raises:
            ValueError: lengths differ, or a number is outside what is allowed.
        """
        check_request(prompts, counts, temperature, max_new_tokens)
        rollouts: list[list[Rollout]] = [[] for _ in prompts]
        for number, (first, part) in enumerate(pieces(counts, self.sequences_at_once or sum(counts))):
            own = seed if number == 0 else seed_of("piece", seed, number)
            found = self._answers(prompts[first : first + len(part)], part, own, temperature, max_new_tokens)
            for place, row in enumerate(found, first):
                rollouts[place] += row
        return rollouts

    def _answers(
        self, prompts: Sequence[str], counts: Sequence[int], seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample one batch."""
        prompt_ids = self.policy.encode(prompts)
        with self.policy.precision:
            tokens, logprobs = self._sample(prompt_ids, counts, seed, temperature, max_new_tokens)
        ends = set(self.policy.end_ids)
        token_rows, logprob_rows = tokens.tolist(), logprobs.tolist()
        rollouts: list[list[Rollout]] = []
        row = 0
        for ids, count in zip(prompt_ids, counts, strict=True):
            rollouts.append([])
            for sampled, reported in zip(token_rows[row : row + count], logprob_rows[row : row + count], strict=True):
                length = next((place for place, token in enumerate(sampled, 1) if token in ends), len(sampled))
                finished = sampled[length - 1] in ends
                text = self.policy.decode(sampled[: length - finished])
                rollouts[-1].append(
                    Rollout(tuple(ids), tuple(sampled[:length]), tuple(reported[:length]), text, finished)
                )
            row += count
        return rollouts

    def _sample(
        self, prompt_ids: list[list[int]], counts: Sequence[int], seed: int, temperature: float, max_new_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return tokens [N, L] and their log-probabilities [N, L]; what follows an end token has no meaning."""
        from transformers import DynamicCache

        model, device = self.policy.model, self.policy.device
        ends = torch.tensor(self.policy.end_ids, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        width = max(map(len, prompt_ids))
        inputs = torch.tensor([[self.policy.pad_id] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
        lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
        mask = torch.arange(width, device=device) >= width - lengths[:, None]
        positions = (torch.arange(width, device=device) - (width - lengths[:, None])).clamp(min=0)
        cache = DynamicCache(config=model.config)
        layers = getattr(cache, "layers", [])
        recurrent = bool(layers) and not any(hasattr(each, "batch_select_indices") for each in layers)  # no attention
        name = _cache_argument(model)
        output = model(input_ids=inputs, attention_mask=mask, position_ids=positions, logits_to_keep=1, **{name: cache})
        chosen = torch.repeat_interleave(torch.arange(len(prompt_ids)), torch.tensor(counts)).to(device)
        cache.reorder_cache(cast(Any, chosen))  # unlike batch_select_indices it knows states of linear attention
        logits, mask, position = output.logits[chosen, -1], mask[chosen], lengths[chosen, None]
        if not bool(logits.amax(-1).isfinite().all()):  # -inf forbids a token, but not all of them
            raise FloatingPointError("the policy's logits are not finite")
        tokens, logprobs = [], []
        done = torch.zeros(len(chosen), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            distribution = torch.log_softmax(logits.float() / temperature, dim=-1)
            token = torch.multinomial(distribution.exp(), 1, generator=generator)
            tokens.append(token)
            logprobs.append(distribution.gather(1, token))
            done |= torch.isin(token[:, 0], ends)
            if bool(done.all()) or len(tokens) == max_new_tokens:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            seen = None if recurrent else mask
            output = model(input_ids=token, attention_mask=seen, position_ids=position, **{name: cache})
            logits, position = output.logits[:, -1], position + 1
        return torch.cat(tokens, dim=1), torch.cat(logprobs, dim=1)


def _cache_argument(model: Any) -> str:
    """Return the name under which a model takes its cache.

    Raises:
        InputError: a model that takes a cache of a kind of its own; ignoring ours, it would sample without context.
    """
    named = inspect.signature(model.forward).parameters
    if "cache" in named or "past_key_values" in named:
        return "cache" if "cache" in named else "past_key_values"  # the newest transformers 5 renames it
    own = sorted({"cache_params", "state"} & set(named))
    if own:
        found = f"{type(model).__name__} of this transformers keeps its context in {own[0]!r}"
        raise InputError(f"{found}; allowed: another model or engine, or a newer transformers")
    return "past_key_values"


def pieces(counts: Sequence[int], limit: int) -> Iterator[tuple[int, list[int]]]:
    """Yield consecutive prompts with at most `limit` answers in all, as the first one's index and their counts.

    A prompt that wants more than is left goes on in the next piece; prompts that want none may be left out.
    """
    first, part, room = 0, list[int](), limit
    for index, count in enumerate(counts):
        while count > 0:
            taken = min(count, room)
            part += [0] * (index - first - len(part)) + [taken]
            count, room = count - taken, room - taken
            if room == 0:
                yield first, part
                first, part, room = index, [], limit
        if not part:
            first = index + 1
    if part:
        yield first, part
