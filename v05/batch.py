"""The two batches that travel between the parts: ragged groups of rewards, and packed response tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Rollout groups, one per prompt, of any sizes.

    Attributes:
        prompts: G prompts.
        ids: G positions of the prompts in the task's stream.
        rewards: rewards of all groups, one group after the other, [N] float32.
        offsets: group g is `rewards[offsets[g]:offsets[g + 1]]`, [G + 1] int64.
    """

    prompts: tuple[str, ...]
    ids: tuple[int, ...]
    rewards: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        """Raise ValueError where lengths disagree."""
        if not len(self.prompts) == len(self.ids) == len(self.offsets) - 1:
            raise ValueError(
                f"prompts, ids and offsets have {len(self.prompts)}, {len(self.ids)} and {len(self.offsets)} entries; "
                "allowed: G, G and G + 1"
            )
        check_offsets("offsets", self.offsets, len(self.rewards))

    @classmethod
    def from_lists(cls, prompts: Sequence[str], ids: Sequence[int], rewards: Sequence[Sequence[float]]) -> "Groups":
        """Return groups made from one list of rewards per prompt."""
        flat = [reward for group in rewards for reward in group]
        return cls(
            prompts=tuple(prompts),
            ids=tuple(ids),
            rewards=torch.tensor(flat, dtype=torch.float32),
            offsets=offsets_of([len(group) for group in rewards]),
        )

    @property
    def counts(self) -> Tensor:
        """Return the rollouts per group, [G] int64."""
        return self.offsets.diff()

    @property
    def means(self) -> Tensor:
        """Return the mean reward per group, [G] float32; nan for an empty group."""
        return self.sums / self.counts

    @property
    def sums(self) -> Tensor:
        """Return the summed reward per group, [G] float32."""
        return torch.zeros(len(self.counts)).index_add_(0, self.group_of_rollout, self.rewards)

    @property
    def group_of_rollout(self) -> Tensor:
        """Return the group that each rollout belongs to, [N] int64."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)


@dataclass(frozen=True)
class PackedTokens:
    """Response tokens of N sequences end to end, without padding; prompt tokens are kept beside them.

    Attributes:
        prompts: N lists of prompt token ids.
        tokens: response token ids, [T] int64.
        logprobs: log-probability of each token as the sampler reported it, in nats, [T] float32.
        weights: what each token counts in the loss, mask and aggregation in one, [T] float32.
        sequence_offsets: response i is `tokens[sequence_offsets[i]:sequence_offsets[i + 1]]`, [N + 1] int64.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: Tensor
    logprobs: Tensor
    weights: Tensor
    sequence_offsets: Tensor

    def __post_init__(self) -> None:
        """Raise ValueError where lengths disagree."""
        lengths = [len(self.tokens), len(self.logprobs), len(self.weights)]
        if len(set(lengths)) != 1:
            raise ValueError(f"tokens, logprobs and weights have lengths {lengths}; allowed: one common length")
        if len(self.prompts) != len(self.sequence_offsets) - 1:
            raise ValueError(
                f"prompts and sequence_offsets have {len(self.prompts)} and {len(self.sequence_offsets)} entries; "
                "allowed: N and N + 1"
            )
        check_offsets("sequence_offsets", self.sequence_offsets, len(self.tokens))

    @property
    def lengths(self) -> Tensor:
        """Return the tokens of each response, [N] int64."""
        return self.sequence_offsets.diff()

    def split(self, parts: int) -> Iterator[tuple[slice, "PackedTokens"]]:
        """Yield the batch in consecutive parts of nearly equal numbers of sequences.

        Args:
            parts: how many, 1 or more; parts without a sequence are left out.

        Yields:
            The slice of the sequences, and those sequences with their weights unchanged, so that the gradients
            of the parts add up to the gradient of the whole.

        Raises:
            ValueError: `parts` is less than 1.
        """
        if parts < 1:
            raise ValueError(f"parts is {parts}; allowed: 1 or more")
        count = len(self.prompts)
        for part in range(parts):
            sequences = slice(count * part // parts, count * (part + 1) // parts)
            if sequences.start == sequences.stop:
                continue
            offsets = self.sequence_offsets[sequences.start : sequences.stop + 1]
            tokens = slice(int(offsets[0]), int(offsets[-1]))
            yield (
                sequences,
                PackedTokens(
                    prompts=self.prompts[sequences],
                    tokens=self.tokens[tokens],
                    logprobs=self.logprobs[tokens],
                    weights=self.weights[tokens],
                    sequence_offsets=offsets - offsets[0],
                ),
            )


def offsets_of(lengths: Sequence[int] | Tensor) -> Tensor:
    """Return the offsets [N + 1] int64 of consecutive segments with lengths [N], on the device of a tensor of them."""
    return torch.nn.functional.pad(torch.as_tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def check_offsets(name: str, offsets: Tensor, total: int) -> None:
    """Raise ValueError unless `offsets` starts at 0, never falls and ends at `total`."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"{name} is {offsets.dtype} of shape {tuple(offsets.shape)}; allowed: int64 of shape [n + 1]")
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name} is {offsets.tolist()}; allowed: from 0, never falling, to {total}")
