"""A step while its groups are being filled, and what its rollouts met on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from v05.batch import Groups
from v05.rollout.engine import Rollout


@dataclass
class Group:
    """One prompt of a step.

    Attributes:
        position: of the prompt in the stream of prompts.
        prompt: its text.
        prior: expected reward.
        requested: rollouts asked for so far, finished or not, given up ones included.
        lost: places of rollouts that were asked for and never came, with the reason.
        rollouts: finished ones, in the order in which they were asked for.
        rewards: theirs.
        prompt_ids: token ids of the prompt, once an answer has brought them.
        tested: whether its first rollouts have been in.
        done: whether the group wants no more.
    """

    position: int
    prompt: str
    prior: float
    requested: int = 0
    lost: dict[int, str] = field(default_factory=dict)
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    rewards: dict[int, float] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = ()
    tested: bool = False
    done: bool = False

    @property
    def given_up(self) -> int:
        """Return how many rollouts were asked for and never came."""
        return len(self.lost)

    @property
    def waiting(self) -> int:
        """Return how many rollouts are asked for and neither rewarded nor given up."""
        return self.requested - len(self.lost) - len(self.rewards)

    @property
    def missing(self) -> list[int]:
        """Return the places of rollouts that are asked for and neither rewarded nor given up."""
        return [place for place in range(self.requested) if place not in self.rewards and place not in self.lost]

    @property
    def in_order(self) -> list[int]:
        """Return the places of finished rollouts, in the order of asking, whatever order they finished in."""
        return sorted(self.rewards)

    def state(self) -> dict[str, Any]:
        """Return everything but tokens as JSON can hold it."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "prompt_ids"}
        rollouts = {place: [rollout.text, rollout.finished] for place, rollout in self.rollouts.items()}
        return own | {"lost": dict(self.lost), "rollouts": rollouts, "rewards": dict(self.rewards)}


class Wish(NamedTuple):
    """What a group wants: `more` rollouts, 0 to stop, the next of which is worth `gain`."""

    group: Group
    more: int
    gain: float


@dataclass
class Step:
    """The groups of one update.

    Attributes:
        number: of the step, from 0.
        groups: in the order of the stream.
        budget: rollouts that it may have, first ones included; None for no cap.
        extra: rollouts given beyond the first ones.
    """

    number: int
    groups: list[Group]
    budget: int | None = None
    extra: int = 0

    @property
    def done(self) -> bool:
        """Return whether every group wants no more and waits for none."""
        return all(group.done for group in self.groups)

    @property
    def rollouts(self) -> list[list[Rollout]]:
        """Return the finished rollouts of every group."""
        return [[group.rollouts[place] for place in group.in_order] for group in self.groups]

    @property
    def tokens(self) -> int:
        """Return the tokens of finished rollouts."""
        return sum(len(rollout.token_ids) for group in self.groups for rollout in group.rollouts.values())

    @property
    def lost(self) -> list[str]:
        """Return, for every rollout that never came, its prompt and why."""
        return [f"{group.prompt!r}: {reason}" for group in self.groups for reason in group.lost.values()]

    @property
    def outcome(self) -> Groups:
        """Return the rewards of all groups."""
        rewards = [[group.rewards[place] for place in group.in_order] for group in self.groups]
        return Groups.from_lists(
            [group.prompt for group in self.groups], [group.position for group in self.groups], rewards
        )

    @property
    def prior(self) -> Tensor:
        """Return the expected rewards, [G] float32."""
        return torch.tensor([group.prior for group in self.groups], dtype=torch.float32)

    @property
    def left(self) -> int | None:
        """Return how many more rollouts the step may have; None for no cap."""
        if self.budget is None:
            return None
        return self.budget - sum(group.requested - group.given_up for group in self.groups)

    def staleness(self, version: int) -> list[int]:
        """Return, for every rollout whose engine counts versions, how many its oldest token is behind `version`."""
        return [version - min(r.versions) for group in self.groups for r in group.rollouts.values() if r.versions]

    def state(self) -> dict[str, Any]:
        """Return everything but tokens, which `v05.rollout.saved` keeps, as JSON can hold it."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return own | {"groups": [group.state() for group in self.groups]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Step:
        """Return the step of a `state`; what was asked for and had not come is to be asked for again."""
        groups = []
        for entry in state["groups"]:
            rollouts = {int(place): Rollout((), (), (), *rest) for place, rest in entry["rollouts"].items()}
            rewards = {int(place): value for place, value in entry["rewards"].items()}
            lost = {int(place): reason for place, reason in entry["lost"].items()}
            groups.append(Group(**{**entry, "lost": lost, "rollouts": rollouts, "rewards": rewards}))
        return cls(**{**state, "groups": groups})


@dataclass
class Trouble:
    """How often something went wrong; each is mended and counted once.

    Attributes:
        failed: requests that the engine answered with an error.
        timed_out: requests that took longer than allowed and were taken back.
        garbage: answers that cannot be right: lengths that differ, log-probs above 0 or nan, another prompt.
        bad_rewards: answers whose reward is no number in the range.
        duplicates: second answers to a request.
        late: answers to requests that had been taken back.
        unknown: answers to no request that was ever made.
        restarts: of an engine that died.
        resubmitted: requests asked again, for any of these reasons.
        given_up: rollouts that never came although asked for again.
    """

    failed: int = 0
    timed_out: int = 0
    garbage: int = 0
    bad_rewards: int = 0
    duplicates: int = 0
    late: int = 0
    unknown: int = 0
    restarts: int = 0
    resubmitted: int = 0
    given_up: int = 0

    def counts(self) -> dict[str, int]:
        """Return the counts by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
