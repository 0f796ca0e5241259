"""What the training loop asks of engine, prior, test and estimator, and of the engine for held-out answers."""

from typing import Any

import pytest
import torch
from first_digit import make_trainer

from v05.kernels import shrinkage
from v05.rollout.engine import Rollout, Unanswered
from v05.rollout.hf import TransformersEngine
from v05.training import algorithms
from v05.training import trainer as training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("algorithm", "cost", "sizes"), [("v05_from_one", 1 / 64, (1, 16)), ("v05_calibrated_loo:2-8@1e-5", 1 / 99, (2, 8))]
)
def test_an_update_passes_on_what_was_asked_for_and_learnt(
    algorithm: str, cost: float, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(algorithm=algorithm, cost=1 / 99, seed=5, rollouts=640)
    calls: dict[str, list[dict[str, Any]]] = {}

    def watch(place: Any, name: str) -> None:
        original = getattr(place, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            calls.setdefault(name, []).append({"given": arguments, **options})
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, watched)

    for place, name in ((training, "shrinkage"), (algorithms, "group_advantage")):
        watch(place, name)
    for place, name in ((trainer.engine, "generate"), (trainer.prior, "observe"), (trainer, "_conflicts")):
        watch(place, name)
    assert trainer.learner.learning_rate == (1e-5 if "@" in algorithm else trainer.config.learning_rate)
    seeds = []
    for _ in range(4):
        calls.clear()
        mixture, expected_extra = trainer.mixture, trainer.counters.expected_extra
        line = trainer.update()
        asked = dict(reward_range=(0.0, 1.0), cost=cost, k_init=sizes[0], k_max=sizes[1], fusion="calibrated")
        for options in calls["shrinkage"]:
            assert {**asked, "given": options["given"], "state": mixture} == options
        assert [(each["state"], each["reward_range"]) for each in calls["group_advantage"]] == [(mixture, (0.0, 1.0))]
        seeds += [each["seed"] for each in calls["generate"]]
        groups = calls["_conflicts"][0]["given"][0].groups
        prompts, means, counts = calls["observe"][0]["given"]
        assert prompts == groups.prompts
        assert torch.equal(means, groups.means)
        assert torch.equal(counts, groups.counts)
        last = calls["shrinkage"][-1]
        test = shrinkage(*last.pop("given"), **last)
        extra = float((torch.maximum(test.planned, test.count) - sizes[0]).clamp(min=0).float().mean())
        assert trainer.counters.expected_extra == pytest.approx(0.9 * expected_extra + 0.1 * extra)
        assert line["prior_squared_error"] >= 0
    assert len(set(seeds)) == len(seeds) > 4
    assert trainer.mixture is not None
    assert make_trainer(algorithm="grpo:4").update()["prior_squared_error"] is None


def test_held_out_answers_are_asked_for_alike_in_every_run() -> None:
    asked = []
    for seed in (0, 1):
        trainer, calls = make_trainer(seed=seed, temperature=0.7, heldout_prompts=300, heldout_seed=9), list[Any]()

        def generate(prompts, counts, calls=calls, **limits):  # type: ignore[no-untyped-def]
            calls.append((prompts, counts, limits))
            return [[Rollout((0,), (1,), (-1.0,), "0", True)] * count for count in counts]

        trainer.engine.generate = generate  # type: ignore[method-assign]
        prompts = trainer.task.prompts(9, 0, 300, "heldout")
        right, total, _ = trainer.evaluate()
        assert (right, total) == (2 * sum(prompt[0] == "0" for prompt in prompts), 600)
        trainer.grader.verify = lambda prompt, text: 0.5  # type: ignore[attr-defined]
        assert trainer.evaluate().right == 0  # of the largest reward there are none
        asked.append(calls)
    assert asked[0] == asked[1]
    (first, second), again = asked[0][:2], asked[0][2:]
    assert again == [first, second]
    assert (first[0] + second[0], first[1] + second[1]) == (prompts, [2] * 300)
    assert first[2].pop("seed") != second[2].pop("seed")
    assert first[2] == second[2] == dict(temperature=1.0, max_new_tokens=3)


def test_held_out_answers_that_never_came_are_wrong(caplog: pytest.LogCaptureFixture) -> None:
    class Refuses(TransformersEngine):
        def generate(self, prompts, counts, **limits):  # type: ignore[no-untyped-def]
            rows = super().generate(prompts, counts, **limits)
            solved = [
                any(each.finished and each.text[:1] == prompts[group][0] for each in row)
                for group, row in enumerate(rows)
            ]
            right = solved.index(True)
            raise Unanswered(
                [[None if group == right else each for each in row] for group, row in enumerate(rows)], ["x"]
            )

    trainer = make_trainer()
    right, total, _ = trainer.evaluate()
    trainer.engine = trainer.team.engine = Refuses(trainer.policy)
    fewer, again, _ = trainer.evaluate()
    assert again == total
    assert right - 2 <= fewer < right
    assert "x; it counts as wrong" in caplog.messages
