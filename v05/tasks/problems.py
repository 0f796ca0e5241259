"""A task made of records: every one a prompt with what its verifier needs."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from v05.errors import InputError
from v05.tasks.data import columns_digest, digest
from v05.tasks.verifiers import VERIFIERS, make_verifier, source_digest


class Problems:
    """Records in an endless stream, shuffled anew in every pass, and a share of them held out.

    Attributes:
        name, reward_range, max_answer_length: see `v05.tasks.Task`.
        digest: changes with any prompt or answer.
        columns: changes with any column, where the verifier is one of the user's own, which may read it; else empty.
        verifier_file: changes with the file that defines a verifier of the user's own; else empty.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        name: str,
        verifier: str,
        reward_range: tuple[float, float] = (0.0, 1.0),
        heldout_share: float = 0.05,
        max_answer_length: int = 1024,
    ) -> None:
        """Hold out the records whose prompts have the smallest checksums, so that their order does not matter.

        Args:
            records: with different prompts, see `v05.tasks.data.read_data`.
            name: of the task.
            verifier: see `v05.tasks.verifiers.make_verifier`.
            reward_range: smallest and largest reward.
            heldout_share: of the records, rounded, at least one of them.
            max_answer_length: limit of an answer's tokens.

        Raises:
            InputError: fewer than two records, or no such verifier.
        """
        if len(records) < 2:
            raise InputError(f"{name} has {len(records)} problems; allowed: 2 or more, one of them to be held out")
        self.name, self.reward_range, self.max_answer_length = name, reward_range, max_answer_length
        self.digest = digest(records)
        self.columns = "" if verifier in VERIFIERS else columns_digest(records)
        self._verify = make_verifier(verifier, reward_range)
        self.verifier_file = "" if verifier in VERIFIERS else source_digest(self._verify)
        self._records = {str(record["prompt"]): record for record in records}
        ordered = sorted(self._records, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        heldout = min(max(1, round(heldout_share * len(ordered))), len(ordered) - 1)
        self._splits = {"heldout": ordered[:heldout], "train": ordered[heldout:]}

    def __len__(self) -> int:
        """Return how many problems there are, held-out ones included."""
        return len(self._records)

    def prompts(self, seed: int, start: int, count: int, split: Literal["train", "heldout"] = "train") -> list[str]:
        """Return prompts `start .. start + count - 1` of a stream.

        Args:
            seed: fixes the order.
            start: position of the first prompt, 0 or more.
            count: how many prompts.
            split: `train`, endless; or `heldout`, which ends after one pass, so that fewer may come.

        Raises:
            ValueError: `split` is neither name.
        """
        if split not in self._splits:
            raise ValueError(f"split is {split!r}; allowed: train, heldout")
        size = len(self._splits[split])
        found: list[str] = []
        for position in range(start, start + count):
            turn, place = divmod(position, size)
            if split == "heldout" and turn > 0:
                break
            if not found or place == 0:
                order = self._order(seed, turn, split)
            found.append(order[place])
        return found

    def record(self, prompt: str) -> Mapping[str, Any]:
        """Return the record of a prompt."""
        return self._records[prompt]

    def verify(self, prompt: str, text: str) -> float:
        """Return the reward of `text`, from the verifier in this process and thread: it may raise, and hang."""
        return self._verify(prompt, text, self.record(prompt))

    def _order(self, seed: int, turn: int, split: str) -> list[str]:
        order = list(self._splits[split])
        random.Random(f"{split}/{seed}/{turn}").shuffle(order)
        return order
