"""Sums of two to four numbers, answered with the least significant digit first."""

import random

from v05.tasks.sums import SumPrompts, with_wrong_digit


class Arithmetic(SumPrompts):
    """Prompts such as `47+8+12=`; the right answer there is `76`, that is 67 with its digits reversed."""

    name = "arithmetic"
    numbers = (2, 4)
    max_answer_length = 4

    def verify(self, prompt: str, text: str) -> float:
        """Return 1.0 when `text` is exactly the sum with its digits reversed, else 0.0."""
        return float(text == self.answer(prompt))

    def answer(self, prompt: str) -> str:
        """Return the right answer to `prompt`: its sum, least significant digit first."""
        return str(sum(self.operands(prompt)))[::-1]

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
        wrong = draw.random() < 0.30 + 0.45 * self.difficulty(prompt)
        return with_wrong_digit(answer, draw) if wrong else answer
