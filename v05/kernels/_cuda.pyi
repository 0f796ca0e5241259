from collections.abc import Sequence

# The native CUDA module: device addresses of contiguous tensors, sizes, a stream, and their dtype: `wide` says float64,
# `dtype` is an index into DTYPES of v05/kernels/segments.py, that of the rewards, the logits or the states.

def shrinkage(
    rewards: int,
    offsets: int,
    prior: int,
    groups: int,
    low: float,
    high: float,
    cost: float,
    k_init: int,
    k_max: int,
    floats: int,
    integers: int,
    more: int,
    rollout_baseline: int,
    advantages: int,
    stream: int,
    dtype: int,
) -> None: ...
def calibrated(
    inputs: Sequence[int],
    n: int,
    groups: int,
    low: float,
    high: float,
    cost: float,
    k_init: int,
    k_max: int,
    decay: float,
    outputs: Sequence[int],
    stream: int,
    dtype: int,
) -> None: ...
def moment_blocks(n: int) -> int: ...
def batch_moments(
    rewards: int,
    lengths: int,
    n: int,
    eps: float,
    partial: int,
    moments: int,
    stream: int,
    dtype: int,
) -> None: ...
def advantage(
    rewards: int,
    offsets: int,
    prior: int,
    lengths: int,
    moments: int,
    groups: int,
    baseline: int,
    scale: int,
    low: float,
    high: float,
    eps: float,
    out: int,
    stream: int,
    dtype: int,
) -> None: ...
def token_logprob(
    dtype: int,
    tensors: Sequence[int],
    sizes: Sequence[int],
    temperature: float,
    outputs: Sequence[int],
    stream: int,
) -> None: ...
def token_logprob_backward(
    dtype: int,
    tensors: Sequence[int],
    sizes: Sequence[int],
    temperature: float,
    saved: Sequence[int],
    gradients: Sequence[int],
    grad_logits: int,
    grad_stride: int,
    stream: int,
) -> None: ...
def policy_blocks(n: int, sequences: int, whole: bool) -> int: ...
def policy_loss(
    inputs: Sequence[int],
    partial: int,
    n: int,
    sequences: int,
    advantage_per_token: bool,
    kinds: Sequence[int],
    numbers: Sequence[float],
    gradient: int,
    loss: int,
    metrics: int,
    stream: int,
    wide: bool,
) -> None: ...
def scale_unless_one(values: int, n: int, factor: int, stream: int, wide: bool) -> None: ...
def attention_scratch(tokens: int, prompts: int, heads: int, count: int) -> int: ...
def attention_backward_scratch(tokens: int, size: int, prompts: int, count: int, heads: int) -> int: ...
def query_attention(
    dtype: int,
    tensors: Sequence[int],
    sizes: Sequence[int],
    eps: float,
    saved: Sequence[int],
    scratch: int,
    features: int,
    stream: int,
) -> None: ...
def query_attention_backward(
    dtype: int,
    tensors: Sequence[int],
    sizes: Sequence[int],
    eps: float,
    saved: Sequence[int],
    grad_features: int,
    scratch: int,
    gradients: Sequence[int],
    stream: int,
) -> None: ...
