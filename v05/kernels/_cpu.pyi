# The native CPU module: addresses of contiguous tensors, sizes, and whether they are float64.

from collections.abc import Sequence

def groups_valid(
    rewards: int, offsets: int, prior: int, n: int, groups: int, low: float, high: float, wide: bool
) -> bool: ...
def shrinkage(
    rewards: int,
    offsets: int,
    prior: int,
    n: int,
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
    wide: bool,
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
    wide: bool,
) -> None: ...
def advantage(
    rewards: int,
    offsets: int,
    prior: int,
    lengths: int,
    n: int,
    groups: int,
    baseline: int,
    scale: int,
    low: float,
    high: float,
    eps: float,
    out: int,
    wide: bool,
) -> None: ...
def token_logprob(
    dtype: int,
    logits: int,
    stride: int,
    count: int,
    vocabulary: int,
    targets: int,
    ignore_index: int,
    temperatures: int,
    temperature: float,
    logprob: int,
    entropy: int,
    max: int,
    log_sum: int,
) -> int: ...
def token_logprob_backward(
    dtype: int,
    logits: int,
    stride: int,
    count: int,
    vocabulary: int,
    targets: int,
    ignore_index: int,
    temperatures: int,
    temperature: float,
    entropy: int,
    max: int,
    log_sum: int,
    grad_logprob: int,
    grad_entropy: int,
    grad_logits: int,
) -> None: ...
def matrix_product(
    dtype: int,
    wide_left: bool,
    left: Sequence[int],
    right: Sequence[int],
    rows: int,
    columns: int,
    depth: int,
    out: int,
    stride: int,
    adds: bool,
) -> None: ...
def join_slices(
    fields: Sequence[int],
    slices: int,
    rows: int,
    temperatures: int,
    temperature: float,
    joined: int,
    wide: bool,
) -> None: ...
def policy_loss(
    inputs: tuple[int, int, int, int, int, int, int, int],
    n: int,
    sequences: int,
    advantage_per_token: bool,
    kinds: Sequence[int],
    numbers: Sequence[float],
    loss: int,
    gradient: int,
    metrics: int,
    wide: bool,
) -> bool: ...
def query_attention(
    dtype: int,
    tensors: Sequence[int],
    sizes: Sequence[int],
    eps: float,
    saved: Sequence[int],
    features: int,
) -> bool: ...
def query_attention_backward(
    dtype: int,
    tensors: Sequence[int],
    sizes: Sequence[int],
    eps: float,
    saved: Sequence[int],
    grad_features: int,
    gradients: Sequence[int],
) -> None: ...
