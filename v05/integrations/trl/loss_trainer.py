"""TRL's `GRPOTrainer` with log-probs and loss of v05's kernels, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from accelerate.logging import get_logger
from torch import Tensor

from v05.integrations.trl.linear_loss import Tokens, linear_loss_of, linear_metrics, packed_tokens, why_not_linear
from v05.integrations.trl.logprob_trainer import KernelLogprobTrainer
from v05.integrations.trl.loss import CLIPPED, ROW_MEANS, Divisors, Scored, loss_of, why_not
from v05.integrations.trl.metrics import sequence_means, step_tensors, token_means
from v05.integrations.trl.rollouts import in_pieces, learnt_from
from v05.kernels.policy_loss.op import PolicyLoss

logger = get_logger(__name__)
# What TRL's batches hold for models that see images.
IMAGES: Final = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class KernelLossTrainer(KernelLogprobTrainer):
    """The same with a `_compute_loss` that goes through `v05.kernels`, where `why_not` has no reason against it.

    A batch may hold `rows`, the rows of this process's generation batch: its steps need then not be equally large.
    """

    num_generations: int
    _buffered_inputs: list[dict[str, Tensor]] | None
    _rows_at_once: int | None = None  # where steps are cut

    def choose_loss(self) -> None:
        """Decide once which code computes the loss, and say so where it is not the one asked for."""
        self.choose_logprobs()
        chosen = self.args.loss_backend
        if chosen == "linear_policy_loss":
            reason = why_not_linear(self.args) or self._why_not_head
            chosen = self._instead("loss_backend", chosen, "policy_loss", reason)
        if chosen == "policy_loss":
            chosen = self._instead("loss_backend", chosen, "trl", why_not(self.args))
        self._loss_code = chosen

    def cut_steps(self) -> None:
        """Let no forward have more rows than a micro-batch, or say why steps stay whole where a batch grows."""
        self._rows_at_once = self.args.per_device_train_batch_size
        extra = self._loss_code == "trl" and (self._entropy_bonus_enabled or self.aux_loss_enabled)
        reasons = {"top_entropy_quantile is taken over a step": self.top_entropy_quantile < 1.0}
        reasons |= {"TRL's loss adds a mean over a step": extra, "lomo steps at once": "lomo" in str(self.args.optim)}
        for reason in [reason for reason, applies in reasons.items() if applies]:
            logger.warning(f"v05: steps of a batch that has grown have more rows than a micro-batch: {reason}")
            self._rows_at_once = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        """Return the loss of a step; of more rows than a micro-batch's, all but the last piece's gradient is taken."""
        most = self._rows_at_once if self.model.training else None
        *first, last = [inputs] if most is None else in_pieces(inputs, most)
        done = 0.0
        for piece in first:
            with self._without_sync(model):
                loss = super().compute_loss(model, piece, *args, **options)
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
            done = done + loss.detach()
        return super().compute_loss(model, last, *args, **options) + done

    @contextmanager
    def _without_sync(self, model: Any) -> Iterator[None]:
        """Keep gradients on each process, as transformers does for all but the last step of an update."""
        state = self.accelerator.gradient_state
        if not state.sync_gradients:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the loss of this step: TRL's value and gradient."""
        by = self._divisors(inputs)
        if self._loss_code == "trl":
            loss = super()._compute_loss(model, inputs)
            if self.loss_type in ROW_MEANS:
                return loss * len(inputs["advantages"]) * by.steps / by.rows  # of this mean in that of the batch
            return loss * by.share if self.loss_type == "bnpo" else loss
        if self._loss_code == "linear_policy_loss":
            return self._linear_loss(model, inputs, by)
        scored, entropies, auxiliary = self._scored(model, inputs)
        factor, logged = self._factor(inputs, scored, entropies)
        scored = scored._replace(factor=factor)
        result, kl = loss_of(self.args, scored, by)
        loss = result.loss
        if auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * auxiliary * by.share / by.steps
            mean = self.accelerator.gather_for_metrics(auxiliary.detach()).mean().item()
            self._metrics["train" if self.model.training else "eval"]["aux_loss"].append(mean)
        self._log_step(scored, step_tensors(self.args, scored, entropies, kl) | logged)
        return loss

    def _linear_loss(self, model: Any, inputs: dict[str, Any], by: Divisors) -> Tensor:
        """Return the loss from hidden states."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        factor = inputs["importance_sampling_ratio"] if corrected else None
        tokens = packed_tokens(self.args, inputs, factor, by)
        ids, mask = self._rows(inputs)
        result = self._at_states(model, ids, mask, self._loss_of_states, tokens)
        names = list(result.metrics)
        sums = self.accelerator.reduce(torch.stack([result.metrics[name] for name in names]), reduction="sum")
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in linear_metrics(self.args, names, sums).items():
            metrics[name].append(value)
        return result.loss

    def _rows(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return prompts with their completions, token ids and mask, `[B, S]` each."""
        ids, mask = (torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1) for what in ("ids", "mask"))
        return ids, mask

    @torch.compiler.disable
    def _loss_of_states(self, hidden: Tensor, head: Any, tokens: Tokens) -> PolicyLoss:
        return linear_loss_of(self.args, hidden, head, tokens)

    def _divisors(self, inputs: dict[str, Any]) -> Divisors:
        """Return what TRL divides by; rows are counted over the generation batch."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        rows = len(inputs["advantages"])
        if not self.model.training:
            return Divisors(rows, tokens, 1.0)
        accumulated, steps = self.current_gradient_accumulation_steps, self.args.steps_per_generation
        rows = float(inputs["rows"]) / steps if "rows" in inputs else rows
        by = Divisors(rows * accumulated, tokens * accumulated / steps, accumulated)
        if "step_tokens" not in inputs:
            return by
        return by._replace(share=learnt_from(inputs).sum() / inputs["step_tokens"].clamp(min=1))

    def _scored(self, model: Any, inputs: dict[str, Any]) -> tuple[Scored, Tensor, Tensor | None]:
        """Return the rows under the policy, their entropies [B, L], and the auxiliary loss of a mixture of experts."""
        others: dict[str, Any] = {name: inputs.get(name) for name in IMAGES}
        logprobs, entropies, auxiliary = self._get_per_token_logps_and_entropies(
            model,
            *self._rows(inputs),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **others,
        )
        mask = learnt_from(inputs).bool()
        old, advantages = inputs.get("old_per_token_logps"), inputs["advantages"]
        old = logprobs.detach() if old is None else old
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        ref = inputs["ref_per_token_logps"] if self.beta != 0.0 else None
        return Scored(logprobs, old, ref, mask, advantages, None), entropies, auxiliary

    def _factor(
        self, inputs: dict[str, Any], scored: Scored, entropies: Tensor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the product of what TRL multiplies a token's surrogate by (None where it is 1), and what it logs."""
        logprobs, old, _, mask, advantages, _ = scored
        ratio, factors, logged = inputs.get("importance_sampling_ratio"), [], {}
        if self.off_policy_mask_threshold is not None:
            sampler = inputs.get("sampling_per_token_logps", old)
            kept = (advantages, logprobs, sampler, mask.float(), self.off_policy_mask_threshold)
            factors.append(self.get_off_policy_mask(*kept))
        if self.top_entropy_quantile < 1.0:
            factors.append(self.get_high_entropy_mask(entropies, mask.long(), 1 - self.top_entropy_quantile).float())
        if self.loss_type == "vespo":
            args = self.args
            shape = (args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
            phi = self.get_gamma_weights(advantages, (logprobs - old).detach(), mask.float(), ratio, *shape)
            logged["vespo/phi_seq_mean"] = phi
            factors.append(phi)
        elif self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(ratio)
        product: Tensor | None = None
        for factor in factors:
            product = factor if product is None else product * factor
        return product, logged

    def _log_step(self, scored: Scored, tensors: dict[str, Tensor]) -> None:
        """Log what TRL logs of a step, over all processes."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        reduced = token_means(tensors, scored.mask, lambda sums: self.accelerator.reduce(sums, reduction="sum"))
        for name, value in reduced.items():
            metrics[name].append(value)
        if self.loss_type not in CLIPPED:
            return
        for name, source, extreme in (("low_min", "low_mean", torch.min), ("high_max", "high_mean", torch.max)):
            means = self.accelerator.gather(sequence_means(tensors[f"clip_ratio/{source}"], scored.mask))
            kept = means[~means.isnan()]
            metrics[f"clip_ratio/{name}"].append(extreme(kept).item() if len(kept) else torch.nan)
