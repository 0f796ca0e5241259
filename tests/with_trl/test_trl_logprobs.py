"""Log-probs and entropies of `linear_logprob` against those of TRL's own code, wherever a trainer asks for them."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_trl import PROMPTS, VOCABULARY, WIDTH, make_trainer, trl_s_logprobs, write_policy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from v05.integrations.trl.head import why_not_head
from v05.integrations.trl.logprobs import why_no_kernel

pytestmark = pytest.mark.trl
ROWS, PROMPT = 8, 5
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, initializer_range=0.4)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


class Ops(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> bool:
        """Whether `linear_logprob` was among them."""
        return "v05.linear_logprob.default" in self.names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(str(tmp_path_factory.mktemp("policy")))


def of(kind, config, **settings):
    torch.manual_seed(0)
    return kind(config(**SIZES, **settings))


def lora(model):
    """An adapter that changes something, as after some training."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    shift(parameter for name, parameter in adapted.named_parameters() if "lora_B" in name)
    return adapted


def shift(parameters):
    rng = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)


MODELS = {
    "apart": lambda: of(Qwen3ForCausalLM, Qwen3Config, head_dim=8, tie_word_embeddings=False),
    "tied": lambda: of(Qwen3ForCausalLM, Qwen3Config, head_dim=8, tie_word_embeddings=True),
    "bias": lambda: of(PhiForCausalLM, PhiConfig, partial_rotary_factor=0.5),
    "lora": lambda: lora(MODELS["apart"]()),
}


def rows(seed=0):
    """Ids and mask of prompts padded on the left with completions padded on the right, one of them masked whole."""
    rng = torch.Generator().manual_seed(seed)
    before, inside = (torch.randint(1, most + 1, (ROWS,), generator=rng) for most in (PROMPT, WIDTH))
    inside[2] = 0
    prompt = torch.arange(PROMPT) >= PROMPT - before[:, None]
    mask = torch.cat([prompt, torch.arange(WIDTH) < inside[:, None]], 1).long()
    return torch.randint(2, VOCABULARY, mask.shape, generator=rng) * mask, mask


def both(trainer, model, *given, **options):
    """Ours and TRL's, each by its own code."""
    with Ops() as ops:
        ours = trainer._get_per_token_logps_and_entropies(model, *given, **options)
    assert ops.fused
    with trl_s_logprobs(trainer), Ops() as ops:
        theirs = trainer._get_per_token_logps_and_entropies(model, *given, **options)
    assert not ops.fused
    return ours, theirs


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("batch_size", "temperature"), [(None, 1.0), (3, 0.7)])
def test_values_and_gradients_are_trl_s(folder, tmp_path, kind, batch_size, temperature):
    trainer = make_trainer(folder, tmp_path, temperature=temperature, extra=dict(model=MODELS[kind]()))
    ids, mask = rows()
    options = dict(batch_size=batch_size, compute_entropy=True)
    found = both(trainer, trainer.model, ids, mask, WIDTH, **options)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    rng = torch.Generator().manual_seed(2)
    weights = [torch.randn(ROWS, WIDTH, generator=rng) for _ in range(2)]
    gradients = []
    for logprobs, entropies, auxiliary in found:
        assert auxiliary is None
        assert logprobs.dtype == entropies.dtype == torch.float32
        loss = (weights[0] * logprobs + weights[1] * entropies).sum()
        gradients.append(torch.autograd.grad(loss, trained, allow_unused=True))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients[0] if gradient is not None) > 1e-2
    outside = mask[:, -WIDTH:] == 0
    assert all(bool((values[outside] == 0).all()) and bool((values[~outside] != 0).all()) for values in found[0][:2])


