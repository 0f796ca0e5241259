"""One micro-batch from tokens to loss."""

from typing import Any

import torch
from torch import Tensor

from v05.batch import PackedTokens
from v05.kernels import linear_logprob, linear_policy_loss, policy_loss, token_logprob
from v05.policy import Policy
from v05.training.algorithms import Algorithm
from v05.training.loss_config import PLAIN, LossConfig
from v05.training.sampler_gap import gap_sums


class Step(torch.nn.Module):
    """One micro-batch from tokens to loss, in one module, so that what shards its parameters gathers them for all."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        temperature: float,
        linear: bool,
        behaviour: bool = False,
        loss: LossConfig = PLAIN,
    ) -> None:
        """Hold what every micro-batch needs.

        Args:
            policy: what is trained.
            algorithm: gives the bounds of the ratio.
            temperature: divides the logits.
            linear: go from hidden states to the loss, without logits in memory.
            behaviour: the ratio refers to the sampler's log-probs, not to the policy's own before this update, unless
                the loss corrects for the sampler.
            loss: its options.
        """
        super().__init__()
        self.model, self.behaviour, self.corrects = policy.model, behaviour and not loss.corrects, loss.corrects
        self.policy, self.temperature, self.linear = policy, temperature, linear
        self.options = loss.options(algorithm)

    def forward(
        self, batch: PackedTokens, advantages: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Return the loss of a micro-batch.

        With `behaviour` rollouts of earlier policies are weighed by what has changed since they were sampled.

        Args:
            batch: N sequences with T response tokens, on the CPU.
            advantages: [N] float32.
            old_logprobs: [T] float32 on the policy's device; None to take the policy's own, as it is now.
            ref_logprobs: [T] float32 on the policy's device, under the reference; None for a loss without a KL.

        Returns:
            The loss, differentiable; metrics, sums and counts; the log-probs that the ratio refers to, [T]; and the
            entropy summed over the tokens, 0 where `old_logprobs` was given. Where it was not, metrics also have how
            far the policy is from the sampler, see `v05.training.sampler_gap.gap_sums`.
        """
        device = self.policy.device
        targets, weights, offsets, advantages = (
            value.to(device) for value in (batch.tokens, batch.weights, batch.sequence_offsets, advantages)
        )
        place = (batch.prompts, batch.tokens, batch.sequence_offsets)
        options: dict[str, Any] = {"sequence_offsets": offsets, "ref_logprobs": ref_logprobs, **self.options}
        if self.corrects:
            options["sampler_logprobs"] = batch.logprobs.to(device)
        silence = torch.zeros((), device=device)
        if not self.linear:
            logits = self.policy.response_logits(*place)
            logprobs, entropy = token_logprob(logits, targets, temperature=self.temperature)
            old, gaps = self._before(logprobs.detach(), batch) if old_logprobs is None else (old_logprobs, {})
            result = policy_loss(logprobs, old, advantages, weights, **options)
            silence = entropy.detach().sum() if old_logprobs is None else silence
            return result.loss, {**result.metrics, **gaps}, old, silence
        hidden = self.policy.response_hidden(*place)
        weight, bias = self.policy.output_layer
        layer: dict[str, Any] = {"bias": bias, "temperature": self.temperature}
        gaps = {}
        if old_logprobs is None:
            with torch.no_grad():
                own, entropies = linear_logprob(hidden, weight, targets, **layer)
            old_logprobs, gaps = self._before(own, batch)
            silence = entropies.sum()
        result = linear_policy_loss(hidden, weight, targets, old_logprobs, advantages, weights, **layer, **options)
        metrics = {name: value for name, value in result.metrics.items() if name != "entropy_sum"}
        return result.loss, {**metrics, **gaps}, old_logprobs, silence

    def _before(self, own: Tensor, batch: PackedTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the log-probs that the ratio refers to, and how far the policy's own are from the sampler's."""
        sampled, weights = batch.logprobs.to(own.device), batch.weights.to(own.device)
        return sampled if self.behaviour else own, gap_sums(own, sampled, weights)
