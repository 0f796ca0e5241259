"""Heads: the Gaussian process against its textbook formulas, kernel regression, and TabPFN with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_tabpfn import write_tabpfn
from tiny_models import LettersEmbedder

from v05.errors import InputError
from v05.value import process
from v05.value.features import MEASURES, PHRASES, Described, describe, letters, structure
from v05.value.head import LOWEST, Context, GaussianProcessHead, calibration_slope, moments, number_prompts
from v05.value.regression_head import LINEAR, NOISE, RegressionHead, kernel, left_out, log_odds, solve, standardised
from v05.value.tabpfn_head import TabPFNHead, differentiable_head

EASY = [f"Compute ${a} + {b}$." for a in range(1, 9) for b in range(1, 6)]
HARD = [
    f"Find all primes $p$ such that $p^{a} - {b}$ is divided by $7$ for all $n$."
    for a in range(2, 10)
    for b in range(5)
]


def described(prompts: list[str]) -> Described:
    return describe(prompts, LettersEmbedder())


def outcomes(count: int, low: float, high: float, seed: int) -> torch.Tensor:
    return torch.empty(count).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def test_description_counts_letters_and_structure() -> None:
    one, two = structure("Find $2^{10} + 7$."), structure("")
    assert len(one) == MEASURES + len(PHRASES)
    assert one[2] == pytest.approx(np.log1p(3))  # three numbers: 2, 10, 7
    assert not any(two)
    assert np.array_equal(letters("Sum 12"), letters("sum  34"))
    assert not np.array_equal(letters("Sum 12"), letters("sum 345"))
    assert described([]).letters.shape[0] == 0
    assert torch.allclose(described(EASY[:3]).letters.norm(dim=1), torch.ones(3))


def test_left_out_predictions_equal_refits() -> None:
    """Rows of one prompt are left out together; each prediction is that of a process that never saw the prompt."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    block = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 1])
    full = points @ points.T + torch.eye(9) * 0.5
    targets = torch.randn(9, generator=generator, dtype=torch.float64)
    mean, variance = process.left_out(torch.linalg.inv(full), targets, block)
    for number in range(5):
        out, kept = block == number, block != number
        gain = full[out][:, kept] @ torch.linalg.inv(full[kept][:, kept])
        torch.testing.assert_close(mean[out], gain @ targets[kept])
        expected = full[out][:, out] - gain @ full[kept][:, out]
        torch.testing.assert_close(variance[out], expected.diagonal())


def test_the_process_equals_its_formula() -> None:
    features, rates = described(EASY[:12] + HARD[:12]), torch.cat([outcomes(12, 0.6, 1, 0), outcomes(12, 0, 0.4, 1)])
    head = GaussianProcessHead(steps=0)
    head.fit(features, rates)
    queries = described(EASY[20:23] + HARD[20:23])
    weights = torch.tensor(process.START, dtype=torch.float64).exp()
    scaling = process.Scaling.of(features)

    def covariance(a: Described, b: Described) -> torch.Tensor:
        kernels = process.kernels(a, b, scaling)
        return sum(weight * kernel for weight, kernel in zip(weights, kernels, strict=False)) + weights[-1]

    values = rates.double()
    centre, spread = moments(values, torch.zeros(24, dtype=torch.int64), 1)
    same, noise = weights[-3] * torch.eye(24), weights[-2] + process.JITTER
    full = covariance(features, features) + same + noise * torch.eye(24)
    deviation = covariance(queries, features) @ torch.linalg.solve(full, (values - centre) / spread)
    expected = (centre + spread * head.slope[0] * deviation).clamp(LOWEST, 1 - LOWEST)
    torch.testing.assert_close(head.predict(queries).double(), expected, atol=1e-6, rtol=0)


def test_hyper_parameters_keep_to_their_bounds() -> None:
    first = torch.tensor(process.START, dtype=torch.float64)
    head = GaussianProcessHead(start=first + 50, steps=1)
    head.fit(described(EASY[:12] + HARD[:12]), torch.cat([outcomes(12, 0.6, 1, 0), outcomes(12, 0, 0.4, 1)]))
    assert (head.parameters - first).abs().max() <= process.FARTHEST * process.SPREAD


