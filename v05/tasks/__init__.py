"""Verifiable tasks: where prompts come from and what an answer is worth."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Literal, Protocol

from v05.errors import InputError
from v05.tasks.arithmetic import Arithmetic
from v05.tasks.running_sums import RunningSums

Split = Literal["train", "heldout"]


class Task(Protocol):
    """A stream of prompts and a verifier; everything random is a function of the seed and the position."""

    name: str
    reward_range: tuple[float, float]
    max_answer_length: int

    def prompts(self, seed: int, start: int, count: int, split: Split = "train") -> list[str]:
        """Return prompts `start .. start + count - 1` of the stream that `seed` and `split` name.

        The stream of held-out prompts may end.
        """
        ...

    def verify(self, prompt: str, text: str) -> float:
        """Return the reward, in `reward_range`, of answering `text` to `prompt`."""
        ...


class Demonstrated(Task, Protocol):
    """A task over a small alphabet that shows how it is done, for policies that start from nothing."""

    alphabet: str

    def demonstration(self, prompt: str, seed: int, position: int) -> str:
        """Return an answer to imitate: right, or wrong with a probability that grows with the difficulty."""
        ...


TASKS: Final[Mapping[str, Callable[[], Demonstrated]]] = MappingProxyType(
    {"arithmetic": Arithmetic, "running_sums": RunningSums}
)


def make_task(name: str) -> Demonstrated:
    """Return the task called `name`.

    Args:
        name: one of `TASKS`.

    Returns:
        The task.

    Raises:
        InputError: no task has that name.
    """
    if name not in TASKS:
        raise InputError(f"task is {name!r}; allowed: {', '.join(TASKS)}")
    return TASKS[name]()
