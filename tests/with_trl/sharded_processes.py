"""Gradients of a policy sharded by FSDP or DeepSpeed against those of the whole policy. For `torchrun`."""

import os
import sys
from functools import partial
from itertools import product

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
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


class Fsdp:
    """FSDP of the first kind."""

    def __init__(self, model, layer):
        kinds = {type(model.model.layers[0])} | ({torch.nn.Linear} if layer == "wrapped apart" else set())
        wrap = ModuleWrapPolicy(kinds)
        self.model = FullyShardedDataParallel(model, auto_wrap_policy=wrap, use_orig_params=True, device_id=CPU)

    def backward(self, loss):
        (loss * dist.get_world_size()).backward()  # it takes means

    def gradients(self):
        """Every parameter's, by its name in the model that is not sharded."""
        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            named = [
                (name.replace("_fsdp_wrapped_module.", ""), value) for name, value in self.model.named_parameters()
            ]
            return {name: value.grad.clone() for name, value in named}


class Fsdp2(Fsdp):
    """FSDP of the second kind, which leaves a model what it is."""

    def __init__(self, model, layer):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in [*model.model.layers, *([model.lm_head] if layer == "wrapped apart" else [])]:
            fully_shard(part, mesh=mesh)
        self.model = fully_shard(model, mesh=mesh)

    def gradients(self):
        return {name: value.grad.full_tensor() for name, value in self.model.named_parameters()}


class Zero:
    """DeepSpeed, whose third stage shards parameters, the second gradients and the first neither."""

    def __init__(self, model, layer, stage):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": zero}
        optimizer, self.plain = torch.optim.AdamW(model.parameters()), model
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(self, loss):
        self.model.backward(loss * dist.get_world_size())

    def gradients(self):
        return {name: safe_get_full_grad(value) for name, value in self.plain.named_parameters()}


KINDS = {"FSDP": Fsdp, "FSDP2": Fsdp2} | {f"ZeRO-{stage}": partial(Zero, stage=stage) for stage in (1, 2, 3)}


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
    """By op, the sum of a loss over rows that have a `share` of all tokens."""
    by = Divisors(len(rows["ids"]), rows["completion_mask"].sum() / share, 1.0)
    batch = dict(input_ids=rows["ids"], attention_mask=rows["mask"])
    tokens = packed_tokens(args, rows, None, by)
    yield "linear_policy_loss", model(**batch, at_states=partial(linear_loss_of, args), given=tokens).loss
    where = completion_tokens(rows["ids"], rows["mask"], COMPLETION)
    found = model(**batch, at_states=partial(logprobs_of, args), given=where)
    yield "linear_logprob", (found.logprob + 0.5 * found.entropy).sum()


def main(folder: str) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    args = V05Config(output_dir=folder, use_cpu=True, bf16=False, loss_type="dapo")
    mine, everyone = (rows_of(*some) for some in ((rank * ROWS, rank * ROWS + ROWS), (0, None)))
    share = mine["completion_mask"].sum() / everyone["completion_mask"].sum()
    for kind, layer in product(KINDS, LAYERS):
        if kind.startswith("ZeRO") and layer == "wrapped apart":
            continue
        whole = policy(folder, layer == "tied")
        for op, loss in losses(args, whole, everyone, 1):
            loss.backward()
            expected = {name: value.grad.clone() for name, value in whole.named_parameters()}
            whole.zero_grad()
            assert all(float(value.abs().max()) > 1e-3 for value in expected.values()), (layer, op)
            sharded = KINDS[kind](policy(folder, layer == "tied"), layer)
            (own,) = (loss for name, loss in losses(args, sharded.model, mine, share) if name == op)
            sharded.backward(own)
            for name, value in sharded.gradients().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=f"{kind} {layer} {name}")
            if rank == 0:
                print(kind, layer, op, sep=", ", flush=True)
    dist.barrier()
    os._exit(0)  # when Python frees the process group, gloo's threads and the interpreter can wait for each other


if __name__ == "__main__":
    main(sys.argv[1])
