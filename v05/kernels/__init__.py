"""Kernels over ragged tensors: shrinkage, advantages, policy losses, log-probs and the adapter's attention."""

from v05.kernels.advantage.op import group_advantage
from v05.kernels.linear_logprob.op import linear_logprob
from v05.kernels.linear_logprob.policy_op import linear_policy_loss
from v05.kernels.policy_loss.covariance import select_by_covariance
from v05.kernels.policy_loss.op import PolicyLoss, policy_loss
from v05.kernels.query_attention.op import query_attention
from v05.kernels.query_attention.rules import AttentionWeights
from v05.kernels.shrinkage.op import Shrinkage, shrinkage
from v05.kernels.token_logprob.op import TokenLogprob, token_logprob

__all__ = [
    "AttentionWeights",
    "PolicyLoss",
    "Shrinkage",
    "TokenLogprob",
    "group_advantage",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
    "query_attention",
    "select_by_covariance",
    "shrinkage",
    "token_logprob",
]