def test_easy_and_hard_are_told_apart() -> None:
    head = GaussianProcessHead()
    head.fit(described(EASY[:30] + HARD[:30]), torch.cat([outcomes(30, 0.7, 1, 0), outcomes(30, 0, 0.3, 1)]))
    found = head.predict(described(EASY[30:] + HARD[30:]))
    assert found[:10].min() > 0.6
    assert found[10:].max() < 0.4


def test_noise_is_not_believed() -> None:
    rates = torch.bernoulli(torch.full((60,), 0.3), generator=torch.Generator().manual_seed(3))
    head = GaussianProcessHead()
    head.fit(described(EASY[:30] + HARD[:30]), rates)
    found = head.predict(described(EASY[30:] + HARD[30:]))
    assert (found - rates.mean()).abs().max() < 0.2


def test_another_policy_helps_where_it_agrees_and_a_prompts_own_past_most() -> None:
    prompts = EASY[:20] + HARD[:20]
    truth = torch.cat([outcomes(20, 0.5, 1, 0), outcomes(20, 0, 0.5, 1)])
    few = torch.arange(0, 40, 5)
    context = Context(described([prompts[row] for row in few]), truth[few])
    rest = torch.tensor([row for row in range(40) if row % 5])
    queries = described([prompts[row] for row in rest])
    alone, together = GaussianProcessHead(), GaussianProcessHead([Context(described(prompts), truth)])
    alone.fit(context.features, context.outcomes)
    together.fit(context.features, context.outcomes)
    errors = [float((head.predict(queries) - truth[rest]).square().mean()) for head in (alone, together)]
    assert errors[1] < errors[0] / 2


def test_prompts_are_numbered_by_what_they_are() -> None:
    contexts = [Context(described(EASY[:3]), torch.zeros(3)), Context(described(EASY[1:5]), torch.zeros(4))]
    rows = number_prompts(contexts)
    assert rows.prompt.tolist() == [0, 1, 2, 1, 2, 3, 4]
    assert rows.policy.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(rows.described.letters, described(EASY[:5]).letters)


@pytest.mark.parametrize("rates", [[], [1.0], [0.0, 0.0, 0.0], [1.0] * 8])
def test_contexts_that_say_little(rates: list[float]) -> None:
    for head in (GaussianProcessHead(), RegressionHead()):
        features = described(EASY[: len(rates)])
        queries = described(HARD[:4])
        joint = isinstance(head, GaussianProcessHead)
        head.fit(features if joint else features.sentence, torch.tensor(rates))
        found = head.predict(queries if joint else queries.sentence)
        assert found.shape == (4,)
        assert torch.isfinite(found).all()
        assert ((found >= 0) & (found <= 1)).all()


def test_the_slope_is_cautious() -> None:
    guess = torch.linspace(-1, 1, 200, dtype=torch.float64)
    assert calibration_slope(guess, 0.5 * guess) == pytest.approx(0.6, abs=1e-6)
    assert calibration_slope(guess, -guess) == 0
    assert calibration_slope(guess, 9 * guess) == 1.5
    assert calibration_slope(torch.zeros(3), torch.ones(3)) <= 1.5


def test_outcomes_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match=r"outcomes of context 0: entry 1 is 1.5; allowed: 0 to 1"):
        GaussianProcessHead().fit(described(EASY[:2]), torch.tensor([0.0, 1.5]))
    with pytest.raises(ValueError, match=r"shape \[3\]; allowed: one for each of 2 prompts"):
        GaussianProcessHead().fit(described(EASY[:2]), torch.zeros(3))
    with pytest.raises(ValueError, match="nan"):
        RegressionHead().fit(torch.zeros(1, 4), torch.tensor([torch.nan]))


def test_kernel_regression_learns_and_its_log_odds_have_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 10, generator=generator)
    rates = torch.sigmoid(2 * features[:, 0])
    head = RegressionHead()
    head.fit(features[:80], rates[:80])
    assert (head.predict(features[80:]) - rates[80:]).abs().mean() < 0.15
    context, queries = features[:6, :3].double().requires_grad_(), features[6:9, :3].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: log_odds(a, rates[:6].double(), b), (context, queries))


