"""Sums of two to four numbers, answered with the least significant digit first."""

import random
import zlib
from typing import Literal

HELDOUT_PART = 8  # one prompt in this many is held out, chosen by the prompt's checksum


class Arithmetic:
    """Prompts such as `47+8+12=`; the right answer there is `76`, that is 67 with its digits reversed."""

    name = "arithmetic"
    alphabet = "0123456789+="
    reward_range = (0.0, 1.0)
    max_answer_length = 4

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

    def verify(self, prompt: str, text: str) -> float:
        """Return 1.0 when `text` is exactly the sum with its digits reversed, else 0.0."""
        return float(text == self.answer(prompt))

    def answer(self, prompt: str) -> str:
        """Return the right answer to `prompt`: its sum, least significant digit first."""
        return str(sum(self.operands(prompt)))[::-1]

    def operands(self, prompt: str) -> list[int]:
        """Return the numbers that `prompt` asks to add."""
        return [int(number) for number in prompt.removesuffix("=").split("+")]

    def difficulty(self, prompt: str) -> float:
        """Return how hard `prompt` is, from 0 (two numbers of one digit) to 1 (four numbers of two digits)."""
        numbers = self.operands(prompt)
        mean_digits = sum(len(str(number)) for number in numbers) / len(numbers)
        return (len(numbers) - 2) / 4 + (mean_digits - 1) / 2

    def demonstration(self, prompt: str, seed: int, position: int) -> str:
        """Return an answer for imitation, wrong in one digit with a probability of 0.30 to 0.75 by difficulty.

        Args:
            prompt: the prompt.
            seed: names the stream of errors.
            position: the place in that stream.

        Returns:
            The right answer, or the right answer with one digit replaced.
        """
        answer = self.answer(prompt)
        draw = random.Random(f"demonstration/{seed}/{position}")
        if draw.random() >= 0.30 + 0.45 * self.difficulty(prompt):
            return answer
        place = draw.randrange(len(answer))
        digit = draw.choice([other for other in "0123456789" if other != answer[place]])
        return answer[:place] + digit + answer[place + 1 :]

    def _prompt(self, seed: int, position: int, split: str) -> str:
        draw = random.Random(f"{split}/{seed}/{position}")
        while True:
            numbers = [draw.randrange(10 ** draw.randint(1, 2)) for _ in range(draw.randint(2, 4))]
            prompt = "+".join(map(str, numbers)) + "="
            if (zlib.crc32(prompt.encode()) % HELDOUT_PART == 0) == (split == "heldout"):
                return prompt
