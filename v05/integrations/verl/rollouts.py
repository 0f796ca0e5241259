"""Priors that know prompts, and V0.5's look-ahead, in verl's rollout loop: prompts do not wait for each other.

`+actor_rollout_ref.rollout.agent.agent_loop_manager_class=v05.integrations.verl.rollouts.LookAheadManager`, or
`PriorManager` for groups of fixed size. A subclass needs its base when it is defined, so that this module, unlike the
rest of the package, imports verl and Ray at its top.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import transfer_queue
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, AgentLoopWorkerTQ

from v05.integrations.verl.checkpoints import load_memory
from v05.integrations.verl.look_ahead import grow
from v05.integrations.verl.memory import start_memory
from v05.integrations.verl.settings import OTHERS, Settings

log = logging.getLogger(__name__)
Worker = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__  # verl decorates it; Ray keeps the class


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what identifies a prompt to the prior: the text of its messages."""
    return "\n".join(str(message["content"]) for message in messages)


class LookAheadWorker(Worker):  # type: ignore[misc, valid-type]
    """verl's agent loop worker, but that a training prompt gets as many rollouts as it deserves, not `rollout.n`."""

    def __init__(self, *args: Any) -> None:
        """Take what verl's worker takes.

        Raises:
            ValueError: rewards do not come with the rollouts, because verl scores them on the trainer's GPUs.
        """
        super().__init__(*args)
        if self.reward_loop_worker_handles is None:
            raise ValueError(
                "look-ahead and memory need rewards with the rollouts; a colocated reward model gives them later"
            )
        self.settings = Settings.of(self.config.algorithm)
        self.memory = start_memory(self.settings)
        self.scores: dict[tuple[str, int], float] = {}  # of prompts under way, by uid and session

    async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
        await super()._compute_score(outputs, kwargs=kwargs)
        self.scores[kwargs["uid"], kwargs["session_id"]] = float(outputs[-1].reward_score)

    async def _run_prompt(
        self, prompt: dict[str, Any], sampling_params: dict[str, Any], trajectory: dict[str, Any], trace: bool = False
    ) -> None:
        """Roll one prompt out and tell verl's queue when all its rollouts are in it."""
        uid = prompt["uid"]
        if trajectory["validate"]:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            self._forget(uid)
            return
        await transfer_queue.async_kv_put(key=uid, partition_id="train", tag={"status": "running"})
        try:
            await self._grow(uid, prompt, sampling_params, trajectory, trace)
            status = "finished"
        except Exception:
            log.exception("prompt %s failed", uid)
            status = "failure"
        self._forget(uid)
        await transfer_queue.async_kv_put(key=uid, partition_id="train", tag={"status": status})

    def _forget(self, uid: str) -> None:
        self.scores = {key: score for key, score in self.scores.items() if key[0] != uid}

    async def _grow(
        self, uid: str, prompt: dict[str, Any], sampling: dict[str, Any], trajectory: dict[str, Any], trace: bool
    ) -> None:
        given = {name: value for name, value in prompt.items() if name not in ("__rollout_n__", "__do_sample__")}
        text = prompt_text(given["raw_prompt"])
        prior, mixture = await self.memory.start.remote(uid, text)

        async def roll_out(sessions: range) -> list[float]:
            tasks = [
                self._run_agent_loop(dict(sampling), trajectory=trajectory, trace=trace, session_id=session, **given)
                for session in sessions
            ]
            results = await asyncio.gather(*tasks, return_exceptions=True)  # siblings must not write after a failure
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            return [self.scores[uid, session] for session in sessions]

        rewards = await grow(roll_out, prior, self.settings, mixture)
        await self.memory.finish.remote(text, rewards)
        log.debug("prompt %s: prior %.3f, %d rollouts", uid, prior, len(rewards))


class PriorWorker(LookAheadWorker):
    """The same for groups of `rollout.n`, of which it only tells the memory."""

    def __init__(self, *args: Any) -> None:
        """Take what verl's worker takes."""
        super().__init__(*args)
        n = self.config.actor_rollout_ref.rollout.n
        self.settings = dataclasses.replace(self.settings, k_init=n, k_max=n)


class LookAheadManager(AgentLoopManagerTQ):
    """verl's agent loop manager with workers that look ahead, and one memory of priors beside them."""

    worker: type[LookAheadWorker] = LookAheadWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what verl's manager takes; the memory goes on from the checkpoint that verl resumes from.

        Raises:
            ValueError: a setting in `algorithm.v05` that is not allowed, or a name there that leads nowhere.
        """
        super().__init__(*args, **kwargs)
        settings = Settings.of(self.config.algorithm)
        settings.find_names()
        if settings.prior == OTHERS:
            log.warning("algorithm.v05.prior is %r: advantages do not use what the memory expects", OTHERS)
        self.memory = start_memory(settings)  # ends with this handle
        load_memory(self.memory, self.config.trainer)
        self.agent_loop_workers_class = ray.remote(self.worker)


class PriorManager(LookAheadManager):
    """The same with groups of `rollout.n`: a prior that knows prompts, and no look-ahead."""

    worker = PriorWorker
