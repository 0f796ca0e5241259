"""Losses and gradients of a policy sharded by FSDP, in each of its ways, against those of the whole. For `torchrun`."""

import os
import sys
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import Qwen3ForCausalLM

from v05.integrations.trl import V05Config
from v05.integrations.trl.linear_loss import linear_loss_of, packed_tokens
from v05.integrations.trl.logprobs import completion_tokens, logprobs_of
from v05.integrations.trl.loss import Divisors
from v05.integrations.trl.states import end_at_states

PROMPT, COMPLETION, ROWS = 3, 5, 2  # rows of a process
CPU = torch.device("cpu")
LAYERS = ("apart", "wrapped apart", "tied")  # output layers


def policy(folder, tied):
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, tie_word_embeddings=tied)
    end_at_states(model)
    return model


def second_kind(model, head_apart):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in [*model.model.layers, *([model.lm_head] if head_apart else [])]:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def first_kind(model, head_apart):
    kinds = {type(model.model.layers[0])} | ({torch.nn.Linear} if head_apart else set())
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(kinds), use_orig_params=True, device_id=CPU
    )


def whole_gradients(model):
    """Every parameter's gradient, by its name in the model that is not sharded."""
    if not isinstance(model, FullyShardedDataParallel):
        return {name: value.grad.full_tensor() for name, value in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        plain = [(name.replace("_fsdp_wrapped_module.", ""), value) for name, value in model.named_parameters()]
        return {name: value.grad.clone() for name, value in plain}


def rows_of(first, last):
    rng = torch.Generator().manual_seed(0)
    rows = ROWS * dist.get_world_size()
    ids = torch.randint(2, 20, (rows, PROMPT + COMPLETION), generator=rng)
    inside = torch.arange(COMPLETION) < torch.tensor([5, 1, 3, 4])[:rows, None]
    mask = torch.cat([torch.ones(rows, PROMPT), inside], 1).long()
    old = -3 + 0.1 * torch.randn(rows, COMPLETION, generator=rng)
    made = dict(ids=ids, mask=mask, completion_ids=ids[:, PROMPT:], completion_mask=inside.long())
    made |= dict(old_per_token_logps=old, advantages=torch.linspace(-1, 1, rows))
    return {name: value[first:last] for name, value in made.items()}


def losses(args, model, rows, share):
    """By op, a loss of which a process has a `share`."""
    by = Divisors(len(rows["ids"]), rows["completion_mask"].sum() / share, 1.0)
    batch = dict(input_ids=rows["ids"], attention_mask=rows["mask"])
    tokens = packed_tokens(args, rows, None, by)
    yield "linear_policy_loss", model(**batch, at_states=partial(linear_loss_of, args), given=tokens).loss
    where = completion_tokens(rows["ids"], rows["mask"], COMPLETION)
    found = model(**batch, at_states=partial(logprobs_of, args), given=where)
    yield "linear_logprob", (found.logprob + 0.5 * found.entropy).sum() * share


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    args = V05Config(output_dir=folder, use_cpu=True, bf16=False, loss_type="dapo")
    mine = rows_of(rank * ROWS, rank * ROWS + ROWS)
    tokens = rows_of(0, None)["completion_mask"].sum()
    for (kind, shard), layer in product({"FSDP": first_kind, "FSDP2": second_kind}.items(), LAYERS):
        tied, head_apart = layer == "tied", layer == "wrapped apart"
        whole = policy(folder, tied)
        for op, loss in losses(args, whole, rows_of(0, None), 1):
            loss.backward()
            expected = {name: value.grad.clone() for name, value in whole.named_parameters()}
            whole.zero_grad()
            sharded = shard(policy(folder, tied), head_apart)
            share = mine["completion_mask"].sum() / tokens if op == "linear_policy_loss" else 1
            (own,) = (loss for name, loss in losses(args, sharded, mine, share) if name == op)
            (own * count).backward()  # FSDP takes means
            for name, value in whole_gradients(sharded).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=f"{kind} {layer} {name}")
            if rank == 0:
                print(kind, layer, op, sep=", ", flush=True)
    dist.barrier()
    os._exit(0)  # when Python frees the process group, gloo's threads and the interpreter can wait for each other


if __name__ == "__main__":
    main(sys.argv[1])
