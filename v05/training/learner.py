"""Learning from a batch: gradients of the loss summed over micro-batches and ranks, a step of the optimiser."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from v05.batch import PackedTokens
from v05.checkpoint import optimizer_entries, optimizer_tensors
from v05.errors import InputError
from v05.policy import Policy
from v05.training.algorithms import Algorithm
from v05.training.loss_config import PLAIN, LossConfig
from v05.training.ranks import ALONE, Ranks
from v05.training.reference import Reference
from v05.training.sampler_gap import LARGEST, with_gap_metrics
from v05.training.sharding import shard, split_as, whole
from v05.training.step import Step

GRADIENT_NORM: Final = 1.0  # gradients are scaled down to this norm
WARM_UP: Final = 10  # updates of linearly rising learning rate, while Adam's averages fill


class Learner:
    """The policy with its optimiser."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        *,
        learning_rate: float,
        temperature: float,
        epochs: int,
        micro_batches: int,
        linear: bool = False,
        behaviour: bool = False,
        loss: LossConfig = PLAIN,
        ranks: Ranks = ALONE,
    ) -> None:
        """Set up Adam over the policy's parameters, split among the ranks where there are several.

        Args:
            policy: what is trained, in place.
            algorithm: gives the bounds of the ratio.
            learning_rate: of Adam, after the warm-up.
            temperature: of sampling and of log-probabilities.
            epochs: passes over each batch.
            micro_batches: parts that a batch is split into; the gradient does not depend on it.
            linear: go from hidden states to the loss, without logits in memory.
            behaviour, loss: see `Step`; a KL refers to the policy as it is given here.
            ranks: all of them make a learner of an equal policy, and call the same methods with equal arguments.

        Raises:
            InputError: `linear`, and the policy's logits are not those of its output layer alone.
        """
        self.policy, self.learning_rate, self.epochs, self.micro_batches = policy, learning_rate, epochs, micro_batches
        self.ranks = ranks
        if linear:
            check_linear(policy)
        self.step = Step(policy, algorithm, temperature, linear, behaviour, loss)
        self.reference = Reference(policy, temperature, linear) if loss.refers else None
        if ranks.count > 1:
            shard(self.step, policy, ranks)
            if self.reference is not None:
                shard(self.reference, self.reference.policy, ranks)
        self.optimizer = torch.optim.Adam(policy.model.parameters(), lr=learning_rate, betas=(0.9, 0.999))

    def learn(self, batch: PackedTokens, advantages: Tensor, update: int) -> dict[str, float]:
        """Take one step per epoch, the gradient summed over micro-batches.

        Args:
            batch: N sequences, weighted over the whole batch.
            advantages: [N] float32.
            update: updates before this one.

        Returns:
            Sums of the loss's metrics over all epochs, so that shares of them are right; `loss`, the mean over the
            epochs; `gradient_norm` of the last; `entropy` in nats, the mean over the tokens, and how far trainer and
            sampler are apart, see `v05.training.sampler_gap.with_gap_metrics`, both before the first step.

        Raises:
            FloatingPointError: the gradient is not finite; no step was taken with it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (update + 1) / WARM_UP)
        parts = share(batch, self.micro_batches, self.ranks)
        old_logprobs: list[Tensor] = []
        reference = [None if self.reference is None else self.reference.logprobs(tokens) for _, tokens, _ in parts]
        totals: dict[str, float] = {}
        for epoch in range(self.epochs):
            self.optimizer.zero_grad(set_to_none=True)
            for part, (sequences, tokens, counts) in enumerate(parts):
                known = old_logprobs[part] if epoch else None
                loss, metrics, old, entropy = self.step(tokens, advantages[sequences], known, reference[part])
                (loss * self.ranks.count).backward()  # sharded gradients are averaged over the ranks
                if epoch == 0:
                    old_logprobs.append(old)
                    metrics["entropy"] = entropy
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    _add(totals, name, float(value) if counts else 0.0)
            norm = self._clip()
            if not math.isfinite(norm):
                raise FloatingPointError(f"update {update + 1}: the gradient's norm is {norm}; allowed: finite")
            self.optimizer.step()
        totals = self.ranks.combine(totals, LARGEST)
        means = {"loss": totals["loss"] / self.epochs, "entropy": totals["entropy"] / len(batch.tokens)}
        return {**with_gap_metrics(totals), **means, "gradient_norm": norm}

    def weights(self) -> dict[str, Tensor]:
        """Return the policy's weights by parameter name, whole, for an engine or a file; all ranks call this."""
        return {name: whole(value) for name, value in self.policy.model.state_dict().items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return policy and optimiser, whole tensors by name, from which `load_state` goes on bit for bit.

        All ranks call this; the leader has the tensors, the others none, as theirs would fill the memory for nothing.
        """
        tied = self._tied()
        policy = {name: value for name, value in self.policy.model.state_dict().items() if name not in tied}
        return {"policy": self._gathered(policy), "optimizer": self._gathered(optimizer_tensors(self.optimizer))}

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors on the leader, one after the other, and none on the others."""
        found: dict[str, Tensor] = {}
        for name, value in tensors.items():
            gathered = whole(value)
            if self.ranks.leads:
                found[name] = gathered.contiguous()
        return found

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from a state that `state` returned.

        Raises:
            RuntimeError: a name is missing or unknown.
        """
        own = self.policy.model.state_dict()
        given = {name: split_as(value, own.get(name, value)) for name, value in tensors["policy"].items()}
        missing, unknown = self.policy.model.load_state_dict(given, strict=False)
        if unknown or set(missing) - self._tied():
            raise RuntimeError(f"the checkpoint lacks {missing} and has {unknown}; allowed: the policy's own names")
        parameters = list(self.policy.model.parameters())
        entries = {
            number: {name: split_as(value, parameters[number]) for name, value in entry.items()}
            for number, entry in optimizer_entries(tensors["optimizer"]).items()
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})

    def _clip(self) -> float:
        """Scale the gradient down to `GRADIENT_NORM` and return its norm before."""
        return float(whole(torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), GRADIENT_NORM)))

    def _tied(self) -> set[str]:
        """Return the names of parameters that are others under another name."""
        model = self.policy.model
        own = {name for name, _ in model.named_parameters()}
        return {name for name, _ in model.named_parameters(remove_duplicate=False)} - own


def share(batch: PackedTokens, micro_batches: int, ranks: Ranks) -> list[tuple[slice, PackedTokens, bool]]:
    """Return this rank's micro-batches, as many on every rank, since all have to gather parameters together.

    Args:
        batch: N sequences, 1 or more.
        micro_batches: on each rank, at most.
        ranks: split the parts among themselves.

    Returns:
        The slice of the sequences, the sequences, and whether they count: a rank that has a part less than the others
        gets one of weight 0 that does not.
    """
    parts = [(*part, True) for part in batch.split(micro_batches * ranks.count)]
    own = parts[ranks.rank :: ranks.count]
    if len(own) * ranks.count < len(parts):
        first, tokens = next(batch.split(len(batch.prompts)))
        own.append((first, dataclasses.replace(tokens, weights=torch.zeros_like(tokens.weights)), False))
    return own


def check_linear(policy: Policy) -> None:
    """Raise InputError unless a policy's logits are its output layer's product with its last hidden states."""
    layer = policy.model.get_output_embeddings()
    tokens = (torch.arange(8) + len(layer.weight) // 2) % len(layer.weight)
    place = ([[policy.end_ids[0]]], tokens, torch.tensor([0, len(tokens)]))
    exact = dataclasses.replace(policy, dtype=torch.float32)
    for scale in (1.0, 1e3):  # the second shows a soft cap, which leaves small logits alone
        hook = layer.register_forward_hook(lambda module, inputs, output, scale=scale: scale * output)
        with torch.no_grad(), torch.autocast(policy.device.type, enabled=False):
            logits = exact.response_logits(*place)
            product = scale * torch.nn.functional.linear(exact.response_hidden(*place), *exact.output_layer)
        hook.remove()
        gap, size = float((logits - product).abs().max()), float(logits.abs().max())
        if not gap <= 1e-3 * max(size, 1.0):
            raise InputError(
                f"the model does more to its logits than its output layer (they differ by {gap:.3g} of {size:.3g}); "
                "allowed for it: loss = logits"
            )


def _add(totals: dict[str, float], name: str, value: float) -> None:
    totals[name] = max(totals.get(name, 0.0), value) if name in LARGEST else totals.get(name, 0.0) + value
