# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of mqa_logits."""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(128)


# Sizes that change from call to call: specialising on them would only compile more variants.
# Limits are read one number at a time, and begin at any row of the batch.
@triton.jit(
    do_not_specialize=["num_rows", "num_keys"],
    do_not_specialize_on_alignment=["ks_ptr", "ke_ptr"],
)
def mqa_logits_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    weights_ptr,
    ks_ptr,
    ke_ptr,
    out_ptr,
    num_rows,
    num_keys,
    q_stride_m,
    q_stride_h,
    k_stride_n,
    weights_stride_m,
    out_stride_m,
    NUM_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """BLOCK_M query rows by BLOCK_N keys, all heads; every element of that tile is written.

    The keys stand on the MMA's M axis and stay in registers; only Q streams.
    """
    # The tiles of one block of rows are neighbours in the grid: they share its queries in L2.
    key_blocks = tl.cdiv(num_keys, BLOCK_N)
    first_row = (tl.program_id(0) // key_blocks).to(tl.int64) * BLOCK_M
    first_key = (tl.program_id(0) % key_blocks) * BLOCK_N
    n = first_key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows

    ks = tl.load(ks_ptr + rows, mask=row_mask, other=2147483647)
    ke = tl.load(ke_ptr + rows, mask=row_mask, other=0)
    # An empty row must not widen what the tile's rows see.
    lowest = tl.min(tl.where(ks < ke, ks, 2147483647), 0)
    highest = tl.max(tl.where(ks < ke, ke, 0), 0)
    if (first_key >= highest) | (first_key + BLOCK_N <= lowest):
        tl.store(
            out_ptr + rows[:, None] * out_stride_m + n[None, :],
            tl.full((BLOCK_M, BLOCK_N), -float("inf"), tl.float32),
            mask=row_mask[:, None] & (n < num_keys)[None, :],
        )
        return

    k = tl.load(
        k_ptr + n.to(tl.int64)[:, None] * k_stride_n + d[None, :],
        mask=(n < num_keys)[:, None],
        other=0.0,
    ).to(DOT_DTYPE)
    k_scale = tl.load(k_scale_ptr + n, mask=n < num_keys, other=0.0)
    count = tl.minimum(num_rows - first_row, BLOCK_M).to(tl.int32)
    for m in tl.range(0, count, num_stages=NUM_STAGES):
        row = first_row + m
        logits = tl.zeros((BLOCK_N,), tl.float32)
        for start in tl.static_range(0, NUM_HEADS, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            q = tl.load(
                q_ptr + row * q_stride_m + h[:, None] * q_stride_h + d[None, :],
                mask=(h < NUM_HEADS)[:, None],
                other=0.0,
            ).to(DOT_DTYPE)
            weights = tl.load(
                weights_ptr + row * weights_stride_m + h, mask=h < NUM_HEADS, other=0.0
            )
            scores = tl.dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_H]
            logits += tl.sum(tl.maximum(scores, 0.0) * weights[None, :], 1)
        inside = (n >= tl.load(ks_ptr + row)) & (n < tl.load(ke_ptr + row))
        tl.store(
            out_ptr + row * out_stride_m + n,
            tl.where(inside, logits * k_scale, -float("inf")),
            mask=n < num_keys,
        )
