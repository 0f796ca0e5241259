"""The policy that a run starts from, frozen: what the KL of the loss refers to."""

import copy
import dataclasses

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from v05.batch import PackedTokens
from v05.kernels import linear_logprob, token_logprob
from v05.policy import Policy


class Reference(torch.nn.Module):
    """A copy of a policy that nothing trains."""

    def __init__(self, policy: Policy, temperature: float, linear: bool) -> None:
        """Copy the policy as it is now.

        Args:
            policy: left as it is.
            temperature: divides the logits, as in the loss.
            linear: go from hidden states to log-probs, without logits in memory.
        """
        super().__init__()
        self.model = copy.deepcopy(policy.model).requires_grad_(False).eval()
        self.policy = dataclasses.replace(policy, model=self.model)
        self.temperature, self.linear = temperature, linear

    @torch.no_grad()
    def forward(self, batch: PackedTokens) -> Tensor:
        """Return the log-prob of each of a batch's T response tokens, [T] float32, on the policy's device."""
        place, targets = (batch.prompts, batch.tokens, batch.sequence_offsets), batch.tokens.to(self.policy.device)
        if self.linear:
            weight, bias = self.policy.output_layer
            hidden = self.policy.response_hidden(*place)
            return linear_logprob(hidden, weight, targets, bias=bias, temperature=self.temperature)[0]
        return token_logprob(self.policy.response_logits(*place), targets, temperature=self.temperature)[0]

    def logprobs(self, batch: PackedTokens) -> Tensor:
        """Return the same, and keep of parameters that are split among processes no more than this one's part."""
        found: Tensor = self(batch)
        if isinstance(self, FSDPModule):
            self.reshard()
        return found
