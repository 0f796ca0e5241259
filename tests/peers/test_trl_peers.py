"""policy_loss and group_advantage against TRL's own GRPOTrainer, run on the CPU with a tiny Qwen3."""

import pytest
import torch
from datasets import Dataset
from padded import Padded
from tiny_models import make_tokenizer, qwen3_config
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from v05.kernels import group_advantage, policy_loss
from v05.testing import offsets_of

pytestmark = pytest.mark.peers
BATCH, PROMPT, WIDTH, VOCABULARY = 8, 3, 12, 24


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a tiny random model, and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("policy"))
    words = ["<pad>", "<eos>", *(chr(97 + i) for i in range(VOCABULARY - 2))]
    torch.manual_seed(0)
    settings = dict(num_hidden_layers=1, pad_token_id=0, eos_token_id=1, initializer_range=0.4)
    Qwen3ForCausalLM(qwen3_config(VOCABULARY, 16, **settings)).save_pretrained(folder)
    return folder, make_tokenizer(words, spaced=True)


def make_trainer(policy, tmp_path, rewards=lambda completions, **_: [0.0] * len(completions), **options):
    folder, tokenizer = policy
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=BATCH,
        num_generations=4,
        max_completion_length=WIDTH,
        gradient_checkpointing=False,
        use_bias_correction_kl=False,  # multiplies the KL by the ratio; v05 has no such estimator
        disable_tqdm=True,
        **options,
    )
    return GRPOTrainer(
        model=Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a b c"] * BATCH}),
        processing_class=tokenizer,
    )


def trainer_inputs(trainer, seed):
    """A ragged batch as the trainer's own generation step would hand over, old log-probs near the policy's."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (BATCH,), generator=rng)
    inside = torch.arange(WIDTH) < lengths[:, None]
    spoken = inside & (torch.rand(BATCH, WIDTH, generator=rng) > 0.2)  # the rest is a tool's
    spoken[:, 0] = True
    inputs = dict(
        prompt_ids=torch.randint(2, VOCABULARY, (BATCH, PROMPT), generator=rng),
        prompt_mask=torch.ones(BATCH, PROMPT, dtype=torch.int64),
        completion_ids=torch.randint(2, VOCABULARY, (BATCH, WIDTH), generator=rng),
        completion_mask=inside.long(),
        tool_mask=spoken.long(),
        advantages=torch.randn(BATCH, generator=rng),
        num_items_in_batch=spoken.sum(),
    )
    logprobs = trainer_logprobs(trainer, inputs).detach()
    old, ref, sampler = (logprobs + 0.4 * torch.randn(BATCH, WIDTH, generator=rng) for _ in range(3))
    inputs |= dict(old_per_token_logps=old, ref_per_token_logps=ref)
    data = Padded(logprobs, old, ref, sampler, spoken.float(), inputs["advantages"], lengths)
    return inputs, data


def trainer_logprobs(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, WIDTH)[0]


def gradients(trainer, loss):
    parameters = list(trainer.model.parameters())
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def our_loss(trainer, inputs, data, mode, constant=1.0, **options):
    """v05 on the log-probs of the trainer's model, so that gradients meet in its parameters."""
    return policy_loss(
        data.pack(trainer_logprobs(trainer, inputs)),
        data.pack(data.old),
        data.advantages,
        data.pack(data.weights(mode, constant)),
        sequence_offsets=data.offsets,
        **options,
    ).loss


CLIP = dict(clip_low=0.2, clip_high=0.28)
LOSSES = {
    "grpo": ("seq-mean-token-mean", CLIP),
    "bnpo": ("token-mean", CLIP),
    "dapo": ("token-mean", CLIP),
    "dr_grpo": ("seq-mean-token-sum-norm", CLIP),
    "sapo": ("seq-mean-token-mean", dict(surrogate="sapo", sapo_tau_pos=1.0, sapo_tau_neg=1.05)),
    # Theirs caps the ratio at epsilon_high itself and has no floor.
    "cispo": ("token-mean", dict(surrogate="cispo", clip_low=1.0, clip_high=0.28)),
}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(("level", "beta"), [("token", 0.0), ("token", 0.1), ("sequence", 0.1)])
def test_every_loss_of_the_trainer(policy, tmp_path, loss_type, level, beta):
    epsilon_high = 1.28 if loss_type == "cispo" else 0.28
    options = dict(loss_type=loss_type, importance_sampling_level=level, beta=beta)
    trainer = make_trainer(policy, tmp_path, epsilon=0.2, epsilon_high=epsilon_high, **options)
    trainer.model.eval()
    inputs, data = trainer_inputs(trainer, seed=3)
    mode, own = LOSSES[loss_type]
    kl = dict(kl="k3", kl_coef=beta, ref_logprobs=data.pack(data.ref)) if beta else {}
    theirs = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
    ours = gradients(trainer, our_loss(trainer, inputs, data, mode, WIDTH, level=level, **own, **kl))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def their_sampler_ratio(data, mode, low, high):
    """The ratio that the trainer's generation step puts into its inputs, by the definition of each mode."""
    gap = (data.old - data.sampler) * data.mask
    ratio = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(max=high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_sampler_corrections(policy, tmp_path, mode):
    trainer = make_trainer(policy, tmp_path, beta=0.1, vllm_importance_sampling_mode=mode)
    trainer.model.eval()
    trainer.use_vllm = True
    inputs, data = trainer_inputs(trainer, seed=4)
    inputs["importance_sampling_ratio"] = their_sampler_ratio(data, mode, 0.6, 1.4)
    theirs = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
    sampler = dict(sampler_logprobs=data.pack(data.sampler), sampler_cap=1.4, sampler_floor=0.6)
    kl = dict(kl="k3", kl_coef=0.1, ref_logprobs=data.pack(data.ref))
    ours = our_loss(trainer, inputs, data, "token-mean", sampler_correction=mode, **sampler, **kl)
    torch.testing.assert_close(gradients(trainer, ours), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("scale_rewards", "ours"),
    [
        ("group", dict(estimator="grpo")),
        ("none", dict(estimator="dr_grpo")),
        ("batch", dict(estimator="dr_grpo", scale="batch")),
    ],
)
def test_advantages_of_the_trainer(policy, tmp_path, scale_rewards, ours):
    """Its own generation step scores sampled completions; its epsilon is 1e-4."""
    rewards = [1.0, -1.0, 0.25, 1.0, -1.0, -1.0, -1.0, 0.5]
    scores = iter([rewards, [0.5] * BATCH])
    trainer = make_trainer(policy, tmp_path, lambda completions, **_: next(scores), scale_rewards=scale_rewards)
    for expected in (rewards, [0.5] * BATCH):
        theirs = trainer._generate_and_score_completions([{"prompt": "a b c"}] * BATCH)["advantages"]
        result = group_advantage(torch.tensor(expected), offsets_of(torch.tensor([4, 4])), eps=1e-4, **ours)
        torch.testing.assert_close(result, theirs, rtol=1e-5, atol=1e-6)
