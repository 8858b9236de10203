# SPDX-License-Identifier: Apache-2.0
"""Index scores and their top-k in one pass, over the paged FP8 indexer cache (README.md)."""

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops.launch import dot_dtype, multiprocessors, on_device
from vllm_sm12x.ops.mqa_logits import HEAD_DIM, check_devices, check_heads, check_tensor
from vllm_sm12x.ops.paged_mqa_logits import check_cache
from vllm_sm12x.ops.paged_mqa_topk.config import (
    MAX_BLOCK_M,
    MAX_REGISTERS,
    MERGE_WARPS,
    LaunchConfig,
    capacity,
    choose,
    splits,
)
from vllm_sm12x.ops.paged_mqa_topk.kernel import merge_splits_kernel, paged_mqa_topk_kernel

MAX_TOPK = 2048
MAX_SCRATCH_BYTES = 256 * 2**20


def paged_mqa_topk(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    query_start_loc: torch.Tensor,
    lens: torch.Tensor,
    block_table: torch.Tensor,
    topk: int,
    *,
    out: torch.Tensor | None = None,
    max_scratch_bytes: int = MAX_SCRATCH_BYTES,
) -> torch.Tensor:
    """The positions of each query row's topk largest index scores, never stored as a whole.

    The score of position p for row t, with k and its scale at position p of the row's request:
    scale * sum_h weights[t, h] * relu(q[t, h] . k). NaN counts as -inf. Among equal scores at the
    edge of the selection, any may be taken.

    Args:
        q: e4m3 [T, H, 128], H from 1 to 128, the rows of R requests one after the other; any
            strides with contiguous rows. Its scale is part of `weights`.
        cache: uint8 [blocks, block_size, 1, 132]; a page is block_size * 128 e4m3 values, then
            block_size fp32 scales. Any block size; pages may be padded to a multiple of 4 bytes.
        weights: fp32 [T, H]; any row stride.
        query_start_loc: int32 [R + 1], non-decreasing: request r has the rows from
            query_start_loc[r] to query_start_loc[r + 1]. Rows of no request are padding.
        lens: int32 [T]; row t sees the positions 0 to lens[t] - 1 of its request, in any order of
            lengths. Zero or less: none.
        block_table: int32 [R, pages]; position p is in block block_table[r, p // block_size].
            Positions past the table count as past lens.
        topk: from 1 to 2048.
        out: int32 [T, topk] to write into, any row stride; allocated if None. Every element is
            written.
        max_scratch_bytes: bound of the memory for candidates and a chunk's scores; more rows than
            fit in it are done one part after the other.

    Returns:
        out: a row's positions in no particular order, min(topk, lens) of them, then -1. A padding
        row is all -1.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above, or the
            scratch memory does not hold one row; nothing has been launched or written then.
    """
    return _launch(
        q,
        cache,
        weights,
        query_start_loc,
        lens,
        block_table,
        topk,
        out=out,
        max_scratch_bytes=max_scratch_bytes,
    )


def _launch(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    query_start_loc: torch.Tensor,
    lens: torch.Tensor,
    block_table: torch.Tensor,
    topk: int,
    *,
    out: torch.Tensor | None,
    max_scratch_bytes: int,
    config: LaunchConfig | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    check_tensor("q", q, torch.float8_e4m3fn, (None, None, HEAD_DIM))
    rows, heads, _ = q.shape
    check_heads(heads)
    check_cache(cache)
    check_tensor("weights", weights, torch.float32, (rows, heads))
    check_tensor("block_table", block_table, torch.int32, (None, None))
    requests, pages = block_table.shape
    check_tensor("query_start_loc", query_start_loc, torch.int32, (requests + 1,))
    check_tensor("lens", lens, torch.int32, (rows,))
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk: expected from 1 to {MAX_TOPK}, got {topk}")
    block_h = max(16, triton.next_power_of_2(heads))
    config = config or choose(topk, block_h)
    if out is not None:
        check_tensor("out", out, torch.int32, (rows, topk))
    check_devices(
        q.device,
        cache=cache,
        weights=weights,
        query_start_loc=query_start_loc,
        lens=lens,
        block_table=block_table,
        out=out,
    )
    list_entries = capacity(topk, config.chunk)
    # 4 bytes each: scores of two chunks, ranks and positions of candidates, and their number.
    list_bytes = 4 * (2 * config.chunk + 2 * list_entries + 1)
    if max_scratch_bytes < list_bytes:
        raise ValueError(
            f"max_scratch_bytes: expected at least {list_bytes}, what one row of topk {topk} "
            f"needs, got {max_scratch_bytes}"
        )

    if out is None:
        out = torch.empty((rows, topk), dtype=torch.int32, device=q.device)
    out.fill_(-1)
    if not (rows and requests and pages):
        return out

    block_m = min(MAX_BLOCK_M, config.columns // block_h)
    if num_splits is None:
        sms = multiprocessors("q", q.device)
        keys = pages * cache.shape[1]
        num_splits = splits(triton.cdiv(rows, block_m), keys, topk, sms=sms)
    num_splits = min(num_splits, max_scratch_bytes // list_bytes)
    part = min(rows, max_scratch_bytes // (num_splits * list_bytes))
    shape = (part, num_splits, list_entries)
    scores = torch.empty((part, num_splits, 2 * config.chunk), dtype=torch.float32, device=q.device)
    ranks = torch.empty(shape, dtype=torch.int32, device=q.device)
    positions = torch.empty(shape, dtype=torch.int32, device=q.device)
    counts = torch.empty((part, num_splits), dtype=torch.int32, device=q.device)
    block_k = triton.next_power_of_2(topk)
    with on_device(q.device):
        for start in range(0, rows, part):
            part_rows = min(part, rows - start)
            if num_splits > 1:
                counts.zero_()
            paged_mqa_topk_kernel[(part_rows // block_m + requests, num_splits)](
                q,
                cache,
                weights,
                query_start_loc,
                lens,
                block_table,
                scores,
                ranks,
                positions,
                counts,
                out,
                start,
                part_rows,
                requests,
                pages,
                q.stride(0),
                q.stride(1),
                cache.stride(0),
                weights.stride(0),
                block_table.stride(0),
                out.stride(0),
                BLOCK_SIZE=cache.shape[1],
                NUM_HEADS=heads,
                TOPK=topk,
                SPLITS=num_splits,
                CAPACITY=list_entries,
                BLOCK_M=block_m,
                BLOCK_N=config.block_n,
                BLOCK_H=block_h,
                BLOCK_K=block_k,
                CHUNK=config.chunk,
                DOT_DTYPE=dot_dtype(tl.float8e4nv),
                NUM_STAGES=config.num_stages,
                num_warps=config.num_warps,
                maxnreg=MAX_REGISTERS,
            )
            if num_splits > 1:
                merge_splits_kernel[(part_rows,)](
                    ranks,
                    positions,
                    counts,
                    out,
                    start,
                    out.stride(0),
                    TOPK=topk,
                    SPLITS=num_splits,
                    CAPACITY=list_entries,
                    BLOCK_K=block_k,
                    BLOCK_S=triton.next_power_of_2(num_splits),
                    num_warps=MERGE_WARPS,
                )
    return out
