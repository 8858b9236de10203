# SPDX-License-Identifier: Apache-2.0
"""The sparse indexer of DeepSeek V4: caches, metadata, top-k. Heavy to import: workers only."""

from typing import Any

import torch
from vllm import _custom_ops, envs
from vllm.model_executor.layers import sparse_attn_indexer as layer_module
from vllm.models.deepseek_v4.attention import DeepseekV4IndexerCache
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.mla import indexer as builder_module
from vllm.v1.attention.backends.mla.indexer import (
    DeepseekV4IndexerBackend,
    DeepseekV32IndexerMetadata,
    DeepseekV32IndexerMetadataBuilder,
)

# Where the layer's constructor and the metadata builder ask whether there is a DeepGEMM.
HAS_DEEP_GEMM = "has_deep_gemm"
ASKING_MODULES = (layer_module, builder_module)


def max_logits_bytes() -> int:
    """What index scores may take at one time."""
    return envs.VLLM_SPARSE_INDEXER_MAX_LOGITS_MB * 2**20


def gather_keys(cache: torch.Tensor, chunk: Any, keys: torch.Tensor, scales: torch.Tensor) -> None:
    """Copy the chunk's keys from the paged cache, one request after the other.

    Args:
        cache: uint8 [blocks, block_size, 132].
        keys: e4m3 [N, 128], out.
        scales: uint8 [N, 4], one fp32 each, out.
    """
    _custom_ops.cp_gather_indexer_k_quant_cache(
        cache, keys, scales, chunk.block_table, chunk.cu_seq_lens
    )


def top_k_of_prefill(
    logits: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, indices: torch.Tensor
) -> None:
    """Write each row's positions, from its ks on, of the largest scores inside [ks, ke)."""
    rows, top_k = indices.shape
    _custom_ops.top_k_per_row_prefill(
        logits, ks, ke, indices, rows, logits.stride(0), logits.stride(1), top_k
    )


def top_k_of_decode(
    logits: torch.Tensor, next_n: int, lens: torch.Tensor, indices: torch.Tensor
) -> None:
    """Write each row's positions of the largest scores below its length.

    By vLLM's kernel of one block a row (from 200,000 columns on of ten, which take 80 bytes of
    memory for each row and selected key). Its persistent kernel, which stock vLLM takes, fell back
    to one with 128 KiB of shared memory when it was given more than fits the GPU at a time, and no
    SM12x multiprocessor has that (vLLM #45317); now it falls back to this one (#54110, in 0.30).
    """
    rows, top_k = indices.shape
    _custom_ops.top_k_per_row_decode(
        logits, next_n, lens, indices, rows, logits.stride(0), logits.stride(1), top_k
    )


__all__ = [
    "ASKING_MODULES",
    "HAS_DEEP_GEMM",
    "AttentionCGSupport",
    "DeepseekV32IndexerMetadata",
    "DeepseekV32IndexerMetadataBuilder",
    "DeepseekV4IndexerBackend",
    "DeepseekV4IndexerCache",
    "gather_keys",
    "max_logits_bytes",
    "top_k_of_decode",
    "top_k_of_prefill",
]
