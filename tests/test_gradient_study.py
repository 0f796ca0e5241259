"""The study of gradients: its inner products against autograd, and what theory says of bias and variance."""

import pytest
import torch

from v05.errors import InputError
from v05.rollout.hf import TransformersEngine
from v05.small_policy import make_policy
from v05.studies.gradient import BLOCKS, Drawn, Pool, _summary, centred_gram, drawn_as, in_common, make_pool, quality
from v05.tasks import make_task


@pytest.fixture(scope="module")
def pool():
    """Random scores of 5 answers to 6 prompts, with success rates from 0.1 to 0.9."""
    rng = torch.Generator().manual_seed(0)
    answer = torch.randint(5, (6, 400), generator=rng)
    right = torch.rand(6, 400, generator=rng) < torch.linspace(0.1, 0.9, 6)[:, None]
    grams = [centred_gram(torch.randn(5, 30, generator=rng), row) for row in answer]
    rewards, common = right.double() * 2 - 1, torch.tensor(0.2, dtype=torch.float64)
    return Pool(rewards, answer, torch.stack(grams), common, answer + 1)


def test_scores_are_those_of_autograd():
    """The pool's own gradient, once through the inner products and once as the gradient of a sampled loss."""
    task = make_task("arithmetic")
    policy = make_policy(task.alphabet, "tiny", 0)
    prompts = task.prompts(0, 0, 2)
    done = []
    pool = make_pool(policy, task, TransformersEngine(policy), prompts, 40, done.append)
    assert done == [1, 2]
    rollouts = TransformersEngine(policy).generate(
        prompts[1:], [40], seed=1_000_003, temperature=1.0, max_new_tokens=task.max_answer_length
    )[0]
    rewards = [task.verify(prompts[1], r.text) if r.finished else task.reward_range[0] for r in rollouts]
    low, high = task.reward_range
    assert pool.rewards[1].tolist() == [2 * (reward - low) / (high - low) - 1 for reward in rewards]
    assert set(pool.rewards.flatten().tolist()) <= {-1.0, 1.0}
    assert pool.lengths[1].tolist() == [len(r.token_ids) for r in rollouts]
    weights = torch.linspace(-1, 1, 40, dtype=torch.float64)
    total = torch.zeros(())
    for rollout, weight in zip(rollouts, weights - weights.mean(), strict=True):
        from v05.rollout.pack import pack

        tokens = pack([rollout], "token-mean", max_length=task.max_answer_length)
        logits = policy.response_logits(tokens.prompts, tokens.tokens, tokens.sequence_offsets)
        chosen = torch.log_softmax(logits.double(), -1).gather(1, tokens.tokens[:, None])
        total = total + weight * chosen.sum()
    gradients = torch.autograd.grad(total, [w for w in policy.model.parameters() if w.requires_grad])
    squared = sum(float(gradient.double().square().sum()) for gradient in gradients)
    coefficients = torch.zeros(pool.gram.shape[1], dtype=torch.float64)
    coefficients.index_add_(0, pool.answer[1], weights)  # centring the scores does what centring the weights does
    assert float(coefficients @ pool.gram[1] @ coefficients) == pytest.approx(squared, rel=1e-3)


def test_factor_bias_and_variance_by_hand():
    """Two answers with scores (1, 0) and (0, 1): the truth is (1, 0), the mean gradient of every block (2, 1)."""
    scores, common, tokens = torch.eye(2, dtype=torch.float64)[None], torch.tensor(0.25), torch.ones(1, 2)
    pool = Pool(torch.zeros(1, 2), torch.tensor([[0, 1]]), scores, common, tokens)
    blocks = torch.tensor([[[2.0, 1.0]]], dtype=torch.float64).repeat(BLOCKS, 1, 1)
    lengths = 9.0 + torch.arange(BLOCKS, dtype=torch.float64)
    truth = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = _summary(pool, blocks, lengths, truth, Drawn("rloo", "constant"), 4.0)
    factor = 2 / 5  # (2, 1) times 0.4 comes as near to (1, 0) as it can
    assert (found.factor, found.bias) == pytest.approx((factor, 0.2**2 + 0.4**2))
    assert found.variance == pytest.approx(factor**2 * (lengths.mean().item() - 5))
    assert found.variance_half_width == pytest.approx(1.96 * factor**2 * lengths.std().item() / BLOCKS**0.5)
    assert (found.bias_half_width, found.between) == pytest.approx((0, 0.75))


def test_every_rollout_weighs_alike_in_groups_of_two_sizes(monkeypatch):
    """Groups of 2 and 4 with a wrong answer each: over 3 rollouts a prompt, either has a gradient of 2 / 3."""
    rewards, answer = torch.tensor([[-1.0, 1, 1, 1]] * 2, dtype=torch.float64), torch.tensor([[0, 1, 1, 1]] * 2)
    scores = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    pool = Pool(rewards, answer, scores, torch.tensor(0.0), torch.ones(2, 4))
    places, counts = torch.arange(4).repeat(2, 1), torch.tensor([2, 4])
    monkeypatch.setattr("v05.studies.gradient.draw_groups", lambda *given: (places, counts))
    found = quality(pool, Drawn("rloo", "constant", 2, 4, repeats=2 * BLOCKS))
    assert found.rollouts == 3
    assert found.factor == pytest.approx(3 / 8 / (2 / 3))  # the truth is 3 of 4 times 1 - 0.5
    assert (found.bias, found.variance) == pytest.approx((0, 0), abs=1e-12)


