"""Arithmetic: exact rewards, a reproducible stream, and held-out prompts that are never trained on."""

import pytest

from v05.tasks import make_task
from v05.tasks.arithmetic import Arithmetic


def test_rewards_are_exact() -> None:
    task = Arithmetic()
    assert task.answer("47+8+12=") == "76"
    assert task.verify("47+8+12=", "76") == 1.0
    for wrong in ("67", "760", "", "76="):
        assert task.verify("47+8+12=", wrong) == 0.0


def test_train_and_heldout_prompts_are_disjoint() -> None:
    task = Arithmetic()
    train = {prompt for seed in range(4) for prompt in task.prompts(seed, 0, 5000)}
    heldout = {prompt for seed in range(4) for prompt in task.prompts(seed, 0, 1000, "heldout")}
    assert not train & heldout
    assert len(heldout) > 2000


def test_the_stream_depends_on_seed_and_position_only() -> None:
    task = Arithmetic()
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


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: arithmetic"):
        make_task("chess")
    with pytest.raises(ValueError, match="allowed: train, heldout"):
        Arithmetic().prompts(0, 0, 1, "test")  # type: ignore[arg-type]
