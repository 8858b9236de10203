# SPDX-License-Identifier: Apache-2.0
"""The DeepSeek V4 attention layer, its caches and its metadata. Heavy to import: workers only."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4.common.ops import fused_inv_rope_fp8_quant
from vllm.models.deepseek_v4.nvidia.flashmla import DeepseekV4FlashMLAAttention
from vllm.models.deepseek_v4.sparse_mla import DeepseekV4FlashMLABackend
from vllm.v1.attention.backends.mla import sparse_swa
from vllm.v1.attention.backends.mla.sparse_swa import (
    DeepseekSparseSWABackend,
    DeepseekSparseSWAMetadata,
    DeepseekSparseSWAMetadataBuilder,
    DeepseekV4SWACache,
)

# until: vllm>=0.24, whose builder gives prefill tokens their window's slots itself.
BUILDER_GIVES_PREFILL_SLOTS = "prefill_swa_indices" in {
    field.name for field in dataclasses.fields(DeepseekSparseSWAMetadata)
}

# What PIECEWISE graphs leave to eager execution, of which each release has some.
_BREAK_POINTS = ("attention_impl", "_prepare_and_attn_eager", "_sparse_indexer_and_attn")


class BreakableAttention(DeepseekV4FlashMLAAttention):
    """vLLM's layer, whose break points also break graphs that are switched on after its import.

    until: vllm>=0.33. Before, the decorator asks as the module is imported. Where the config turns
    breakable graphs on later (offline LLM, engine in the same process), it does nothing, and
    PIECEWISE graphs keep the attention of the capture run, which is zero.
    """


def _breaking(name: str) -> Callable[..., None]:
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        eager_break_during_capture(getattr(super(BreakableAttention, self), name))(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _BREAK_POINTS:
    if hasattr(DeepseekV4FlashMLAAttention, _name):
        setattr(BreakableAttention, _name, _breaking(_name))


def current_metadata() -> Any:
    """Attention metadata by layer name of the forward pass in progress; None in a profile run."""
    return get_forward_context().attn_metadata


def inverse_rope_and_quantize(
    o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo RoPE on the last 64 of each head's dims, and quantize runs of 128.

    Args:
        o: bf16 [T, heads, 512].
        positions: int64 [T].
        cos_sin_cache: fp32 [positions, 64].
        groups: G, a divisor of heads.

    Returns:
        e4m3 [T, G, heads / G * 512] and scales fp32 [T, G, heads / G * 4].
    """
    rope_dim = cos_sin_cache.shape[-1]
    return fused_inv_rope_fp8_quant(
        o,
        positions,
        cos_sin_cache,
        n_groups=groups,
        heads_per_group=o.shape[1] // groups,
        nope_dim=o.shape[2] - rope_dim,
        rope_dim=rope_dim,
        tma_aligned_scales=False,
    )


def window_slots(
    metadata: DeepseekSparseSWAMetadata, window: int, indices: torch.Tensor, lens: torch.Tensor
) -> None:
    """Write every token's sliding-window slots, decodes first, where the builder does not.

    Args:
        metadata: of the batch, T tokens.
        window: tokens a query sees, itself included.
        indices: int32 [>= T, 1, window], global slots out, -1 past the length.
        lens: int32 [>= T], out.
    """
    tokens = metadata.num_decode_tokens + metadata.num_prefill_tokens
    sparse_swa._compute_swa_indices_and_lens_kernel[(tokens,)](
        indices,
        indices.stride(0),
        lens,
        window,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.token_to_req_indices,
        metadata.is_valid_token,
        metadata.block_table,
        metadata.block_table.stride(0),
        metadata.block_size,
        TRITON_BLOCK_SIZE=1024,
    )


__all__ = [
    "BUILDER_GIVES_PREFILL_SLOTS",
    "BreakableAttention",
    "DeepseekSparseSWABackend",
    "DeepseekSparseSWAMetadata",
    "DeepseekSparseSWAMetadataBuilder",
    "DeepseekV4FlashMLABackend",
    "DeepseekV4SWACache",
    "current_metadata",
    "inverse_rope_and_quantize",
    "window_slots",
]
