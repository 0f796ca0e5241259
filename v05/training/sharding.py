"""Parameters and optimiser state split among processes by FSDP2, and whole again for files and engines."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from v05.policy import Policy
from v05.training.ranks import Ranks


def shard(root: torch.nn.Module, policy: Policy, ranks: Ranks) -> None:
    """Split the parameters of a module among all processes, in place: each layer on its own, then what is left.

    Args:
        root: the module whose forward pass uses the parameters, which has the policy's model in it.
        policy: its model's layers are gathered one at a time, in the policy's dtype; gradients are summed in float32.
        ranks: all processes call this, with equal parameters.
    """
    mesh = init_device_mesh(policy.device.type, (ranks.count,))
    lower = policy.dtype != torch.float32
    precision = MixedPrecisionPolicy(
        param_dtype=policy.dtype if lower else None,
        reduce_dtype=torch.float32 if lower else None,
        cast_forward_inputs=False,
    )
    for layer in layers_of(policy.model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(root, mesh=mesh, mp_policy=precision)


def layers_of(model: Any) -> list[torch.nn.Module]:
    """Return the layers of a language model of transformers: of its lists of modules, the one that holds most."""
    lists = [part for part in model.base_model.modules() if isinstance(part, torch.nn.ModuleList)]
    return list(max(lists, key=lambda each: sum(value.numel() for value in each.parameters()), default=()))


def whole(value: Tensor) -> Tensor:
    """Return a tensor with all its parts; all processes call this for one that is split.

    It is then on the CPU: whole parameters and states of the optimiser, together, need not fit beside one's own part.
    """
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def split_as(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, split as `like` is; every process has it whole."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    placed = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
