"""linear_logprob and linear_policy_loss against TRL's, verl's and Liger's own functions, as they run on a CPU."""

import pytest
import torch

from v05.kernels import linear_logprob, linear_policy_loss
from v05.testing import error_against, offsets_of

pytestmark = pytest.mark.peers
ROWS, FEATURES, COLUMNS, TEMPERATURE = 60, 48, 5003, 0.8
BATCH, WIDTH = 6, 10


def trl(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, TEMPERATURE, 1024, None, 1.0, ("entropy",)
    )
    return logprob, entropy


def verl(hidden, weight, targets):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO(chunk_size=32)(hidden, weight, targets, TEMPERATURE)


def liger(hidden, weight, targets):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Liger

    nll, entropy = Liger.apply(hidden, weight, targets, TEMPERATURE, -100, 1, True)
    return -nll, entropy


def layer():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, FEATURES, generator=rng)
    weight = torch.randn(COLUMNS, FEATURES, generator=rng) / 3
    return hidden, weight, torch.randint(COLUMNS, (ROWS,), generator=rng)


def run(function, hidden, weight, targets, by_entropy):
    """Log-prob, entropy and gradients; by_entropy weighs the entropy's."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logprob, entropy = function(*leaves, targets)
    upstream = torch.linspace(-1, 1, ROWS)
    loss = (logprob * upstream).sum() + (by_entropy * (entropy * upstream).sum() if by_entropy else 0)
    return [x.detach() for x in (logprob, entropy, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("peer", [trl, verl, liger])
@pytest.mark.parametrize("by_entropy", [0.0, 0.3])
def test_log_probs_entropies_and_gradients(peer, by_entropy):
    given = layer()

    def ours(*given):
        return linear_logprob(*given, temperature=TEMPERATURE)

    wide = run(ours, *(x.double() if x.is_floating_point() else x for x in given), by_entropy)
    mine, theirs = run(ours, *given, by_entropy), run(peer, *given, by_entropy)
    for own, other, exact in zip(mine, theirs, wide, strict=True):
        assert error_against(own, exact) < 1e-5
        assert error_against(other, own) < 1e-4


@pytest.mark.parametrize(("kind", "surrogate"), [("dapo", "ppo"), ("cispo", "cispo"), ("sapo", "sapo")])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_liger_s_chunked_loss(kind, surrogate, beta):
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, WIDTH, FEATURES, generator=rng)
    weight = torch.randn(COLUMNS, FEATURES, generator=rng) / 3
    targets = torch.randint(COLUMNS, (BATCH, WIDTH), generator=rng)
    lengths = torch.randint(1, WIDTH + 1, (BATCH,), generator=rng)
    mask = (torch.arange(WIDTH) < lengths[:, None]).float()
    advantages = torch.randn(BATCH, generator=rng)
    logprob = linear_logprob(hidden.flatten(0, 1), weight, targets.flatten()).logprob.view(BATCH, WIDTH)
    old, ref = (logprob + 0.2 * torch.randn(BATCH, WIDTH, generator=rng) for _ in range(2))

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    high = 1.28 if kind == "cispo" else 0.28  # its bound is the ratio itself there, and there is no lower one
    loss = LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=True, loss_type=kind, epsilon_low=0.2, epsilon_high=high
    )
    theirs = loss(*leaves, targets, mask, advantages, ref_per_token_logps=ref, old_per_token_logps=old)[0]
    expected = [theirs.detach(), *torch.autograd.grad(theirs, leaves)]

    inside = mask.bool()
    normaliser = mask.sum(1, keepdim=True) * BATCH if kind == "sapo" else mask.sum()
    packed = [values[inside] for values in (hidden, targets, old, mask / normaliser)]
    own_hidden, own_weight = packed[0].clone().requires_grad_(), weight.clone().requires_grad_()
    ours = linear_policy_loss(
        own_hidden,
        own_weight,
        packed[1],
        packed[2],
        advantages,
        packed[3],
        sequence_offsets=offsets_of(lengths),
        surrogate=surrogate,
        clip_low=1.0 if kind == "cispo" else 0.2,
        clip_high=0.28,
        kl="k3" if beta else "none",
        kl_coef=beta,
        ref_logprobs=ref[inside] if beta else None,
    ).loss
    actual = [ours.detach(), *torch.autograd.grad(ours, (own_hidden, own_weight))]
    expected[1] = expected[1][inside]
    for own, other in zip(actual, expected, strict=True):
        assert error_against(own, other) < 1e-5