def test_entropies_are_there_where_asked_for(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    with torch.no_grad():
        ours, theirs = both(trainer, trainer.model, *rows(), WIDTH)
    assert ours[1:] == theirs[1:] == (None, None)
    assert not ours[0].requires_grad


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_under_bf16(folder, tmp_path, weights, cast):
    """Of the policy and of the reference, wrapped as in training."""
    options = dict(bf16=True, cast_lm_head_to_fp32=cast, beta=0.1)
    trainer = make_trainer(folder, tmp_path, weights=weights, **options)
    shift(trainer.ref_model.parameters())
    for model in (trainer.accelerator.prepare(trainer.model), trainer.ref_model):
        ours, theirs = both(trainer, model, *rows(), WIDTH)
        assert ours[0].dtype == theirs[0].dtype == torch.float32
        torch.testing.assert_close(ours[0], theirs[0], rtol=2e-5 if cast else 2e-2, atol=2e-6 if cast else 4e-2)


@pytest.mark.parametrize("kind", ["apart", "new adapter", "lora"])
def test_the_generation_step(folder, tmp_path, kind):
    """Log-probs of the old policy and of the reference: another model, the bare policy, or an earlier adapter."""
    options = dict(beta=0.1, num_iterations=2, estimator="dr_grpo", per_device_train_batch_size=2)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    extra = {"new adapter": dict(peft_config=adapter), "lora": dict(model=MODELS["lora"]())}.get(kind, {})
    trainer = make_trainer(folder, tmp_path, extra=extra, gradient_accumulation_steps=4, **options)
    assert (trainer.ref_model is None) == (kind != "apart")
    shift(parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)
    trainer.model.train()

    def batch():
        torch.manual_seed(3)
        with Ops() as ops:
            made = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
        return made, ops.fused

    ours, fused = batch()
    assert fused
    with trl_s_logprobs(trainer):
        theirs, fused = batch()
    assert not fused
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    old, ref, inside = (ours[name] for name in ("old_per_token_logps", "ref_per_token_logps", "completion_mask"))
    assert float((old - ref).abs().max()) > 0.01
    assert bool((inside == 0).any())
    assert not old[inside == 0].any()
    assert not ref[inside == 0].any()


@pytest.mark.parametrize("loss_backend", ["policy_loss", "trl"])
def test_a_loss_goes_through_them(folder, tmp_path, loss_backend):
    trainer = make_trainer(folder, tmp_path, loss_backend=loss_backend, max_steps=1, k_max=4)
    with Ops() as ops:
        trainer.train()
    assert ops.fused
    assert "v05.linear_logprob_backward.default" in ops.names


def test_trl_s_own_where_asked_for(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(folder, tmp_path, logprob_backend="trl", max_steps=1, k_max=4)
    with Ops() as ops:
        trainer.train()
    assert not ops.fused
    assert "v05: l" not in caplog.text


@pytest.mark.parametrize("loss_backend", ["policy_loss", "trl"])
def test_a_batch_without_completions(folder, tmp_path, loss_backend):
    trainer = make_trainer(folder, tmp_path, loss_backend=loss_backend)
    ids, mask = rows()
    mask[:, -WIDTH:] = 0
    trained = list(trainer.model.parameters())
    for logprobs, entropies, _ in both(trainer, trainer.model, ids, mask, WIDTH, compute_entropy=True):
        assert not logprobs.any()
        gradients = torch.autograd.grad((logprobs + entropies).sum(), trained)
        assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: of(Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=8, **EXPERTS), "the model has an auxiliary loss"),
        (
            lambda: of(GraniteForCausalLM, GraniteConfig, logits_scaling=4.0),
            "the model's logits_scaling changes logits",
        ),
        (lambda: of(Gemma2ForCausalLM, Gemma2Config, head_dim=8), "the model's final_logit_softcapping changes logits"),
    ],
    ids=["auxiliary loss", "scale", "softcapping"],
)
@pytest.mark.parametrize("loss_backend", ["policy_loss", "linear_policy_loss", "trl"])
def test_what_the_kernel_cannot_express_runs_in_trl_s_code(folder, tmp_path, caplog, model, why, loss_backend):
    with caplog.at_level(logging.WARNING):
        options = dict(loss_backend=loss_backend, max_steps=1, k_max=4)
        trainer = make_trainer(folder, tmp_path, extra=dict(model=model()), **options)
    said = [message[message.index("v05: ") :] for message in caplog.messages if "v05: " in message]
    expected = [f"v05: logprob_backend 'trl' runs instead of 'linear_logprob': {why}"]
    if loss_backend == "linear_policy_loss":
        expected.append(f"v05: loss_backend 'policy_loss' runs instead of 'linear_policy_loss': {why}")
    assert said == expected
    with Ops() as ops:
        trainer.train()
    assert not ops.fused


def test_reasons_that_take_other_machines(folder, tmp_path):
    config = make_trainer(folder, tmp_path).model.config
    assert why_not_head(config, False, split=False, images=False) is None
    assert why_not_head(config, False, split=True, images=False) == "the model may be on several devices"
    assert why_not_head(config, False, split=False, images=True) == "the model takes images"
    assert why_no_kernel("cpu") is None
    assert why_no_kernel("mps") == "it has no kernel for mps here, and its reference keeps all logits"


def test_what_is_given_beside_tokens_is_for_trl_s_code(folder, tmp_path):
    """Nothing that only it knows is left out."""
    trainer = make_trainer(folder, tmp_path)
    ids, mask = rows()
    with Ops() as ops:
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, WIDTH, token_type_ids=ids)
    assert not ops.fused
