"""The engines in bfloat16 with the chat template: as close to float32 as transformers in bfloat16 is."""

from pathlib import Path

import pytest
import torch

from tests.with_vllm import tiny_qwen3
from tests.with_vllm.running import KINDS, Running

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_before_and_after_an_update(kind: str, tmp_path: Path) -> None:
    rounded = {version: tiny_qwen3.make_model(version, torch.bfloat16) for version in (0, 1)}
    exact = {version: tiny_qwen3.make_model(version, torch.bfloat16).float() for version in (0, 1)}
    running = Running(kind, tiny_qwen3.write(tmp_path / "model", 0, torch.bfloat16), "bfloat16", chat=True)
    try:
        for version in (0, 1):
            if version:  # float32 from the trainer, rounded by the engine
                running.engine.update_weights(exact[version].state_dict(), version)
            (group,) = running.engine.generate(["12+3="], [8], seed=0, temperature=0.8, max_new_tokens=60)
            vllm_error, own_error = [], []
            for rollout in group:
                assert [tiny_qwen3.LETTERS[token] for token in rollout.prompt_ids] == list("12+3=:a")
                assert set(rollout.versions) == {version}
                reference = tiny_qwen3.logprobs(exact[version], rollout, 0.8)
                vllm_error.append((torch.tensor(rollout.logprobs) - reference).abs())
                own_error.append((tiny_qwen3.logprobs(rounded[version], rollout, 0.8) - reference).abs())
            found, allowed = torch.cat(vllm_error), torch.cat(own_error)
            assert found.mean() < 1.5 * allowed.mean() + 1e-3
            assert found.max() < 2 * allowed.max() + 1e-2
    finally:
        running.close()
