"""The examples run offline on tiny models, and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny_models import LETTERS, make_tokenizer, write_qwen3

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    """The names that an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", ["padded_batch", "packed_batch"])
def test_it_runs_as_a_script(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_plain_loop_earns_more_reward(tmp_path):
    lines = (EXAMPLES / "plain_loop.py").read_text(encoding="utf-8").count("\n")
    assert f"plain_loop.py) is {lines} lines" in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    torch.manual_seed(0)
    curve = load("plain_loop")["train"](str(write_qwen3(tmp_path)), steps=16, lr=3e-3, length=4)
    first, last = sum(curve[:4]) / 4, sum(curve[-4:]) / 4
    assert last > first + 0.1, curve


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_plain_loop_trains_on_a_gpu(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    assert len(load("plain_loop")["train"](str(write_qwen3(tmp_path)), steps=2, length=2)) == 2
    assert torch.cuda.max_memory_allocated() > 0


def test_the_plain_loop_takes_tokenizers_without_a_pad_token(tmp_path):
    make_tokenizer(["<pad>", "<eos>", *LETTERS], pad_token=None).save_pretrained(write_qwen3(tmp_path))
    assert len(load("plain_loop")["train"](str(tmp_path), steps=1, length=2)) == 1


def test_the_plain_loop_without_a_model_says_how_it_is_called(monkeypatch):
    monkeypatch.setattr("sys.argv", ["plain_loop.py"])
    with pytest.raises(SystemExit, match=r"usage: python examples/plain_loop.py MODEL"):
        runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")


def test_the_plain_loop_takes_small_steps_of_a_bfloat16_model(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(write_qwen3(tmp_path), dtype=torch.bfloat16).save_pretrained(tmp_path)
    dtypes = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: dtypes.append(self.param_groups[0]["params"][0].dtype))
    load("plain_loop")["train"](str(tmp_path), steps=1, length=2)
    assert dtypes == [torch.float32]


def test_the_plain_loop_samples_what_its_loss_computes_whatever_the_models_own_settings(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, length = write_qwen3(tmp_path), 40
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    own = model.generation_config
    own.temperature, own.repetition_penalty, own.eos_token_id, own.pad_token_id = 1e-3, 1.5, [1, 7], 0
    torch.manual_seed(0)
    answers = [
        ids[start:].tolist() for ids, start in load("plain_loop")["roll_out"](model, tokenizer, ["1+1="] * 8, length)
    ]
    assert len({tuple(answer[:4]) for answer in answers}) == 8, "temperature is 1"
    assert all(len(answer) == length or answer[-1] == 1 for answer in answers)
    after = [token for answer in answers if 7 in answer for token in answer[answer.index(7) + 1 :]]
    assert any(after), "what fills up a batch is no answer"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_gspo_by_hand(side):
    torch.manual_seed(1)
    lengths, sizes, prior = torch.tensor([3, 1, 5, 2, 4]), torch.tensor([2, 3]), torch.tensor([0.5, -0.2]).double()
    mask = torch.arange(5) < lengths[:, None]
    mask = mask.flip(1) if side == "left" else mask
    old = torch.where(mask, -torch.rand(5, 5, dtype=torch.float64), torch.nan)
    logprobs = (old + 2e-4 * torch.randn(5, 5, dtype=torch.float64)).requires_grad_()
    rewards = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss, _ = load("padded_batch")["padded_loss"](logprobs, old, mask, rewards, sizes, prior)

    expected, start = torch.zeros((), dtype=torch.float64), 0
    for group, size in enumerate(sizes.tolist()):
        for row in range(start, start + size):
            others = [float(rewards[other]) for other in range(start, start + size) if other != row]
            mean, noise = sum(others) / len(others), 1 / len(others)
            deviation = max(0.0, (mean - float(prior[group])) ** 2 - noise)
            weight = deviation / (deviation + noise)
            advantage = rewards[row] - (weight * mean + (1 - weight) * prior[group])
            ratio = (logprobs[row][mask[row]] - old[row][mask[row]]).mean().exp()
            expected = expected - torch.minimum(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage) / 5
        start += size
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    ours, theirs = (torch.autograd.grad(value, logprobs)[0] for value in (loss, expected))
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-9)
    assert not ours[~mask].any()


def test_packed_batch_is_dapo_by_hand():
    """One sample after the other in plain torch, each with its own shift."""
    torch.manual_seed(2)
    lengths = torch.tensor([4, 6, 3, 5])
    hidden = torch.randn(18, 8, dtype=torch.float64, requires_grad=True)
    output = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(40, (18,))
    acts = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1]).bool()  # one turn of a tool inside
    sampled = -3 + torch.rand(18, dtype=torch.float64)
    rewards = torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    loss, _ = load("packed_batch")["packed_loss"](hidden, output, tokens, lengths, acts, sampled, rewards, 2)

    expected, start, advantages = torch.zeros((), dtype=torch.float64), 0, [2.0, -2.0, 0.0, 0.0]
    for sample, length in enumerate(lengths.tolist()):
        logits = hidden[start : start + length] @ output.T
        for place in range(1, length):
            if acts[start + place]:
                logprob = logits[place - 1].log_softmax(0)[tokens[start + place]]
                ratio = (logprob - sampled[start + place]).exp()
                clipped = ratio.clamp(0.8, 1.28)
                expected = (
                    expected - torch.minimum(ratio * advantages[sample], clipped * advantages[sample]) / acts.sum()
                )
        start += length
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    ours, theirs = (torch.autograd.grad(value, (hidden, output)) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_a_packed_row_without_answers_teaches_nothing():
    hidden, output = torch.randn(6, 8).requires_grad_(), torch.randn(40, 8).requires_grad_()
    row = (torch.randint(40, (6,)), torch.tensor([2, 4]), torch.zeros(6).bool(), torch.full((6,), -4.0))
    loss, _ = load("packed_batch")["packed_loss"](hidden, output, *row, torch.tensor([1.0, -1.0]), 2)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not output.grad.any()
