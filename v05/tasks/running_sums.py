"""Sums worked out step by step, some nearly always right and some nearly never."""

import math
import random
from typing import Final

from v05.tasks.sums import SumPrompts, with_wrong_digit

EDGE: Final = 5.75  # digits in a sum at which demonstrations are right half the time
STEEPNESS: Final = 2.0  # of their log-odds, by digit
SUREST: Final = 0.995  # share of right demonstrations of the easiest sums


class RunningSums(SumPrompts):
    """Prompts such as `47+8+12=`; a right answer ends in `76`, as `55+76` does: every partial sum, digits reversed.

    Answers are long enough, and prompts differ enough, for the variance of gradients to matter.
    """

    name = "running_sums"
    numbers = (2, 6)
    max_answer_length = 20

    def verify(self, prompt: str, text: str) -> float:
        """Return 1.0 when the last number of `text` is exactly the sum with its digits reversed, else 0.0."""
        return float(text.rsplit("+", 1)[-1] == str(sum(self.operands(prompt)))[::-1])

    def share_right(self, prompt: str) -> float:
        """Return the probability that no step of a demonstration is wrong: near 1 below `EDGE` digits, near 0 above."""
        digits = sum(len(str(number)) for number in self.operands(prompt))
        return 1 - SUREST + (2 * SUREST - 1) / (1 + math.exp((digits - EDGE) * STEEPNESS))

    def demonstration(self, prompt: str, seed: int, position: int) -> str:
        """Return an answer for imitation, each step wrong with the same probability; a wrong sum is carried on.

        Args:
            prompt: the prompt.
            seed: names the stream of errors.
            position: the place in that stream.

        Returns:
            The partial sums, least significant digit first, `+` between them.
        """
        draw = random.Random(f"demonstration/{seed}/{position}")
        total, *others = self.operands(prompt)
        wrong = 1 - self.share_right(prompt) ** (1 / len(others))
        steps = []
        for number in others:
            total += number
            if draw.random() < wrong:
                total = int(with_wrong_digit(str(total), draw))
            steps.append(str(total)[::-1])
        return "+".join(steps)
