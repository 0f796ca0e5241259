"""How far a run is."""

from dataclasses import dataclass


@dataclass
class Counters:
    """How far a run is; everything adds up over updates.

    Attributes:
        update: updates done.
        rollouts: rollouts spent, dropped ones included.
        position: prompts taken from the task's stream.
        groups: groups learnt from.
        kept: rollouts learnt from.
        conflicts: groups whose first rollouts contradicted their prior.
        dropped: rollouts dropped because their group's rewards were all equal.
        expected_extra: decayed mean of the rollouts that a prompt wants beyond its first ones; 0 where groups do not
            grow.
    """

    update: int = 0
    rollouts: int = 0
    position: int = 0
    groups: int = 0
    kept: int = 0
    conflicts: int = 0
    dropped: int = 0
    expected_extra: float = 2.0
