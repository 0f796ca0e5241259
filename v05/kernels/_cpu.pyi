# The native CPU module: addresses of contiguous tensors, sizes, and whether they are float64.

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
