# SPDX-License-Identifier: Apache-2.0
"""What runs inside vLLM's worker: a logits processor, and a question to the model."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_sm12x.ops.sparse_mla.reference import sparse_mla_reference

FORCED_TOKENS = "forced_tokens"
# Query tokens whose gathered fp32 rows the oracle holds at one time.
ORACLE_CHUNK = 256
PER_TOKEN = ("q", "swa_indices", "swa_lens", "extra_indices", "extra_lens", "request_ids", "out")


class ForcedTokens(AdapterLogitsProcessor):
    """Make a request generate the token ids in `SamplingParams.extra_args["forced_tokens"]`.

    With logprobs_mode "raw_logprobs" vLLM takes the log-probabilities before any processor, so
    those of the forced tokens are the model's own: teacher forcing through the decode path.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = (params.extra_args or {}).get(FORCED_TOKENS)
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits.fill_(-torch.inf)
            logits[forced[len(output_ids)]] = 0.0
            return logits

        return force


def attention_classes(model: torch.nn.Module) -> list[str]:
    """Full names of the classes of the model's DeepSeek V4 attention layers."""
    classes = {type(module) for module in model.modules() if hasattr(module, "forward_mqa")}
    return sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)


def memory_in_use(worker: Any) -> dict[str, int]:
    """Bytes of one worker's GPU.

    weights: what loading the model took. kv_cache: its buffers, each counted once. profile_peak:
    what vLLM's profiling run took beyond the weights. allocated, peak, reserved: by torch's
    allocator, the peak since it was last reset. free: on the device.
    """
    torch.cuda.synchronize()
    caches = torch.utils._pytree.tree_leaves(list(worker.model_runner.kv_caches))
    storages = [cache.untyped_storage() for cache in caches]
    from vllm.v1.worker.workspace import current_workspace_manager

    # vLLM's shared workspaces have no public accessor.
    workspaces = current_workspace_manager()._current_workspaces
    return {
        "weights": int(worker.model_runner.model_memory_usage),
        "kv_cache": sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()),
        "profile_peak": int(worker.peak_activation_memory),
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "workspace": sum(buffer.nbytes for buffer in workspaces if buffer is not None),
        "reserved": torch.cuda.memory_reserved(),
        "free": torch.cuda.mem_get_info()[0],
    }


def reset_peak_memory(worker: Any) -> None:
    """Let `memory_in_use` count the peak from here on."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()


def attend_by_oracle(*, policy: Any = None, **arguments: Any) -> None:
    """`sparse_mla` as our attention layer calls it, computed by the fp32 oracle. Eager only."""
    for start in range(0, arguments["q"].shape[0], ORACLE_CHUNK):
        rows = slice(start, start + ORACLE_CHUNK)
        chunk = {
            name: value[rows] if name in PER_TOKEN else value for name, value in arguments.items()
        }
        sparse_mla_reference(**chunk)


def use_oracle() -> None:
    """Put the oracle into our attention layer, in this process."""
    from vllm_sm12x.integration import sparse_mla as layer

    layer.sparse_mla = attend_by_oracle
