"""`group_advantage` as verl's advantage estimators: ragged groups by uid, whatever their order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.integrations.reward_range import widened
from v05.integrations.verl.settings import OTHERS, Settings, load_prior
from v05.kernels import group_advantage, shrinkage
from v05.kernels.advantage.estimators import resolve


class GroupsByUid(NamedTuple):
    """Rows of a batch put together by uid; groups without a token, verl's padding, are left out."""

    order: Tensor  # [N] int64: rows, group after group
    offsets: Tensor  # [G + 1] int64
    uids: list[str]  # [G]


def groups_by_uid(index: np.ndarray, response_mask: Tensor) -> GroupsByUid:
    """Sort rows into groups.

    Args:
        index: [B] uids.
        response_mask: [B, L].

    Returns:
        The groups that have a token, in the order of their uids; rows keep theirs within a group.
    """
    names, of_row = np.unique(np.asarray(index), return_inverse=True)
    some = (response_mask != 0).any(1).cpu().numpy()
    speaks = np.bincount(of_row, weights=some, minlength=len(names)) > 0
    rows = np.flatnonzero(speaks[of_row])
    rows = rows[np.argsort(of_row[rows], kind="stable")]
    counts = np.bincount(of_row[rows], minlength=len(names))[speaks]
    device = response_mask.device
    uids = [str(name) for name in names[speaks]]
    return GroupsByUid(torch.from_numpy(rows).to(device), offsets_of(torch.from_numpy(counts)).to(device), uids)


def mean_of_other_groups(rewards: Tensor, offsets: Tensor, reward_range: tuple[float, float]) -> Tensor:
    """Return, for each group, the mean reward of all other rollouts of the batch: a prior that has not seen the group.

    Args:
        rewards: [N] floating.
        offsets: [G + 1] int64.
        reward_range: its middle stands where there is no other group.

    Returns:
        [G], of rewards' dtype.
    """
    counts = offsets.diff()
    group = torch.repeat_interleave(torch.arange(len(counts), device=rewards.device), counts)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=rewards.device).index_add_(0, group, rewards.double())
    others = (len(rewards) - counts).double()
    middle = torch.full_like(sums, sum(reward_range) / 2)
    mean = torch.where(others > 0, (sums.sum() - sums) / others.clamp(min=1), middle)
    return mean.clamp(*reward_range).to(rewards.dtype)


class Advantage:
    """One estimator of `group_advantage`, called as verl calls its own."""

    def __init__(self, estimator: str) -> None:
        """Take the estimator's name in `group_advantage`.

        Raises:
            ValueError: an unknown name.
        """
        resolved = resolve(estimator, "none")
        self.estimator, self.needs_prior, self.calibrated = (
            estimator,
            resolved.needs_prior,
            resolved.fusion == "calibrated",
        )
        self.priors: dict[str, Any] = {}  # by full name, made at first use

    def __call__(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: np.ndarray | None = None,
        reward_baselines: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the advantage of every token.

        Args:
            token_level_rewards: [B, L] floating; a rollout's reward is their sum.
            response_mask: [B, L]; a group without a token counts for nothing.
            config: verl's `algorithm` section; see `Settings`. `norm_adv_by_std_in_grpo` off makes grpo dr_grpo.
            index: [B] uids; rows with one uid are a group, of any size.
            reward_baselines: [B] expected rewards where the batch has such a column: they are the prior of fused
                estimators, equal within a group.

        Returns:
            Advantages and returns, [B, L] each and the same: 0 where masked.

        Raises:
            ValueError: uids are missing, rewards lie outside the range, or a setting is not allowed.
        """
        if index is None:
            raise ValueError(f"the batch has no uid; estimator v05 ({self.estimator}) needs one per row")
        settings = Settings.of(config)
        by_std = config is None or config.get("norm_adv_by_std_in_grpo", True)
        estimator = "dr_grpo" if self.estimator == "grpo" and not by_std else self.estimator
        groups = groups_by_uid(index, response_mask)
        rewards = token_level_rewards.sum(-1)[groups.order]
        ends = _reward_range(rewards, settings, self.needs_prior)
        prior = self._prior(rewards, groups, settings, reward_baselines) if self.needs_prior else None
        state = None if prior is None else self._state(rewards, groups, prior, settings)
        values = group_advantage(
            rewards,
            groups.offsets,
            estimator=estimator,
            prior=prior,
            scale=settings.scale,
            lengths=(response_mask != 0).sum(-1)[groups.order],
            reward_range=ends,
            state=state,
        )
        advantages = token_level_rewards.new_zeros(len(response_mask))
        advantages[groups.order] = values.to(advantages.dtype)
        spread = advantages[:, None] * response_mask
        return spread, spread

    def _prior(self, rewards: Tensor, groups: GroupsByUid, settings: Settings, column: Tensor | None) -> Tensor:
        """Return the prior [G]: the batch's own column, else what the settings name."""
        if column is not None:
            column = column.to(rewards.dtype)[groups.order]
            first = column[groups.offsets[:-1]]
            if not torch.equal(first.repeat_interleave(groups.offsets.diff()), column):
                raise ValueError("reward_baselines differ within a group; allowed: one value per uid")
            return first
        if settings.prior == OTHERS:
            return mean_of_other_groups(rewards, groups.offsets, settings.reward_range)
        if settings.prior not in self.priors:
            self.priors[settings.prior] = load_prior(settings.prior)
        predicted = self.priors[settings.prior].predict(groups.uids)
        return torch.as_tensor(predicted, dtype=rewards.dtype, device=rewards.device).detach()

    def _state(self, rewards: Tensor, groups: GroupsByUid, prior: Tensor, settings: Settings) -> Tensor | None:
        """Return the state of calibrated fusion that this estimator goes on from, and let the prior keep the next one.

        The look-ahead may need the state beside another estimator too.
        """
        keeper = self.priors.get(settings.prior)
        if (
            not hasattr(keeper, "mixture")
            or not len(rewards)
            or not (self.calibrated or settings.fusion == "calibrated")
        ):
            return None
        assert keeper is not None
        state = keeper.mixture()
        state = None if state is None else state.to(rewards.device)
        options = dict(reward_range=settings.reward_range, fusion="calibrated", state=state)
        after = shrinkage(rewards, groups.offsets, prior, **options).state  # type: ignore[arg-type]
        assert after is not None
        keeper.learn(after.cpu())
        return state if self.calibrated else None


def _reward_range(rewards: Tensor, settings: Settings, fused: bool) -> tuple[float, float]:
    """Return the range to compute with; estimators without a prior take any rewards."""
    smallest, largest = widened(settings.reward_range, rewards)
    if not fused:
        return smallest, largest
    low, high = settings.reward_range
    if smallest < low or largest > high:
        smallest, largest = (float(end) for end in rewards.aminmax())
        raise ValueError(
            f"rewards lie between {smallest:g} and {largest:g}, and algorithm.v05.reward_range is [{low:g}, {high:g}]; "
            "set it to the smallest and largest reward a rollout can have (a KL penalty belongs into the loss: "
            "actor.use_kl_loss)"
        )
    return low, high
