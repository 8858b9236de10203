# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA platform with SM12x policy: defaults, refusals, and the worker class.

vLLM calls `apply_config_platform_defaults` before it fixes CUDA-graph sizes, and
`check_and_update_config` after; both run again for each copy of the config, so both are idempotent.
"""

import logging
from typing import Any, ClassVar

from vllm_sm12x import knobs
from vllm_sm12x.integration import cuda_graphs, providers, selection, startup
from vllm_sm12x.log import get_logger, once, say_what_waited
from vllm_sm12x.vllm_api.config import current_config, fp4_indexer_option, selects_keys
from vllm_sm12x.vllm_api.platform import CudaPlatform, resolve_class

WORKER_PATH = "vllm_sm12x.integration.worker.Sm12xWorker"
# The packed cache holds UE8M0-scaled e4m3; vLLM's "fp8" is e4m3.
PACKED_KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_ds_mla")
# A compress-ratio-128 layer keeps one row for 128 tokens, and its kernels take blocks of 256.
BLOCK_SIZE_MULTIPLE = 256
# What mqa_logits and paged_mqa_logits take.
INDEX_HEAD_DIM = 128
# vLLM's own DeepSeek V4 layers ask DeepGEMM for these, whichever attention kernel they run.
DEEP_GEMM_OPS_OF_VLLM = ("mqa_logits", "paged_mqa_logits", "fp8_einsum")

logger = get_logger(__name__)


class Sm12xPlatform(CudaPlatform):  # type: ignore[valid-type, misc]
    """CudaPlatform, and what DeepSeek V4 needs when TRITON_MLA_SPARSE serves it."""

    # Set by the change deep_gemm.gate.
    gates_deep_gemm: ClassVar[bool] = False

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        """Refuse what cannot work, then fill in the defaults that the user left open.

        Raises ValueError.
        """
        say_what_waited()
        super().apply_config_platform_defaults(vllm_config)
        for fill_in in startup.config_defaults:
            fill_in(vllm_config)
        if providers.on_sm12x_path():
            _check_indexer_keys(vllm_config)
        ours = _uses_our_attention(vllm_config)
        if selection.serves(vllm_config) and providers.on_sm12x_path():
            if ours:
                _check_ops(vllm_config)
            else:
                _check_vllms_own(vllm_config)
        if not ours:
            return
        _check_cache(vllm_config.cache_config)
        if vllm_config.cache_config.cache_dtype == "auto":
            vllm_config.cache_config.cache_dtype = "fp8"
            once(logger, logging.INFO, "kv_cache_dtype is fp8: TRITON_MLA_SPARSE has no other.")
        if not knobs.get("VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH"):
            _be_eager(vllm_config, "VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH=0")
        elif knobs.get("VLLM_TRITON_MLA_SPARSE_DUMP"):
            _be_eager(vllm_config, "VLLM_TRITON_MLA_SPARSE_DUMP=1")
        cuda_graphs.note_what_is_open(vllm_config)

    @classmethod
    def support_deep_gemm(cls) -> bool:
        """On the SM12x path: False for DeepSeek V4, whose FP8 linears and experts do without it.

        vLLM asks this one question for linears, experts and scales, and takes yes for a DeepGEMM
        whose SM120 kernels nobody has looked for. The ops of VLLM_SM12X_PROVIDERS ask `providers`
        instead. A DeepSeek V4 layer of vLLM's own needs what vLLM decides; other models get
        DeepGEMM where it can compile a kernel for SM12x.
        """
        if not (cls.gates_deep_gemm and providers.on_sm12x_path()):
            return super().support_deep_gemm()
        vllm_config = current_config()
        if vllm_config is None:
            return False
        if selection.serves(vllm_config):
            return not _our_layer_is_built(vllm_config) and super().support_deep_gemm()
        return super().support_deep_gemm() and providers.probe_deep_gemm("fp8_einsum").yes

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Choose the worker, then let vLLM check. Raises ValueError."""
        _choose_worker(vllm_config)
        super().check_and_update_config(vllm_config)
        for step in startup.config_complete:
            step(vllm_config)


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


def _our_layer_is_built(vllm_config: Any) -> bool:
    """Whether our attention is chosen, and nothing keeps it from being put into the model."""
    left_out = {"worker", "attention.select"} & set(knobs.get("VLLM_SM12X_OFF"))
    worker_cls = vllm_config.parallel_config.worker_cls
    ours = worker_cls in ("auto", WORKER_PATH) or _is_our_worker(worker_cls)
    return selection.choose(vllm_config).ours and ours and not left_out


def _check_indexer_keys(vllm_config: Any) -> None:
    """Refuse an FP4 indexer cache before weights load, with our attention or vLLM's.

    vLLM's own kernels take it on SM10x only, and it says so when the cache is laid out.
    """
    model_config = vllm_config.model_config
    fp4_option = fp4_indexer_option(vllm_config.attention_config)
    if fp4_option is None or model_config is None or not selects_keys(model_config):
        return
    raise ValueError(
        "The ops mqa_logits and paged_mqa_logits have no provider for an FP4 indexer cache: "
        f"{selection.NAME} reads FP8 keys with either provider, and so do vLLM's own layers on "
        f"SM12x; leave {fp4_option} out of --attention-config."
    )


def _check_ops(vllm_config: Any) -> None:
    """Refuse what no provider of our layer's ops can do, before weights load."""
    parallel_config = vllm_config.parallel_config
    for option in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        ranks = getattr(parallel_config, option)
        if ranks > 1:
            raise ValueError(
                f"--{option.replace('_', '-')} {ranks} does not fit {selection.NAME}: its indexer "
                "selects among the keys of one rank and does not merge across ranks; allowed is 1."
            )
    head_dim = getattr(vllm_config.model_config.hf_text_config, "index_head_dim", INDEX_HEAD_DIM)
    if head_dim != INDEX_HEAD_DIM:
        raise ValueError(
            "The ops mqa_logits and paged_mqa_logits have no provider for the model's "
            f"index_head_dim {head_dim}: triton and deep_gemm take {INDEX_HEAD_DIM} only."
        )
    for op in providers.OPS:
        providers.chosen(op)


def _check_vllms_own(vllm_config: Any) -> None:
    """Refuse --attention-backend for a layer of vLLM's whose DeepGEMM is not there.

    VLLM_TRITON_MLA_SPARSE=0 switches this plugin's attention off, so it warns only.
    """
    probes = ((op, providers.probe_deep_gemm(op)) for op in DEEP_GEMM_OPS_OF_VLLM)
    op, probe = next(((op, probe) for op, probe in probes if not probe.yes), (None, None))
    if probe is None:
        return
    message = (
        f"{selection.choose(vllm_config).why} takes vLLM's own DeepSeek V4 layer, whose {op} only "
        f"DeepGEMM serves, but {probe.reason}; {probe.remedy}"
    )
    if vllm_config.attention_config.backend is None:
        once(logger, logging.WARNING, f"{message}, or unset VLLM_TRITON_MLA_SPARSE.")
        return
    raise ValueError(f"{message}, or leave out --attention-backend for {selection.NAME}.")


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
