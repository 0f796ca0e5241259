"""The stream of prompts that ask for a sum."""

import random
import zlib
from typing import Final, Literal

HELDOUT_PART: Final = 8  # one prompt in this many is held out, chosen by the prompt's checksum


def with_wrong_digit(number: str, draw: random.Random) -> str:
    """Return a number with one of its digits replaced by another."""
    place = draw.randrange(len(number))
    digit = draw.choice([other for other in "0123456789" if other != number[place]])
    return number[:place] + digit + number[place + 1 :]


class SumPrompts:
    """Prompts such as `47+8+12=`, of numbers of one or two digits."""

    alphabet = "0123456789+="
    reward_range = (0.0, 1.0)
    numbers: tuple[int, int]  # in a sum, at least and at most

    def prompts(self, seed: int, start: int, count: int, split: Literal["train", "heldout"] = "train") -> list[str]:
        """Return a stretch of the endless stream of prompts that `seed` and `split` name.

        Args:
            seed: names the stream.
            start: position of the first prompt, 0 or more.
            count: how many prompts.
            split: `train` or `heldout`; no prompt is ever in both.

        Returns:
            `count` prompts; prompt i depends on seed, split and `start + i` only.

        Raises:
            ValueError: `split` is neither name.
        """
        if split not in ("train", "heldout"):
            raise ValueError(f"split is {split!r}; allowed: train, heldout")
        return [self._prompt(seed, position, split) for position in range(start, start + count)]

    def operands(self, prompt: str) -> list[int]:
        """Return the numbers that `prompt` asks to add."""
        return [int(number) for number in prompt.removesuffix("=").split("+")]

    def _prompt(self, seed: int, position: int, split: str) -> str:
        draw = random.Random(f"{split}/{seed}/{position}")
        while True:
            numbers = [draw.randrange(10 ** draw.randint(1, 2)) for _ in range(draw.randint(*self.numbers))]
            prompt = "+".join(map(str, numbers)) + "="
            if (zlib.crc32(prompt.encode()) % HELDOUT_PART == 0) == (split == "heldout"):
                return prompt
