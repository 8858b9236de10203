# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of paged_mqa_logits.

Each request's tiles are shared evenly among the programs of a grid that follows from shapes, by
the context length that the kernel reads: no program walks empty tiles. The columns past the
context are shared the same way, from the last program down, as with a short context the first
programs have the tiles.
"""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(128)


@triton.jit
def _load_pages(tile, limit, table_row_ptr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids [BLOCK_N] of one tile's keys; those at or past `limit` are not looked up."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(table_row_ptr + n // BLOCK_SIZE, mask=n < limit, other=0)


@triton.jit
def _load_keys(
    tile,
    limit,
    page,
    cache_ptr,
    page_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys e4m3 [BLOCK_N, 128] and their scales fp32 [BLOCK_N] of one tile."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < limit
    row = n % BLOCK_SIZE
    start = page.to(tl.int64) * page_stride
    d = tl.arange(0, HEAD_DIM)
    k = tl.load(
        cache_ptr + (start + row * HEAD_DIM)[:, None] + d[None, :], mask=valid[:, None], other=0
    )
    scale_ptr = (cache_ptr + start + BLOCK_SIZE * HEAD_DIM).to(tl.pointer_type(tl.float32))
    return k, tl.load(scale_ptr + row, mask=valid, other=0.0)


# Sizes that change from call to call: specialising on them would only compile more variants.
@triton.jit(do_not_specialize=["num_columns", "table_width", "lens_stride", "table_stride"])
def paged_mqa_logits_kernel(
    q_ptr,
    cache_ptr,
    weights_ptr,
    context_lens_ptr,
    block_table_ptr,
    out_ptr,
    num_columns,
    table_width,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    page_stride,
    weights_stride,
    lens_stride,
    table_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    NEXT_N: tl.constexpr,
    LENS_PER_ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FILL_BLOCK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program's share of one request: all its NEXT_N rows, all heads, some of the columns."""
    request = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_programs = tl.num_programs(1)
    first_row = request * NEXT_N
    table_row_ptr = block_table_ptr + request * table_stride

    # Columns that any row sees. Neither the output nor the block table is left, whatever is asked.
    r = tl.arange(0, BLOCK_R)
    if LENS_PER_ROW:
        lens = tl.load(context_lens_ptr + request * lens_stride + r, mask=r < NEXT_N, other=0)
        limit = tl.max(lens, 0)
    else:
        limit = tl.load(context_lens_ptr + request * lens_stride)
    most = tl.minimum(num_columns.to(tl.int64), table_width.to(tl.int64) * BLOCK_SIZE).to(tl.int32)
    limit = tl.maximum(tl.minimum(limit, most), 0)
    num_tiles = tl.cdiv(limit, BLOCK_N)

    fill_start = num_tiles * BLOCK_N
    fill_blocks = tl.cdiv(tl.maximum(num_columns - fill_start, 0), FILL_BLOCK)
    fills = tl.cdiv(fill_blocks, num_programs)
    first_fill = (num_programs - 1 - program) * fills
    for block in tl.range(first_fill, tl.minimum(first_fill + fills, fill_blocks)):
        n = fill_start + block * FILL_BLOCK + tl.arange(0, FILL_BLOCK)
        for next_token in tl.range(0, NEXT_N):
            tl.store(
                out_ptr + (first_row + next_token) * out_stride + n,
                tl.full((FILL_BLOCK,), -float("inf"), tl.float32),
                mask=n < num_columns,
            )

    share = tl.cdiv(num_tiles, num_programs)
    first = program * share
    last = tl.minimum(first + share, num_tiles)
    if first >= last:
        return

    # While tile i is multiplied, the keys of tile i+1 and the page ids of tile i+2 are in flight.
    page = _load_pages(first, limit, table_row_ptr, BLOCK_SIZE, BLOCK_N)
    raw, scale = _load_keys(first, limit, page, cache_ptr, page_stride, BLOCK_SIZE, BLOCK_N)
    page = _load_pages(first + 1, limit, table_row_ptr, BLOCK_SIZE, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    for tile in tl.range(first, last, num_stages=1):
        k = raw.to(tl.float8e4nv, bitcast=True).to(DOT_DTYPE)
        k_scale = scale
        raw, scale = _load_keys(tile + 1, limit, page, cache_ptr, page_stride, BLOCK_SIZE, BLOCK_N)
        page = _load_pages(tile + 2, limit, table_row_ptr, BLOCK_SIZE, BLOCK_N)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        for next_token in tl.range(0, NEXT_N, num_stages=NUM_STAGES):
            row = first_row + next_token
            logits = tl.zeros((BLOCK_N,), tl.float32)
            for start in tl.static_range(0, NUM_HEADS, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                q_row_ptr = q_ptr + request * q_stride_b + (row - first_row) * q_stride_n
                q = tl.load(
                    q_row_ptr + h[:, None] * q_stride_h + d[None, :],
                    mask=(h < NUM_HEADS)[:, None],
                    other=0.0,
                ).to(DOT_DTYPE)
                weights = tl.load(
                    weights_ptr + row * weights_stride + h,
                    mask=h < NUM_HEADS,
                    other=0.0,
                )
                scores = tl.dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_H]
                logits += tl.sum(tl.maximum(scores, 0.0) * weights[None, :], 1)
            row_lens_ptr = context_lens_ptr + request * lens_stride
            if LENS_PER_ROW:
                row_limit = tl.load(row_lens_ptr + next_token)
            else:
                row_limit = tl.load(row_lens_ptr) - NEXT_N + next_token + 1
            tl.store(
                out_ptr + row * out_stride + n,
                tl.where(n < tl.minimum(row_limit, limit), logits * k_scale, -float("inf")),
                mask=n < num_columns,
            )
