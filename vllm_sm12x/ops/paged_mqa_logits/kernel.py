# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of paged_mqa_logits.

Each request's tiles are shared evenly among the programs of a grid that follows from shapes, by
the context length that the kernel reads: no program walks empty tiles. The columns past the
context are shared the same way, from the last program down, as with a short context the first
programs have the tiles.

Design constraints, please keep them when editing:
- A tile's keys go from the page straight into the dot, with nothing between the load and the dot:
  only then does Triton copy them asynchronously, some tiles ahead.
- The queries of all rows are loaded once, before the loop.
"""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(128)


# Sizes that change from call to call: specialising on them would only compile more variants.
# So would the alignment of what is read one number at a time and begins at any request.
@triton.jit(
    do_not_specialize=["num_columns", "table_width", "lens_stride", "table_stride"],
    do_not_specialize_on_alignment=["context_lens_ptr", "block_table_ptr"],
)
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
    CLEAN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FILL_BLOCK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program's share of one request: BLOCK_R of its rows, all heads, some of the columns."""
    request = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_programs = tl.num_programs(1)
    rows = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    out_row_ptrs = out_ptr + (request * NEXT_N + rows) * out_stride
    table_row_ptr = block_table_ptr + request * table_stride

    # Columns that each row sees. Neither the output nor the block table is left, whatever is asked.
    lens_row_ptr = context_lens_ptr + request * lens_stride
    if LENS_PER_ROW:
        limits = tl.load(lens_row_ptr + rows, mask=rows < NEXT_N, other=0)
    else:
        limits = tl.where(rows < NEXT_N, tl.load(lens_row_ptr) - NEXT_N + rows + 1, 0)
    most = tl.minimum(num_columns.to(tl.int64), table_width.to(tl.int64) * BLOCK_SIZE).to(tl.int32)
    limits = tl.maximum(tl.minimum(limits, most), 0)
    limit = tl.max(limits, 0)
    num_tiles = tl.cdiv(limit, BLOCK_N)

    if CLEAN:
        fill_start = num_tiles * BLOCK_N
        fill_blocks = tl.cdiv(tl.maximum(num_columns - fill_start, 0), FILL_BLOCK)
        fills = tl.cdiv(fill_blocks, num_programs)
        first_fill = (num_programs - 1 - program) * fills
        for block in tl.range(first_fill, tl.minimum(first_fill + fills, fill_blocks)):
            n = fill_start + block * FILL_BLOCK + tl.arange(0, FILL_BLOCK)
            tl.store(
                out_row_ptrs[:, None] + n[None, :],
                tl.full((BLOCK_R, FILL_BLOCK), -float("inf"), tl.float32),
                mask=(rows < NEXT_N)[:, None] & (n < num_columns)[None, :],
            )

    share = tl.cdiv(num_tiles, num_programs)
    first = program * share
    last = tl.minimum(first + share, num_tiles)
    if first >= last:
        return

    # All rows' heads side by side on the dot's N axis.
    column = tl.arange(0, BLOCK_R * BLOCK_H)
    row = tl.program_id(2) * BLOCK_R + column // BLOCK_H
    head = column % BLOCK_H
    present = (row < NEXT_N) & (head < NUM_HEADS)
    d = tl.arange(0, HEAD_DIM)
    q = tl.load(
        q_ptr
        + request * q_stride_b
        + (row.to(tl.int64) * q_stride_n + head * q_stride_h)[:, None]
        + d[None, :],
        mask=present[:, None],
        other=0.0,
    ).to(DOT_DTYPE)
    weights = tl.load(
        weights_ptr + (request * NEXT_N + row) * weights_stride + head, mask=present, other=0.0
    )

    keys_ptr = cache_ptr.to(tl.pointer_type(tl.float8e4nv))
    scales_ptr = (cache_ptr + BLOCK_SIZE * HEAD_DIM).to(tl.pointer_type(tl.float32))
    for tile in tl.range(first, last, num_stages=NUM_STAGES):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_page = n % BLOCK_SIZE
        if BLOCK_SIZE % BLOCK_N == 0:
            page = tl.load(table_row_ptr + tile * BLOCK_N // BLOCK_SIZE).to(tl.int64)
            start = page * page_stride
            # What lies past the context is in the page, and is not used: no mask is needed.
            k = tl.load(keys_ptr + start + (in_page * HEAD_DIM)[:, None] + d[None, :])
            k_scale = tl.load(scales_ptr + start // 4 + in_page)
        else:
            valid = n < limit
            page = tl.load(table_row_ptr + n // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
            start = page * page_stride
            k = tl.load(
                keys_ptr + (start + in_page * HEAD_DIM)[:, None] + d[None, :],
                mask=valid[:, None],
                other=0.0,
            )
            k_scale = tl.load(scales_ptr + start // 4 + in_page, mask=valid, other=0.0)
        scores = tl.dot(k.to(DOT_DTYPE), tl.trans(q))  # [BLOCK_N, BLOCK_R * BLOCK_H]
        scores = tl.maximum(scores, 0.0) * weights[None, :]
        logits = tl.sum(tl.reshape(scores, (BLOCK_N, BLOCK_R, BLOCK_H)), 2) * k_scale[:, None]
        seen = n[:, None] < limits[None, :]
        tl.store(
            out_row_ptrs[None, :] + n[:, None],
            tl.where(seen, logits, -float("inf")),
            mask=(n < num_columns)[:, None] & (rows < NEXT_N)[None, :],
        )
