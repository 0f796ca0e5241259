"""An engine and a scorer for verl's agent loops, as Ray actors: "p<i>" is answered rightly in i of ten cases."""

import random

import ray

RIGHT, WRONG, END = 3, 2, 1  # tokens "1" and "0" of `tiny_models`, and its end


@ray.remote(num_cpus=0)
class Engine:
    """Answers one prompt at a time; the same requests get the same answers, in whatever order they come."""

    def __init__(self):
        self.counts: dict[tuple[int, ...], int] = {}

    def answer(self, prompt_ids):
        """Two to five tokens, the first of which is right or wrong."""
        number = self.counts[tuple(prompt_ids)] = self.counts.get(tuple(prompt_ids), 0) + 1
        draw = random.Random(f"{list(prompt_ids)} {number}")
        tenths = prompt_ids[-1] - WRONG  # the last letter of the prompt is its number of tenths
        first = RIGHT if draw.random() < tenths / 10 else WRONG
        return [first, *[WRONG] * draw.randrange(4), END]


@ray.remote(num_cpus=0)
class Scorer:
    """verl's reward loop worker: 1 for a right answer, -1 otherwise."""

    async def compute_score(self, data):
        """The score of the last row."""
        right = int(data.batch["responses"][-1][0]) == RIGHT
        return {"reward_score": 1.0 if right else -1.0, "reward_extra_info": {"acc": right}}


class Client:
    """verl's client of its rollout servers, over two simulated engines that share the prompts out."""

    def __init__(self, engines):
        self.engines = engines

    async def generate(self, *, prompt_ids, **_):
        """One answer, with its log-probs."""
        from verl.workers.rollout.replica import TokenOutput  # not at the top: the engines' processes need no verl

        tokens = await self.engines[sum(prompt_ids) % len(self.engines)].answer.remote(list(prompt_ids))
        return TokenOutput(token_ids=tokens, log_probs=[-0.7] * len(tokens), stop_reason="completed")
