"""The embedded tasks: exact rewards, reproducible streams, and held-out prompts that are never trained on."""

import pytest

from v05.tasks import TASKS, Task, make_task
from v05.tasks.arithmetic import Arithmetic
from v05.tasks.running_sums import RunningSums


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return make_task(request.param)


def test_rewards_are_exact() -> None:
    task = Arithmetic()
    assert task.answer("47+8+12=") == "76"
    assert task.verify("47+8+12=", "76") == 1.0
    for wrong in ("67", "760", "", "76="):
        assert task.verify("47+8+12=", wrong) == 0.0


def test_train_and_heldout_prompts_are_disjoint(task: Task) -> None:
    train = {prompt for seed in range(4) for prompt in task.prompts(seed, 0, 5000)}
    heldout = {prompt for seed in range(4) for prompt in task.prompts(seed, 0, 1000, "heldout")}
    assert not train & heldout
    assert len(heldout) > 2000


def test_the_stream_depends_on_seed_and_position_only(task: Task) -> None:
    assert task.prompts(3, 10, 5) == task.prompts(3, 0, 20)[10:15]
    assert task.prompts(3, 0, 20) != task.prompts(4, 0, 20)


def test_prompts_are_sums_of_two_to_four_numbers() -> None:
    task = Arithmetic()
    prompts = task.prompts(0, 0, 500)
    assert {len(task.operands(prompt)) for prompt in prompts} == {2, 3, 4}
    assert all(set(prompt) <= set(task.alphabet) for prompt in prompts)
    assert all(len(task.answer(prompt)) < task.max_answer_length for prompt in prompts)


def test_errors_in_demonstrations_grow_with_difficulty() -> None:
    task = Arithmetic()
    for prompt, expected in (("1+2=", 0.30), ("10+20+30+40=", 0.75)):
        answers = [task.demonstration(prompt, 0, position) for position in range(2000)]
        wrong = sum(answer != task.answer(prompt) for answer in answers) / 2000
        assert abs(wrong - expected) < 0.05
        assert {len(answer) for answer in answers} == {len(task.answer(prompt))}


def test_running_sums_are_judged_by_their_last_number() -> None:
    task = RunningSums()
    for right in ("55+76", "76", "1+76"):
        assert task.verify("47+8+12=", right) == 1.0
    for wrong in ("55+67", "55+76+", "", "+"):
        assert task.verify("47+8+12=", wrong) == 0.0


def test_running_sums_are_nearly_always_or_nearly_never_right() -> None:
    task = RunningSums()
    prompts = task.prompts(0, 0, 1000)
    assert {len(task.operands(prompt)) for prompt in prompts} == {2, 3, 4, 5, 6}
    shares = [task.share_right(prompt) for prompt in prompts]
    assert all(0 < share < 1 for share in shares)
    assert sum(share > 0.9 for share in shares) > 250
    assert sum(share < 0.1 for share in shares) > 250
    for prompt, expected in (("1+2=", 0.995), ("10+20+5=", 0.816), ("10+20+30=", 0.38), ("11+12+13+14+15=", 0.005)):
        answers = [task.demonstration(prompt, 0, position) for position in range(2000)]
        right = sum(task.verify(prompt, answer) for answer in answers) / 2000
        assert abs(task.share_right(prompt) - expected) < 0.01
        assert abs(right - expected) < 0.04


def test_right_answers_fit(task: Task) -> None:
    for position, prompt in enumerate(task.prompts(0, 0, 2000)):
        answer = task.demonstration(prompt, 0, position)
        assert set(prompt + answer) <= set(task.alphabet)
        if task.verify(prompt, answer) == task.reward_range[1]:
            assert len(answer) < task.max_answer_length


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: arithmetic, running_sums"):
        make_task("chess")
    with pytest.raises(ValueError, match="allowed: train, heldout"):
        Arithmetic().prompts(0, 0, 1, "test")  # type: ignore[arg-type]