def test_what_prompts_have_in_common_is_that_of_the_mean_over_all_of_them():
    """Gradients with a known mean: the estimate from many of them finds its share, whatever their number."""
    rng = torch.Generator().manual_seed(0)
    mean = torch.zeros(50)
    mean[0] = 3.0
    gradients = mean + torch.randn(4000, 50, generator=rng)
    assert float(in_common(gradients)) == pytest.approx(9 / 59, rel=0.05)
    few = torch.stack([in_common(gradients[i : i + 4]) for i in range(0, 4000, 4)])
    assert float(few.mean()) == pytest.approx(9 / 59, rel=0.1)
    assert float(in_common(gradients[:1])) == 0


def test_an_update_of_many_prompts_has_the_variance_that_is_told(pool):
    """Prompts drawn at random, four rollouts each: the noise of the update, times its rollouts."""
    rng = torch.Generator().manual_seed(0)
    true, noise, k = torch.randn(200, 40, generator=rng) + 0.3, 0.5, 4
    drawn = true[torch.randint(200, (3000, 8), generator=rng)]
    drawn = drawn + noise / k**0.5 * torch.randn(drawn.shape, generator=rng)
    update = drawn.mean(1)
    told = quality(pool, Drawn("rloo", "sd 0.1", k, k, repeats=20))
    size = float(true.square().sum(1).mean())
    told = told._replace(variance=40 * noise**2 / k / size, between=1 - float(in_common(true)))
    measured = float((update - true.mean(0)).square().sum(1).mean()) / size * 8 * k
    assert measured == pytest.approx(told.by_rollout_in_all, rel=0.05)
    assert told.by_rollout == pytest.approx(40 * noise**2 / size)


@pytest.mark.parametrize("estimator", ["rloo", "v05_loo", "v05_calibrated_loo", "james_stein"])
def test_without_its_own_reward_a_baseline_has_no_bias(pool, estimator):
    found = quality(pool, Drawn(estimator, "sd 0.3", repeats=1000))
    assert abs(found.factor - 1) < 0.1
    assert found.bias < max(4 * found.bias_half_width, 0.02)
    assert found.rollouts == 4


def test_a_group_mean_shrinks_the_gradient_by_its_own_share(pool):
    found = quality(pool, Drawn("dr_grpo", "sd 0.3", repeats=1000))
    assert found.factor == pytest.approx(4 / 3, rel=0.06)


def test_opo_is_not_dr_grpo(pool):
    opo, mean = (quality(pool, Drawn(estimator, "sd 0.3", repeats=20)) for estimator in ("opo", "dr_grpo"))
    assert abs(opo.factor - mean.factor) > 0.01


def test_more_rollouts_and_better_baselines_have_less_variance(pool):
    variance = {k: quality(pool, Drawn("rloo", "sd 0.1", k, k, repeats=400)).variance for k in (2, 8)}
    assert variance[8] < 0.5 * variance[2]
    alone = quality(pool, Drawn("rloo", "sd 0.1", 2, 2, repeats=400))
    assert quality(pool, Drawn("v05_calibrated_loo", "sd 0.1", 2, 2, repeats=400)).variance < alone.variance


def test_groups_grow_where_the_prior_is_wrong(pool):
    right = quality(pool, Drawn("v05", "sd 0.1", 4, 16, repeats=40))
    wrong = quality(pool, Drawn("v05", "30 % hallucinated", 4, 16, repeats=40))
    assert 4 < right.rollouts < wrong.rollouts < 16


def test_dearer_rollouts_are_fewer(pool):
    spent = [quality(pool, Drawn("v05", "sd 0.5", 1, 16, 40, cost=cost)).rollouts for cost in (1 / 256, 1 / 64, 1 / 8)]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > spent[-1] >= 1
    assert quality(pool, Drawn("v05", "sd 0.5", 1, 16, 40, cost=1 / 64)).size == "1 to 16 at 1/64"


def test_names_and_numbers_are_checked():
    assert drawn_as("v05_calibrated_loo:2-16", "constant", 100) == Drawn("v05_calibrated_loo", "constant", 2, 16, 100)
    assert drawn_as("v05:1-4", "constant", 100, cost=1 / 64).cost == 1 / 64
    assert drawn_as("rloo:3", "constant", 100) == Drawn("rloo", "constant", 3, 3, 100)
    assert drawn_as("grpo", "constant", 100) == Drawn("grpo", "constant", 4, 4, 100)
    with pytest.raises(InputError, match="estimator is 'v05:a'; allowed: name, name:k or name:k-k_max"):
        drawn_as("v05:a", "constant", 100)
    for settings, message in (
        (("bayes", "constant"), "estimator is 'bayes'; allowed: v05, "),
        (("v05", "good"), "prior is 'good'; allowed: sd 0.1, "),
        (("v05", "constant", 4, 2), "k_init is 4 and k_max 2"),
        (("v05", "constant", 4, 4, 3), "repeats is 3; allowed: 20 or more"),
    ):
        with pytest.raises(InputError, match=message):
            Drawn(*settings)
