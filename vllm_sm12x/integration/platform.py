# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA platform with SM12x policy: defaults, refusals, and the worker class.

vLLM calls `apply_config_platform_defaults` before it fixes CUDA-graph sizes, and
`check_and_update_config` after; both run again for each copy of the config, so both are idempotent.
"""

import logging
from typing import Any

from vllm_sm12x import knobs
from vllm_sm12x.integration import selection
from vllm_sm12x.log import get_logger, once
from vllm_sm12x.vllm_api.platform import CudaPlatform, resolve_class

WORKER_PATH = "vllm_sm12x.integration.worker.Sm12xWorker"
# The packed cache holds UE8M0-scaled e4m3; vLLM's "fp8" is e4m3.
PACKED_KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_ds_mla")
# A compress-ratio-128 layer keeps one row for 128 tokens, and its kernels take blocks of 256.
BLOCK_SIZE_MULTIPLE = 256

logger = get_logger(__name__)


class Sm12xPlatform(CudaPlatform):  # type: ignore[valid-type, misc]
    """CudaPlatform, and what DeepSeek V4 needs when TRITON_MLA_SPARSE serves it."""

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        """Refuse what cannot work, then fill in the defaults that the user left open.

        Raises ValueError.
        """
        super().apply_config_platform_defaults(vllm_config)
        if not _uses_our_attention(vllm_config):
            return
        _check_cache(vllm_config.cache_config)
        if vllm_config.cache_config.cache_dtype == "auto":
            vllm_config.cache_config.cache_dtype = "fp8"
            once(logger, logging.INFO, "kv_cache_dtype is fp8: TRITON_MLA_SPARSE has no other.")
        if not knobs.get("VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH"):
            _be_eager(vllm_config, "VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH=0")
        elif knobs.get("VLLM_TRITON_MLA_SPARSE_DUMP"):
            _be_eager(vllm_config, "VLLM_TRITON_MLA_SPARSE_DUMP=1")

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Choose the worker, then let vLLM check. Raises ValueError."""
        _choose_worker(vllm_config)
        super().check_and_update_config(vllm_config)


def _uses_our_attention(vllm_config: Any) -> bool:
    if vllm_config.model_config is None:
        return False
    choice = selection.choose(vllm_config)
    if selection.serves(vllm_config):
        return choice.ours
    if choice.ours and vllm_config.attention_config.backend is not None:
        raise ValueError(
            f"--attention-backend {selection.NAME} serves "
            f"{' and '.join(selection.SERVED_ARCHITECTURES)}; the model is "
            f"{', '.join(vllm_config.model_config.architectures)}."
        )
    return False


def _check_cache(cache_config: Any) -> None:
    if cache_config.cache_dtype not in PACKED_KV_CACHE_DTYPES:
        raise ValueError(
            f"--kv-cache-dtype {cache_config.cache_dtype} does not fit {selection.NAME}, whose "
            f"cache is packed fp8; allowed is {', '.join(PACKED_KV_CACHE_DTYPES)}."
        )
    # Once the engine has laid out its caches, block_size is the smallest of theirs, not the user's.
    laid_out = cache_config.num_gpu_blocks is not None
    by_user = cache_config.user_specified_block_size and not laid_out
    if by_user and cache_config.block_size % BLOCK_SIZE_MULTIPLE:
        raise ValueError(
            f"--block-size {cache_config.block_size} does not fit DeepSeek V4's compressed caches; "
            f"allowed are multiples of {BLOCK_SIZE_MULTIPLE}."
        )


def _be_eager(vllm_config: Any, why: str) -> None:
    # enforce_eager alone comes too late here for the mode: vLLM has already looked at it.
    from vllm_sm12x.vllm_api.compilation import CompilationMode, CUDAGraphMode

    vllm_config.model_config.enforce_eager = True
    vllm_config.compilation_config.mode = CompilationMode.NONE
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    once(logger, logging.WARNING, f"No torch.compile and no CUDA graphs, because of {why}.")


def _choose_worker(vllm_config: Any) -> None:
    """Our worker for "auto". What the user gave instead stays, and says what that costs."""
    parallel_config = vllm_config.parallel_config
    if "worker" in knobs.get("VLLM_SM12X_OFF"):
        obstacle = "VLLM_SM12X_OFF leaves out worker"
    elif parallel_config.worker_cls in ("auto", WORKER_PATH):
        parallel_config.worker_cls = WORKER_PATH
        return
    else:
        obstacle = f"--worker-cls {parallel_config.worker_cls} is no subclass of {WORKER_PATH}"
    if not _uses_our_attention(vllm_config) or _is_our_worker(parallel_config.worker_cls):
        return
    choice = selection.choose(vllm_config)
    message = f"{obstacle}, so {selection.NAME} cannot be put into the model"
    if choice.explicit:
        raise ValueError(f"{message}, though it was asked for by {choice.why}.")
    once(logger, logging.WARNING, f"{message}; vLLM's own attention is used.")


def _is_our_worker(path: str) -> bool:
    from vllm_sm12x.integration.worker import Sm12xWorker

    return path != "auto" and issubclass(resolve_class(path), Sm12xWorker)
