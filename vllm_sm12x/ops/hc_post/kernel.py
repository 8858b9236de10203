# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of hc_post.

Keep BLOCK_D at 256 elements a warp: then a thread has the same columns of every stream, and the
sums over streams need no other thread.
"""

import triton
import triton.language as tl


@triton.jit
def hc_post_kernel(
    x_ptr,
    residual_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    width,
    x_stride_t,
    residual_stride_t,
    residual_stride_k,
    post_stride_t,
    comb_stride_t,
    comb_stride_k,
    out_stride_t,
    out_stride_k,
    HC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of all streams of one token. Grid (tokens * ceil(width / BLOCK_D))."""
    blocks = tl.cdiv(width, BLOCK_D)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < width
    k = tl.arange(0, HC).to(tl.int64)
    residual_ptrs = residual_ptr + t * residual_stride_t + k[:, None] * residual_stride_k
    residual = tl.load(residual_ptrs + columns[None, :], mask=in_row[None, :], other=0.0)
    x = tl.load(x_ptr + t * x_stride_t + columns, mask=in_row, other=0.0).to(tl.float32)
    residual = residual.to(tl.float32)
    comb_ptrs = comb_ptr + t * comb_stride_t + k * comb_stride_k
    out_ptr += t * out_stride_t + columns
    for j in tl.static_range(HC):
        kept = tl.sum(tl.load(comb_ptrs + j)[:, None] * residual, 0)
        mixed = tl.load(post_ptr + t * post_stride_t + j) * x + kept
        tl.store(out_ptr, mixed.to(tl.bfloat16), mask=in_row)
        out_ptr += out_stride_k
