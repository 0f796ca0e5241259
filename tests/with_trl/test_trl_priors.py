"""Priors of one's own: what the constructor takes, what a checkpoint keeps of them, and resuming with another one."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny_trl import make_trainer, write_policy

pytestmark = pytest.mark.trl
SAVING = dict(save_strategy="steps", save_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(str(tmp_path_factory.mktemp("policy")))


class Stateful:
    """It expects one half of every prompt, and keeps whatever state it is given."""

    def __init__(self, **state):
        self.state = state

    def predict(self, prompts):
        return [0.5] * len(prompts)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = {name: state[name] for name in self.state}


class Tied(torch.nn.Module):
    """Two layers with the same weight, which is a parameter and has a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def predict(self, prompts):
        return torch.sigmoid(self.second(self.first(torch.zeros(len(prompts), 2)))).mean(1)


def saved(folder, output, own=None, **options):
    """Train for one step; return the checkpoint and what it keeps of V0.5."""
    make_trainer(folder, output, **SAVING, max_steps=1, extra=dict(prior=own), **options).train()
    checkpoint = output / "checkpoint-1"
    return checkpoint, load_file(checkpoint / "v05_state.safetensors")


def resumed(folder, output, checkpoint, own=None, **options):
    """Train a second step from a checkpoint; return the trainer."""
    trainer = make_trainer(folder, output, max_steps=2, extra=dict(prior=own), **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    return trainer


@pytest.mark.parametrize(
    ("prior", "named"), [(object(), "object"), ("history", "str"), (Stateful, "the class Stateful"), (0.5, "float")]
)
def test_what_cannot_predict_is_refused_at_once(folder, tmp_path, prior, named):
    with pytest.raises(TypeError, match=rf"prior is {named}; allowed: an object with predict\(prompts\), or None"):
        make_trainer(folder, tmp_path, extra=dict(prior=prior))


def test_tensors_that_share_memory_are_kept(folder, tmp_path):
    line = torch.arange(10.0)
    prior = Stateful(part=line[:5], whole=line, column=line.view(5, 2).T)
    checkpoint, state = saved(folder, tmp_path, prior)
    assert torch.equal(state["prior.part"], line[:5])
    assert torch.equal(state["prior.column"], line.view(5, 2).T)
    fresh = Stateful(part=torch.zeros(5), whole=torch.zeros(10), column=torch.zeros(2, 5))
    resumed(folder, tmp_path / "on", checkpoint, fresh)
    assert torch.equal(fresh.state["whole"], line)


def test_modules_with_tied_weights_are_kept(folder, tmp_path):
    module, fresh = Tied(), Tied()
    checkpoint, state = saved(folder, tmp_path, module)
    assert torch.equal(state["prior.first.weight"], state["prior.second.weight"])
    resumed(folder, tmp_path / "on", checkpoint, fresh)
    assert torch.equal(fresh.first.weight, module.first.weight)


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ({"n": 3, "seen": torch.ones(2)}, "state_dict()['n'] is int; allowed: a tensor"),
        ({0: torch.ones(2)}, "state_dict() has the key 0; allowed: tensors by name"),
        (None, "state_dict() is NoneType; allowed: tensors by name"),
    ],
)
def test_a_state_that_is_no_tensor_does_not_end_the_run(folder, tmp_path, caplog, kept, why):
    prior = Stateful()
    prior.state = kept
    with caplog.at_level(logging.WARNING):
        checkpoint, state = saved(folder, tmp_path, prior)
    assert f"prior Stateful: {why}; its state is left out of the checkpoint" in caplog.text
    assert not any(name.startswith("prior.") for name in state)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = resumed(folder, tmp_path / "on", checkpoint, Stateful(n=4))
    assert "holds no state of prior Stateful, which starts anew" in caplog.text
    assert trainer.estimation.prior.state == {"n": 4}


@pytest.mark.parametrize(("before", "after"), [("history", "running_mean"), ("middle", "history")])
def test_another_prior_starts_anew(folder, tmp_path, caplog, before, after):
    names = {"history": "WithPast", "running_mean": "RunningMean", "middle": "Middle"}
    checkpoint, _ = saved(folder, tmp_path, prior=before)
    with caplog.at_level(logging.WARNING):
        resumed(folder, tmp_path / "on", checkpoint, prior=after)
    assert f"holds the state of prior {names[before]}, not of {names[after]}, which starts anew" in caplog.text


def test_calibration_of_another_prior_starts_anew_too(folder, tmp_path):
    calibrated = dict(estimator="v05_calibrated")
    checkpoint, state = saved(folder, tmp_path, Stateful(), **calibrated)
    other = make_trainer(folder, tmp_path / "other", **calibrated)
    other.estimation.load_state_dict(state, torch.device("cpu"))
    assert other.estimation.mixture is None
    same = make_trainer(folder, tmp_path / "same", extra=dict(prior=Stateful()), **calibrated)
    same.estimation.load_state_dict(state, torch.device("cpu"))
    assert torch.equal(same.estimation.mixture, state["mixture"])
    resumed(folder, tmp_path / "on", checkpoint, Stateful(), estimator="v05")  # which has no calibration


def test_a_state_that_a_prior_refuses_is_an_error_that_says_so(folder, tmp_path):
    checkpoint, _ = saved(folder, tmp_path, Stateful(seen=torch.ones(2)))
    message = r"prior Stateful does not take the state in the checkpoint \(KeyError: 'heard'\)"
    with pytest.raises(ValueError, match=message):
        resumed(folder, tmp_path / "on", checkpoint, Stateful(heard=torch.ones(2)))
