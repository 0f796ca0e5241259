"""Rollouts through transformers: one batch, left-padded prompts, a key-value cache."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from v05.policy import Policy
from v05.rollout.engine import Rollout, check_request


class TransformersEngine:
    """Samples from its own copy of a policy, in the process of the trainer."""

    def __init__(self, policy: Policy) -> None:
        """Copy `policy`; later changes arrive through `update_weights` only."""
        self.policy = Policy(copy.deepcopy(policy.model).eval().requires_grad_(False), policy.tokenizer)

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
        if sum(counts) == 0:
            return [[] for _ in prompts]
        prompt_ids = self.policy.encode(prompts)
        tokens, logprobs = self._sample(prompt_ids, counts, seed, temperature, max_new_tokens)
        end = self.policy.tokenizer.eos_token_id
        token_rows, logprob_rows = tokens.tolist(), logprobs.tolist()
        rollouts: list[list[Rollout]] = []
        row = 0
        for ids, count in zip(prompt_ids, counts, strict=True):
            rollouts.append([])
            for sampled, reported in zip(token_rows[row : row + count], logprob_rows[row : row + count], strict=True):
                finished = end in sampled
                length = sampled.index(end) + 1 if finished else len(sampled)
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

        model, end = self.policy.model, self.policy.tokenizer.eos_token_id
        generator = torch.Generator().manual_seed(seed)
        width = max(map(len, prompt_ids))
        inputs = torch.tensor([[self.policy.tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompt_ids])
        lengths = torch.tensor([len(ids) for ids in prompt_ids])
        mask = torch.arange(width) >= width - lengths[:, None]
        positions = (torch.arange(width) - (width - lengths[:, None])).clamp(min=0)
        cache = DynamicCache(config=model.config)
        output = model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        chosen = torch.repeat_interleave(torch.arange(len(prompt_ids)), torch.tensor(counts))
        cache.batch_select_indices(chosen)
        logits, mask, position = output.logits[chosen, -1], mask[chosen], lengths[chosen, None]
        tokens, logprobs = [], []
        done = torch.zeros(len(chosen), dtype=torch.bool)
        for _ in range(max_new_tokens):
            distribution = torch.log_softmax(logits.float() / temperature, dim=-1)
            token = torch.multinomial(distribution.exp(), 1, generator=generator)
            tokens.append(token)
            logprobs.append(distribution.gather(1, token))
            done |= token[:, 0] == end
            if bool(done.all()) or len(tokens) == max_new_tokens:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
            logits, position = output.logits[:, -1], position + 1
        return torch.cat(tokens, dim=1), torch.cat(logprobs, dim=1)
