"""What the main process knows, a prior and how far it can be trusted, and what it makes of ragged groups of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.integrations.prior_state import prior_tensors, restore_prior
from v05.integrations.reward_range import widened
from v05.integrations.trl.config import V05Config
from v05.integrations.trl.prompts import Predictor, expected_rewards, within
from v05.kernels import group_advantage, shrinkage
from v05.kernels.shrinkage.op import Shrinkage
from v05.rollout.share import share_out

EPSILON: Final = 1e-4  # added to a std, as in TRL


class Rewards(NamedTuple):
    """Rewards of N completions of G prompts in any order.

    `values` `[N]` float32, NaN where no reward function had one; `group` `[N]` int64, the prompt of each; `groups`, G.
    """

    values: Tensor
    group: Tensor
    groups: int

    def ragged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rewards `[n]` that there are, group after group, their offsets `[G+1]`, and the place of each."""
        order = torch.argsort(self.group, stable=True)
        order = order[~self.values[order].isnan()]
        lengths = torch.bincount(self.group[order], minlength=self.groups)
        return self.values[order], offsets_of(lengths), order

    def checked(self, reward_range: tuple[float, float]) -> Rewards:
        """Return the same inside `reward_range`, or raise ValueError."""
        advice = "set reward_range in V05Config to what the weighted reward functions can add up to"
        return self._replace(values=within("rewards", self.values, *reward_range, advice))


class Estimation:
    """Prior and calibration with their states; used on the main process alone, which tells the others."""

    def __init__(self, args: V05Config, prior: Predictor) -> None:
        """Start with a prior and without calibration."""
        self.args, self.prior = args, prior
        self.mixture: Tensor | None = None  # of calibrated fusion: what the batches so far say of the prior

    def predict(self, texts: Sequence[str]) -> Tensor:
        """Return the expected reward of each prompt, [G] float32; the middle of the range without a fused estimator."""
        if not self.args.fused:
            return torch.full((len(texts),), sum(self.args.bounds) / 2)
        return expected_rewards(self.prior, texts, self.args.bounds, self.args.prior_gives)

    def test(self, rewards: Rewards, prior: Tensor) -> Shrinkage:
        """Return what the shrinkage test says of every group."""
        values, offsets, _ = rewards.ragged()
        first = int(self.args.num_generations or 1)
        return shrinkage(
            values,
            offsets,
            prior,
            reward_range=self.args.bounds,
            cost=self.args.cost,
            k_init=first,
            k_max=max(first, self.args.k_max),
            fusion=self.args.fusion,
            state=self.mixture,
        )

    def plan(self, rewards: Rewards, prior: Tensor, budget: int, processes: int) -> Tensor:
        """Return how many more rollouts each prompt gets now.

        Args:
            rewards: of the rollouts so far.
            prior: expected rewards [G].
            budget: rollouts there are, over all processes.
            processes: that share them; the plan is a multiple of it, filled up where one more rollout gains most.

        Returns:
            [G] int64, at most `budget` in all.
        """
        test = self.test(rewards, prior)
        room = (self.args.k_max - torch.bincount(rewards.group, minlength=rewards.groups)).clamp(min=0)
        asking = test.roll_out_more & (test.count > 0)
        wanted = torch.where(asking, (test.planned - test.count).minimum(room), 0)
        gains = test.gain.tolist()
        given = torch.tensor(share_out(wanted.tolist(), gains, budget - budget % processes))
        missing = -int(given.sum()) % processes
        useful = torch.where(test.gain > 0, room, 0).cpu().maximum(given) - given
        filled = given + torch.tensor(share_out(useful.tolist(), gains, missing))
        if int(filled.sum()) % processes:  # no prompt has use for another: fewer than planned
            total = int(given.sum())
            filled = torch.tensor(share_out(given.tolist(), gains, total - total % processes))
        return filled

    def advantages(self, rewards: Rewards, prior: Tensor, lengths: Tensor) -> Tensor:
        """Return the advantage of every completion, [N] float32; 0 where it has no reward.

        Args:
            rewards: of N completions of G prompts.
            prior: expected rewards [G].
            lengths: tokens that are learnt from of each completion, [N] int64.
        """
        values, offsets, order = rewards.ragged()
        args, found = self.args, torch.zeros_like(rewards.values)
        found[order] = group_advantage(
            values,
            offsets,
            estimator=args.estimator,
            prior=prior if args.fused else None,
            scale=args.advantage_scale,
            eps=EPSILON,
            lengths=lengths[order],
            state=self.mixture,
            reward_range=args.bounds if args.fused else widened(args.bounds, values),
        )
        return found

    def observe(self, texts: Sequence[str], rewards: Rewards, test: Shrinkage) -> None:
        """Learn from a batch that was advantaged: calibration goes on, and the prior sees the outcomes if it wants."""
        if test.state is not None:
            self.mixture = test.state
        observe = getattr(self.prior, "observe", None)
        if observe is not None:
            observe(texts, test.mean.cpu().float(), test.count.cpu())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the prior, where it has one, and of the calibration."""
        state = {} if self.mixture is None else {"mixture": self.mixture.cpu().clone()}
        return state | prior_tensors(self.prior)

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a state that `state_dict` returned; one of another prior is left alone, with a warning."""
        same = restore_prior(self.prior, state)
        kept = same and self.args.fusion == "calibrated" and "mixture" in state
        self.mixture = state["mixture"].to(device) if kept else None
