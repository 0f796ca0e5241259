"""The loss in v05's kernels against TRL's own `_compute_loss`: value, gradients of the model, and logged metrics."""

from collections import defaultdict

import pytest
import torch
from peft import PromptTuningConfig
from tiny_trl import VOCABULARY, WIDTH, make_trainer, trl_s_logprobs, write_policy
from trl import GRPOTrainer

pytestmark = pytest.mark.trl
ROWS, PROMPT = 8, 3
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(str(tmp_path_factory.mktemp("policy")))


def trainer_of(folder, tmp_path, loss_type, **options):
    high = 1.28 if loss_type == "cispo" else 0.28
    settings = dict(loss_type=loss_type, epsilon=0.2, epsilon_high=high, gradient_accumulation_steps=2, k_max=4)
    trainer = make_trainer(folder, tmp_path, **(settings | options))
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer


def score(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, WIDTH)[0]


def batch(trainer, seed=0, drift=0.4):
    """Ragged rows as TRL hands them over, one of them masked whole; old log-probs near the policy's."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (ROWS,), generator=rng)
    inside = torch.arange(WIDTH) < lengths[:, None]
    spoken = inside & (torch.rand(ROWS, WIDTH, generator=rng) > 0.2)  # the rest is a tool's
    spoken[:, 0] = True
    spoken[5] = False
    inputs = dict(
        prompt_ids=torch.randint(2, VOCABULARY, (ROWS, PROMPT), generator=rng),
        prompt_mask=torch.ones(ROWS, PROMPT, dtype=torch.int64),
        completion_ids=torch.randint(2, VOCABULARY, (ROWS, WIDTH), generator=rng),
        completion_mask=inside.long(),
        tool_mask=spoken.long(),
        advantages=torch.randn(ROWS, generator=rng),
        num_items_in_batch=2 * spoken.sum(),
    )
    logprobs = score(trainer, inputs).detach()
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    return inputs | {name: logprobs + drift * torch.randn(ROWS, WIDTH, generator=rng) for name in names}


def outcome(trainer, compute, inputs):
    """Loss, gradients and metrics."""
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    loss = compute(trainer.model, inputs)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    mode = "train" if trainer.model.training else "eval"
    return loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics[mode].items()}


def assert_same(trainer, inputs, metrics=True):
    """The whole path: theirs has TRL's log-probs too."""
    with trl_s_logprobs(trainer):
        theirs = outcome(trainer, lambda *given: GRPOTrainer._compute_loss(trainer, *given), inputs)
    ours = outcome(trainer, trainer._compute_loss, inputs)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=2e-5, atol=2e-6)
    assert max(float(gradient.abs().max()) for gradient in theirs[1]) > 1e-3
    if metrics:
        assert ours[2].keys() == theirs[2].keys()
        for name, value in theirs[2].items():
            assert ours[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("beta", "corrected"), [(0.0, True), (0.1, False), (0.1, True)])
def test_every_loss(folder, tmp_path, loss_type, level, beta, corrected):
    options = dict(importance_sampling_level=level, beta=beta, use_bias_correction_kl=corrected)
    trainer = trainer_of(folder, tmp_path, loss_type, **options)
    assert trainer._loss_code == "policy_loss"
    assert_same(trainer, batch(trainer))


@pytest.mark.parametrize(
    ("loss_types", "options"),
    [
        (["grpo", "dapo", "cispo", "sapo", "vespo"], dict(top_entropy_quantile=0.5)),
        (["dapo", "luspo"], dict(off_policy_mask_threshold=0.05, importance_sampling_level="sequence")),
        (["dapo", "sapo", "vespo"], dict(off_policy_mask_threshold=0.05, top_entropy_quantile=0.6, beta=0.1)),
        (["grpo", "dapo"], dict(delta=1.6)),
        (["sapo"], dict(sapo_temperature_pos=0.7, sapo_temperature_neg=2.0)),
        (["vespo"], dict(vespo_k_pos=1.5, vespo_lambda_pos=2.5, vespo_k_neg=2.0, vespo_lambda_neg=1.0)),
    ],
    ids=str,
)
def test_masks_and_bounds(folder, tmp_path, loss_types, options):
    for loss_type in loss_types:
        trainer = trainer_of(folder, tmp_path, loss_type, **options)
        assert trainer._loss_code == "policy_loss"
        assert_same(trainer, batch(trainer))


def sampler_ratio(inputs, mode, low, high):
    """The ratio that TRL's generation step puts in, by the definition of each mode."""
    gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["tool_mask"]
    ratio = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        *[("dapo", mode) for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")],
        ("grpo", "token_mask"),
        ("sapo", "sequence_mask"),
        ("cispo", "sequence_truncate"),
        ("vespo", "token_truncate"),
    ],
)
def test_sampler_corrections(folder, tmp_path, loss_type, mode):
    trainer = trainer_of(folder, tmp_path, loss_type, beta=0.1, vllm_importance_sampling_mode=mode)
    trainer.use_vllm = True
    inputs = batch(trainer)
    inputs["importance_sampling_ratio"] = sampler_ratio(inputs, mode, 0.6, 1.4)
    assert_same(trainer, inputs)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_and_in_evaluation(folder, tmp_path, loss_type):
    trainer = trainer_of(folder, tmp_path, loss_type)
    inputs = batch(trainer)
    del inputs["old_per_token_logps"]
    assert_same(trainer, inputs)
    trainer.model.eval()
    assert_same(trainer, batch(trainer))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_of_tokens(folder, tmp_path, loss_type):
    """One row of two tokens and one of none are as many tokens as rows: still an advantage each."""
    trainer = trainer_of(folder, tmp_path, loss_type)
    inputs = batch(trainer)
    inputs["advantages"] = torch.randn(ROWS, WIDTH)
    assert_same(trainer, inputs, metrics=False)
    few = {name: value[:2] if value.dim() else value for name, value in inputs.items()}
    few["completion_mask"], few["tool_mask"] = (torch.zeros(2, WIDTH, dtype=torch.int64) for _ in range(2))
    few["completion_mask"][0, :2] = few["tool_mask"][0, :2] = 1
    assert_same(trainer, few, metrics=False)