def test_left_out_rows_are_those_of_refits() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, 5, generator=generator).double()
    targets = torch.rand(12, generator=generator).double() - 0.5
    covariance = kernel(features, features, 0.5)
    found = left_out(*torch.linalg.eigh(covariance), targets, torch.tensor([0.5, 4.0]).double())
    for row, noise in enumerate((0.5, 4.0)):
        for gone in range(12):
            kept = [index for index in range(12) if index != gone]
            inner = covariance[kept][:, kept] + noise * torch.eye(11).double()
            expected = targets[gone] - covariance[gone, kept] @ torch.linalg.solve(inner, targets[kept])
            torch.testing.assert_close(found[row, gone], expected)


def test_kernel_regression_is_the_best_of_all_settings() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(40, 6, generator=generator).double()
    rates = torch.rand(40, generator=generator).double()
    own = standardised(features, features)
    errors = {}
    for share in LINEAR:
        for noise in NOISE:
            inverse = torch.linalg.inv(kernel(own, own, share) + noise * torch.eye(40).double())
            errors[share, noise] = float((inverse @ (rates - rates.mean()) / inverse.diagonal()).square().mean())
    head = RegressionHead()
    head.fit(features[:40], rates)
    assert tuple(head.setting) == min(errors, key=lambda key: errors[key])
    queries = torch.randn(7, 6, generator=generator).double()
    expected = solve(features, rates, queries, head.setting).clamp(0.01, 0.99).float()
    torch.testing.assert_close(head.predict(queries), expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tabpfn(tmp_path_factory.mktemp("tabpfn") / "random.ckpt")


def test_tabpfn_equals_the_package_and_reuses_its_context(checkpoint: Path) -> None:
    from tabpfn import TabPFNClassifier

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 12, generator=generator)
    rates = (features[:, 0] > 0).float() * 0.8
    head = TabPFNHead(checkpoint)
    head.fit(features, rates)
    queries = torch.randn(7, 12, generator=generator)
    found = head.predict(queries)
    fitted = head.model
    assert torch.allclose(head.predict(queries[:3]), found[:3], atol=1e-5)
    assert head.model is fitted
    plain = TabPFNClassifier(
        n_estimators=4, model_path=str(checkpoint), device="cpu", random_state=0, inference_precision=torch.float32
    )
    plain.fit(features.numpy(), (rates >= 0.5).long().numpy())
    assert np.abs(found.numpy() - plain.predict_proba(queries.numpy())[:, 1]).max() < 1e-5
    assert found.std() > 1e-3


def test_tabpfn_with_one_class_and_without_a_file(checkpoint: Path, tmp_path: Path) -> None:
    head = TabPFNHead(checkpoint)
    head.fit(torch.randn(9, 5), torch.ones(9))
    assert head.predict(torch.randn(2, 5)).tolist() == pytest.approx([0.95, 0.95])
    with pytest.raises(InputError, match=r"no such file; allowed: a TabPFN checkpoint"):
        TabPFNHead(tmp_path / "absent.ckpt")


def test_gradients_reach_features_through_tabpfn(checkpoint: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(20, 9, generator=generator).requires_grad_()
    queries = torch.randn(4, 9, generator=generator).requires_grad_()
    odds = differentiable_head(checkpoint)(context, (context[:, 0] > 0).float().detach(), queries)
    assert odds.shape == (4,)
    odds.sum().backward()
    assert context.grad is not None
    assert queries.grad is not None
    assert context.grad.abs().sum() > 0 < queries.grad.abs().sum()


def test_tabpfn_gives_the_share_of_successes_where_a_context_has_one_class(tmp_path: Path) -> None:
    log_odds = differentiable_head(write_tabpfn(tmp_path / "random.ckpt"))
    context, queries = torch.randn(9, 8), torch.randn(3, 8, requires_grad=True)
    for outcome, expected in ((0.0, 0.05), (1.0, 0.95)):
        found = log_odds(context, torch.full((9,), outcome), queries)
        torch.testing.assert_close(torch.sigmoid(found), torch.full((3,), expected))
    found.sum().backward()
    assert not queries.grad.any()
