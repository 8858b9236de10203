# SPDX-License-Identifier: Apache-2.0
"""The kernels that vLLM calls where it does not call ours, as it reaches them. Heavy to import."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class Peers:
    """What can be called here; None where it cannot, and `absent` says why by its name.

    Attributes:
        deep_gemm: `vllm_api.deep_gemm`.
        indexer: `gather` and `top_k` of vLLM's indexer.
        flash_mla: vLLM's FlashMLA interface.
        flashinfer: FlashInfer's sparse MLA of DeepSeek V4 for SM12x.
        prefill: what vLLM's prefill does before FlashMLA: `gather` dequantises a request's rows
            into bf16, `combine` makes one list of a token's window and compressed rows.
        rocm: the Triton kernels of vLLM's ROCm backend, which no ROCm is needed for: `decode`,
            `prefill` after the same gather, and `ragged`, which packs their index lists.
        quantize: what vLLM makes of the attention's rows before it projects them.
    """

    deep_gemm: Any = None
    indexer: Any = None
    flash_mla: Any = None
    flashinfer: Any = None
    prefill: Any = None
    rocm: Any = None
    quantize: Any = None
    absent: dict[str, str] = field(default_factory=dict)


def find_peers() -> Peers:
    """Look for each of them; nothing is compiled or launched."""
    peers = Peers()
    for name, find in _FINDERS.items():
        try:
            setattr(peers, name, find())
        except ImportError as error:
            peers.absent[name] = str(error)
    return peers


def _deep_gemm() -> Any:
    from vllm.utils.import_utils import has_deep_gemm

    from vllm_sm12x.vllm_api import deep_gemm

    if not has_deep_gemm():
        raise ImportError("vLLM finds no DeepGEMM that it can import")
    return deep_gemm


def _indexer() -> Any:
    from vllm import _custom_ops as ops

    return SimpleNamespace(
        gather=ops.cp_gather_indexer_k_quant_cache, top_k=ops.top_k_per_row_prefill
    )


def _flash_mla() -> Any:
    from vllm.third_party.flashmla import flash_mla_interface
    from vllm.v1.attention.ops.flashmla import is_flashmla_sparse_supported

    supported, reason = is_flashmla_sparse_supported()
    if not supported:
        raise ImportError(f"FlashMLA does not run here: {reason}")
    return flash_mla_interface


def _flashinfer() -> Any:
    from flashinfer.mla import trtllm_batch_decode_sparse_mla_dsv4

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 12:
        raise ImportError("FlashInfer takes packed caches on SM12x only")
    return trtllm_batch_decode_sparse_mla_dsv4


def _prefill() -> Any:
    from vllm.models.deepseek_v4.common import ops

    return SimpleNamespace(
        gather=ops.dequantize_and_gather_k_cache, combine=ops.combine_topk_swa_indices
    )


def _rocm() -> Any:
    from vllm.v1.attention.ops.rocm_aiter_mla_sparse import (
        build_ragged_indices_from_dense,
        rocm_sparse_attn_decode,
        rocm_sparse_attn_prefill,
    )

    return SimpleNamespace(
        decode=rocm_sparse_attn_decode,
        prefill=rocm_sparse_attn_prefill,
        ragged=build_ragged_indices_from_dense,
    )


def _quantize() -> Any:
    from vllm_sm12x.vllm_api.sparse_mla import inverse_rope_and_quantize

    return inverse_rope_and_quantize


_FINDERS = {
    "deep_gemm": _deep_gemm,
    "indexer": _indexer,
    "flash_mla": _flash_mla,
    "flashinfer": _flashinfer,
    "prefill": _prefill,
    "rocm": _rocm,
    "quantize": _quantize,
}