@pytest.mark.parametrize("backend", ["policy_loss", "linear_policy_loss"])
def test_a_batch_that_is_masked_whole(folder, tmp_path, backend):
    trainer = trainer_of(folder, tmp_path, "dapo", loss_backend=backend)
    inputs = batch(trainer)
    inputs["tool_mask"] = torch.zeros_like(inputs["tool_mask"])
    inputs["num_items_in_batch"] = torch.tensor(0)
    loss, gradients, _ = outcome(trainer, trainer._compute_loss, inputs)
    assert float(loss) == 0.0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_fused_head(folder, tmp_path, loss_type, level):
    options = dict(importance_sampling_level=level, loss_backend="linear_policy_loss", temperature=0.7)
    trainer = trainer_of(folder, tmp_path, loss_type, **options)
    assert trainer._loss_code == "linear_policy_loss"
    inputs = batch(trainer)
    assert_same(trainer, inputs, metrics=False)
    del inputs["old_per_token_logps"]
    assert_same(trainer, inputs, metrics=False)


@pytest.mark.parametrize("backend", ["policy_loss", "linear_policy_loss"])
def test_the_fused_head_with_checkpointing(folder, tmp_path, backend):
    options = dict(loss_backend=backend, gradient_checkpointing=True)
    trainer = trainer_of(folder, tmp_path, "dapo", **options)
    trainer.model.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert_same(trainer, batch(trainer), metrics=False)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_fused_head_with_a_sampler_s_ratio(folder, tmp_path, mode):
    options = dict(loss_backend="linear_policy_loss", vllm_importance_sampling_mode=mode)
    trainer = trainer_of(folder, tmp_path, "dapo", **options)
    trainer.use_vllm = True
    inputs = batch(trainer)
    inputs["importance_sampling_ratio"] = sampler_ratio(inputs, mode, 0.6, 1.4)
    assert_same(trainer, inputs, metrics=False)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("backend", ["policy_loss", "linear_policy_loss"])
def test_the_fused_head_under_bf16(folder, tmp_path, weights, cast, backend):
    """The dtype of the product is TRL's, seen from what the kernel keeps: the head's weight, or a gradient for it."""
    options = dict(loss_backend=backend, bf16=True, cast_lm_head_to_fp32=cast)
    trainer = trainer_of(folder, tmp_path, "dapo", weights=weights, **options)
    model = trainer.accelerator.prepare(trainer.model)
    inputs, shape, kept = batch(trainer), trainer.model.lm_head.weight.shape, set()

    def pack(saved):
        kept.update([saved.dtype] if saved.shape == shape else [])
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = trainer._compute_loss(model, inputs)
    assert kept == {torch.float32 if cast else torch.bfloat16}
    with trl_s_logprobs(trainer):
        theirs = GRPOTrainer._compute_loss(trainer, model, inputs)
    torch.testing.assert_close(loss, theirs, rtol=2e-2, atol=1e-3)
    head = trainer.model.lm_head.weight
    ours, wanted = (torch.autograd.grad(value, head)[0].double() for value in (loss, theirs))
    assert (ours - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("backend", ["policy_loss", "linear_policy_loss"])
def test_the_fused_head_behind_virtual_tokens(folder, tmp_path, backend):
    """Prompt tuning puts states before the prompt's, so completions are counted from the end."""
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = trainer_of(folder, tmp_path, "dapo", loss_backend=backend, extra=dict(peft_config=tuned))
    assert_same(trainer, batch(trainer), metrics=False)


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        (dict(entropy_coef=0.01), "trl"),
        (dict(use_adaptive_entropy=True), "trl"),
        (dict(delta=1.1), "trl"),
        (dict(loss_type="cispo", epsilon_high=0.28), "trl"),
        (dict(loss_type="sapo", sapo_temperature_pos=50.0), "trl"),
        (dict(loss_backend="trl"), "trl"),
        (dict(loss_backend="linear_policy_loss", beta=0.1), "policy_loss"),
        (dict(loss_backend="linear_policy_loss", loss_type="vespo"), "policy_loss"),
        (dict(loss_backend="linear_policy_loss", top_entropy_quantile=0.5), "policy_loss"),
        (dict(loss_backend="linear_policy_loss", entropy_coef=0.01), "trl"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_express_runs_in_trl_s_code(folder, tmp_path, options, runs):
    options = dict(options)
    trainer = trainer_of(folder, tmp_path, options.pop("loss_type", "dapo"), **options)
    assert trainer._loss_code == runs
    assert_same(trainer, batch(trainer), metrics=False)
