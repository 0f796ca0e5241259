"""What rollouts need of vLLM; the only file of this folder that imports it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from v05.errors import InputError
from v05.rollout.streaming import Request

TRANSFER: Final = "v05-file"
MISSING: Final = "this engine needs the package vllm, 0.32 or newer; install it: pip install v05[vllm]"


@dataclass(frozen=True)
class VllmSettings:
    """How to start vLLM.

    Attributes:
        model: folder or name of the model; its weights are version 0.
        dtype: of weights and activations, as vLLM names it.
        max_model_len: longest prompt and answer together, in tokens; None is the model's own limit.
        seed: of draws that have no seed of their own; requests always have one.
        chat: prompts are the user's message in the tokenizer's chat template; otherwise raw text.
        options: more of vLLM's engine arguments, such as `enforce_eager` or `tensor_parallel_size`.
    """

    model: str | Path
    dtype: str = "auto"
    max_model_len: int | None = None
    seed: int = 0
    chat: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def _arguments(settings: VllmSettings) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    return {
        "model": str(settings.model),
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "seed": settings.seed,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled, temperature included
        "scheduling_policy": "priority",
        "weight_transfer_config": WeightTransferConfig(backend=TRANSFER),
        "disable_log_stats": True,
        **settings.options,
    }


def start_async(settings: VllmSettings) -> Any:
    """Return a started `AsyncLLM`, whose core is a process of its own; call it in the event loop that will use it.

    Raises:
        InputError: vLLM is not installed.
    """
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError:
        raise InputError(MISSING) from None
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**_arguments(settings)))


def start_in_process(settings: VllmSettings) -> Any:
    """Return an `LLMEngine` that computes when `step` is called, in this process.

    Raises:
        InputError: vLLM is not installed.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor
    except ImportError:
        raise InputError(MISSING) from None
    # With asynchronous scheduling a step may still be under way when `step` returns, and would mix two versions.
    arguments = EngineArgs(**_arguments(settings), async_scheduling=False)
    config = arguments.create_engine_config()
    return LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)


def release_in_process() -> None:
    """Give back what an in-process engine leaves behind: process groups and cached memory."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def sampling_fields(request: Request) -> dict[str, Any]:
    """Return the fields of vLLM's `SamplingParams` for a request; they are also those of its server.

    Every field that a model's `generation_config.json` could set is given, so that the log-probabilities are those of
    the plain softmax at the request's temperature.
    """
    return {
        "n": 1,
        "temperature": request.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "max_tokens": request.max_new_tokens,
        "logprobs": 0,  # of the sampled token alone
    }


def sampling(request: Request) -> Any:
    """Return vLLM's `SamplingParams` for a request: token ids alone, once, at the end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**sampling_fields(request), detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def priority(request: Request) -> int:
    """Return vLLM's priority of a request; lower is served first."""
    return -1 if request.urgent else 0


def update_request(path: Path) -> Any:
    """Return vLLM's request to load the weights of a safetensors file."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    return WeightTransferUpdateRequest(update_info={"path": str(path)})


def is_death(error: BaseException) -> bool:
    """Return whether `error` says that vLLM's core process is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def register_transfer() -> None:
    """Register the weight transfer `v05-file` with vLLM, which calls this in each of its processes (a general plug-in).

    The trainer writes a safetensors file where the workers can read it (memory, on the same machine); they load it
    through vLLM's layerwise reloading. Unlike vLLM's own transfers it needs no GPU.
    """
    import torch
    from safetensors import safe_open
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class FileUpdate(WeightTransferUpdateInfo):
        path: str

    class FileTransfer(WeightTransferEngine[WeightTransferInitInfo, FileUpdate]):
        init_info_cls = WeightTransferInitInfo
        update_info_cls = FileUpdate
        supports_draft_weight_update = False

        def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            self.expected = {name for name, _ in self.model.named_parameters()}
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: FileUpdate) -> None:
            with safe_open(update_info.path, framework="pt") as file:
                loaded = self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            missing = sorted(self.expected - (loaded or self.expected))
            if missing:
                raise ValueError(f"{len(missing)} of the model's parameters are not among the weights: {missing[:3]}")

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    with contextlib.suppress(ValueError):  # registered already
        WeightTransferEngineFactory.register_engine(TRANSFER, FileTransfer)
