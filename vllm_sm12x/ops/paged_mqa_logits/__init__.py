# SPDX-License-Identifier: Apache-2.0
"""Index scores of DeepSeek sparse attention over the paged FP8 indexer cache (README.md)."""

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops.launch import dot_dtype, multiprocessors, on_device
from vllm_sm12x.ops.mqa_logits import (
    HEAD_DIM,
    check_devices,
    check_heads,
    check_tensor,
)
from vllm_sm12x.ops.paged_mqa_logits.config import FILL_BLOCK, choose, programs
from vllm_sm12x.ops.paged_mqa_logits.kernel import paged_mqa_logits_kernel

SCALE_BYTES = 4
ROW_BYTES = HEAD_DIM + SCALE_BYTES


def paged_mqa_logits(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_model_len: int,
    clean_logits: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """mqa_logits of decoding requests, whose keys are in pages; -inf past each row's context.

    For row n of request b and position p, with k and its scale at position p of the request:
    out[b * next_n + n, p] = scale * sum_h weights[b * next_n + n, h] * relu(q[b, n, h] . k).

    Args:
        q: e4m3 [B, next_n, H, 128], H from 1 to 128; any strides with contiguous rows. Its scale
            is part of `weights`.
        cache: uint8 [blocks, block_size, 1, 132]; a page is block_size * 128 e4m3 values, then
            block_size fp32 scales. Any block size; pages may be padded to a multiple of 4 bytes.
        weights: fp32 [B * next_n, H]; any row stride.
        context_lens: int32 [B]: row n sees context - next_n + n + 1 positions; or int32
            [B, next_n]: each row's own. Zero or less: the row sees nothing.
        block_table: int32 [B, pages]; position p is in block block_table[b, p // block_size].
            Positions past the table count as past the context.
        max_model_len: columns of the output.
        clean_logits: write -inf past each row's context; if not, what stands there is undefined.
        out: fp32 [B * next_n, max_model_len] to write into, any row stride; allocated if None.
            Every element is written if `clean_logits`.

    Returns:
        out.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched or written then.
    """
    check_tensor("q", q, torch.float8_e4m3fn, (None, None, None, HEAD_DIM))
    requests, next_n, heads, _ = q.shape
    check_heads(heads)
    check_cache(cache)
    check_tensor("weights", weights, torch.float32, (requests * next_n, heads))
    lens_per_row = context_lens.dim() == 2
    lens_shape = (requests, next_n) if lens_per_row else (requests,)
    check_tensor("context_lens", context_lens, torch.int32, lens_shape)
    check_tensor("block_table", block_table, torch.int32, (requests, None))
    if max_model_len < 1:
        raise ValueError(f"max_model_len: expected at least 1, got {max_model_len}")
    if out is not None:
        check_tensor("out", out, torch.float32, (requests * next_n, max_model_len))
    check_devices(
        q.device,
        cache=cache,
        weights=weights,
        context_lens=context_lens,
        block_table=block_table,
        out=out,
    )

    if out is None:
        shape = (requests * next_n, max_model_len)
        out = torch.empty(shape, dtype=torch.float32, device=q.device)
    if requests and next_n:
        padded_heads = max(16, triton.next_power_of_2(heads))
        config = choose(next_n, padded_heads)
        sms = multiprocessors("q", q.device)
        grid = (
            requests,
            programs(config, requests, max_model_len, sms=sms),
            triton.cdiv(next_n, config.block_r),
        )
        with on_device(q.device):
            paged_mqa_logits_kernel[grid](
                q,
                cache,
                weights,
                context_lens,
                block_table,
                out,
                max_model_len,
                block_table.shape[1],
                q.stride(0),
                q.stride(1),
                q.stride(2),
                cache.stride(0),
                weights.stride(0),
                context_lens.stride(0),
                block_table.stride(0),
                out.stride(0),
                BLOCK_SIZE=cache.shape[1],
                NEXT_N=next_n,
                LENS_PER_ROW=lens_per_row,
                CLEAN=clean_logits,
                NUM_HEADS=heads,
                BLOCK_R=config.block_r,
                BLOCK_N=config.block_n,
                BLOCK_H=padded_heads,
                FILL_BLOCK=FILL_BLOCK,
                DOT_DTYPE=dot_dtype(tl.float8e4nv),
                NUM_STAGES=config.num_stages,
                num_warps=config.num_warps,
            )
    return out


def check_cache(cache: torch.Tensor) -> None:
    """Raise unless `cache` is uint8 [blocks, block_size, 1, 132] with packed, aligned pages."""
    if cache.dtype != torch.uint8:
        raise TypeError(f"cache: expected dtype torch.uint8, got {cache.dtype}")
    if cache.dim() != 4 or cache.shape[1] < 1 or cache.shape[2:] != (1, ROW_BYTES):
        raise ValueError(
            f"cache: expected shape [blocks, block_size, 1, {ROW_BYTES}], got {list(cache.shape)}"
        )
    least = cache.shape[1] * ROW_BYTES
    rows_packed = cache.stride(3) == 1 and (cache.shape[1] == 1 or cache.stride(1) == ROW_BYTES)
    pages_apart = cache.shape[0] <= 1 or cache.stride(0) >= least
    if not (rows_packed and pages_apart):
        raise ValueError(
            f"cache: expected strides (>= {least}, {ROW_BYTES}, any, 1), got {cache.stride()}"
        )
    if cache.stride(0) % SCALE_BYTES or cache.data_ptr() % SCALE_BYTES:
        raise ValueError(
            f"cache: pages must start at multiples of {SCALE_BYTES} bytes (the scales are fp32), "
            f"got data_ptr {cache.data_ptr():#x} and page stride {cache.stride(0)}"
        )
