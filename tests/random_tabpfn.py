"""A small TabPFN checkpoint of random weights in TabPFN's own format; real ones cannot be fetched in a test."""

from pathlib import Path

import torch


def write_tabpfn(file: Path, seed: int = 0) -> Path:
    """Write a checkpoint of architecture 2.5 with two layers, and return its path."""
    from tabpfn.architectures import tabpfn_v2_5

    config = {
        "name": "TabPFN-v2.5",
        "emsize": 24,
        "nlayers": 2,
        "nhead": 3,
        "features_per_group": 3,
        "num_thinking_rows": 2,
        "max_num_classes": 10,
        "num_buckets": 10,
    }
    parsed, _ = tabpfn_v2_5.parse_config(config)
    generator = torch.Generator().manual_seed(seed)
    state = tabpfn_v2_5.get_architecture(parsed).state_dict()
    # Fresh weights have zeros in the last matrix of every block, which hides the context.
    state = {
        name: torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5 if value.dim() == 2 else value
        for name, value in state.items()
    }
    torch.save({"state_dict": state, "config": config, "architecture_name": "base"}, file)
    return file
