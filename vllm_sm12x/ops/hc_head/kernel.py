# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of hc_head: the gates of hc_pre, and the weighted sum."""

import triton
import triton.language as tl

from vllm_sm12x.ops.hc_pre.kernel import stream_gates


@triton.jit(do_not_specialize=["splits", "parts_stride_s", "parts_stride_t", "sqrsum_stride_s"])
def hc_head_kernel(
    parts_ptr,
    sqrsum_ptr,
    scale_ptr,
    base_ptr,
    streams_ptr,
    out_ptr,
    splits,
    width,
    counted,
    parts_stride_s,
    parts_stride_t,
    sqrsum_stride_s,
    streams_stride_t,
    streams_stride_k,
    rms_eps,
    eps,
    HC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The row of one token, loaded before its gates are worked out. Grid (tokens)."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    in_row = columns < width
    k = tl.arange(0, HC).to(tl.int64)
    row_ptrs = streams_ptr + t * streams_stride_t + k[:, None] * streams_stride_k
    row = tl.load(row_ptrs + columns[None, :], mask=in_row[None, :], other=0.0)
    gates = stream_gates(
        parts_ptr,
        sqrsum_ptr,
        scale_ptr,
        base_ptr,
        t,
        splits,
        counted,
        parts_stride_s,
        parts_stride_t,
        sqrsum_stride_s,
        rms_eps,
        eps,
        HC,
        BLOCK_S,
    )
    mixed = tl.sum(gates[:, None] * row.to(tl.float32), 0)
    tl.store(out_ptr + t * width + columns, mixed.to(tl.bfloat16), mask=in_row)
