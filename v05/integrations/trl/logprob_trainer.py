"""TRL's `GRPOTrainer` with log-probs and entropies of v05's kernels, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context

from v05.integrations.trl.config import V05Config
from v05.integrations.trl.head import Places, why_not_head
from v05.integrations.trl.logprobs import completion_tokens, logprobs_of, why_no_kernel
from v05.integrations.trl.states import end_at_states
from v05.kernels.token_logprob.op import TokenLogprob

logger = get_logger(__name__)


class KernelLogprobTrainer(GRPOTrainer):
    """`GRPOTrainer` whose log-probs come from `v05.kernels`, where `why_not_head` has no reason against it.

    Those of the policy, of the old policy and of the reference: all that `_get_per_token_logps_and_entropies` returns.
    """

    args: V05Config

    def choose_logprobs(self) -> None:
        """Decide once which code computes log-probs, and say so where it is not the one asked for."""
        policy = self.accelerator.unwrap_model(self.model)
        split = self.is_model_parallel or bool(getattr(policy, "tp_size", None))
        self._why_not_head = why_not_head(policy.config.get_text_config(), self.aux_loss_enabled, split, self._is_vlm)
        self._logprob_code = self.args.logprob_backend
        if self._logprob_code == "linear_logprob":
            reason = self._why_not_head or why_no_kernel(self.accelerator.device.type)
            self._logprob_code = self._instead("logprob_backend", self._logprob_code, "trl", reason)
        needed = self._logprob_code == "linear_logprob" or self.args.loss_backend == "linear_policy_loss"
        if needed and self._why_not_head is None:
            for model in (policy, self.ref_model):
                if model is not None:
                    end_at_states(self.accelerator.unwrap_model(model))

    def _instead(self, option: str, asked: str, other: str, reason: str | None) -> str:
        if reason is None:
            return asked
        logger.warning(f"v05: {option} {other!r} runs instead of {asked!r}: {reason}")
        return other

    def _at_states(self, model: Any, ids: Tensor, mask: Tensor, end: Callable[..., Any], given: Any) -> Any:
        """Return `end(hidden, head, given)`; the model is called as a whole, so that wrappers see the call."""
        with self.accelerator.autocast():
            return model(input_ids=ids, attention_mask=mask, at_states=end, given=given)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Any, Any]:
        """Return log-probs and entropies of completions, `[B, logits_to_keep]`, and an auxiliary loss, as TRL does.

        Masked tokens have 0, as TRL's have. Entropies and auxiliary loss are None where they are not asked for.
        """
        only_theirs = any(value is not None and value is not False for value in others.values())
        if self._logprob_code == "trl" or only_theirs:
            rest = dict(others, batch_size=batch_size, compute_entropy=compute_entropy)
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, **rest)
        size = batch_size or len(input_ids)
        found = []
        with profiling_context(self, "_get_per_token_logps_and_entropies"):
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
                tokens = completion_tokens(ids, mask, logits_to_keep)
                found.append(self._at_states(model, ids, mask, self._logprobs_of_states, tokens))
            logprobs, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logprobs, entropies if compute_entropy else None, None

    @torch.compiler.disable
    def _logprobs_of_states(self, hidden: Tensor, head: Any, tokens: Places) -> TokenLogprob:
        return logprobs_of(self.args, hidden, head, tokens)
