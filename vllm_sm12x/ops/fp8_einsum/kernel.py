# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of fp8_einsum.

Design constraints, please keep them when editing:
- One K step is one scale block, so a step's dot starts from zero and is scaled as a whole.
- Triton pipelines only the loads that feed a dot. So the scales of a narrow tile, whose steps are
  shorter than a load, are all loaded before the loop (SCALES_FIRST, the number of steps rounded up
  to a power of two); those of a wide tile are one step ahead.
- A tile's columns lie within one 128-column scale block, so B's scale is a scalar.
"""

import triton
import triton.language as tl

SCALE_BLOCK = tl.constexpr(128)

# Sizes that change from call to call: specialising on them would only compile more variants.
_RUNTIME_SIZES = ["tokens", "col_tiles", "row_tiles", "steps", "steps_per_split", "num_splits"]


@triton.jit
def as_float(scale, E8M0: tl.constexpr):
    """A scale as fp32; an e8m0 byte b is 2^(b-127), 0 a subnormal of fp32, 255 a NaN."""
    if not E8M0:
        return scale
    bits = scale.to(tl.int32) << 23
    bits = tl.where(scale == 0, 0x00400000, bits)
    bits = tl.where(scale == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def fp8_einsum_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    out_ptr,
    tokens,
    cols,
    col_tiles,
    row_tiles,
    steps,
    steps_per_split,
    a_stride_t,
    a_stride_g,
    a_scale_stride_t,
    a_scale_stride_g,
    a_scale_stride_k,
    b_stride_g,
    b_stride_d,
    b_scale_stride_g,
    b_scale_stride_d,
    b_scale_stride_k,
    out_stride_s,
    out_stride_t,
    out_stride_g,
    A_E8M0: tl.constexpr,
    B_E8M0: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALES_FIRST: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """One [BLOCK_T, BLOCK_D] tile of one group over one share of R.

    Grid (groups * row tiles * column tiles, splits), columns fastest: programs that share rows of A
    run next to each other, and one group's B stays in L2.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    col_tile = pid % col_tiles
    row_tile = pid // col_tiles % row_tiles
    g = (pid // col_tiles // row_tiles).to(tl.int64)

    t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    d = col_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, SCALE_BLOCK)
    row = t.to(tl.int64)
    first = split * steps_per_split
    # Steps count from 0 here: with bounds kept from `first` on, Triton 3.7 spills on sm_121.
    own_steps = tl.minimum(steps_per_split, steps - first)
    start = first.to(tl.int64)
    a_ptrs = a_ptr + g * a_stride_g + start * SCALE_BLOCK + row[:, None] * a_stride_t + k[None, :]
    b_ptrs = b_ptr + g * b_stride_g + start * SCALE_BLOCK
    b_ptrs += d.to(tl.int64)[:, None] * b_stride_d + k[None, :]
    a_scale_ptrs = a_scale_ptr + g * a_scale_stride_g + row * a_scale_stride_t
    a_scale_ptrs += start * a_scale_stride_k
    b_scale_ptr += g * b_scale_stride_g + start * b_scale_stride_k
    b_scale_ptr += (col_tile * BLOCK_D // SCALE_BLOCK).to(tl.int64) * b_scale_stride_d

    in_rows = t < tokens
    in_cols = d < cols
    if SCALES_FIRST:
        j = tl.arange(0, SCALES_FIRST)
        there = j < own_steps
        a_scales = tl.load(
            a_scale_ptrs[:, None] + j[None, :] * a_scale_stride_k,
            mask=in_rows[:, None] & there[None, :],
            other=0,
        )
        b_scales = tl.load(b_scale_ptr + j * b_scale_stride_k, mask=there, other=0)
        scales = as_float(a_scales, A_E8M0) * as_float(b_scales, B_E8M0)[None, :]
    else:
        a_scale = tl.load(a_scale_ptrs, mask=in_rows & (own_steps > 0), other=0)
        b_scale = tl.load(b_scale_ptr, mask=own_steps > 0, other=0)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for step in range(own_steps):
        a = tl.load(a_ptrs, mask=in_rows[:, None], other=0.0)
        b = tl.load(b_ptrs, mask=in_cols[:, None], other=0.0)
        if SCALES_FIRST:
            scale = tl.sum(tl.where(j[None, :] == step, scales, 0.0), 1)
        else:
            scale = as_float(a_scale, A_E8M0) * as_float(b_scale, B_E8M0)
            more = step + 1 < own_steps
            a_scale_ptrs += a_scale_stride_k
            b_scale_ptr += b_scale_stride_k
            a_scale = tl.load(a_scale_ptrs, mask=in_rows & more, other=0)
            b_scale = tl.load(b_scale_ptr, mask=more, other=0)
        part = tl.dot(a.to(DOT_DTYPE), tl.trans(b.to(DOT_DTYPE)))
        acc += part * scale[:, None]
        a_ptrs += SCALE_BLOCK
        b_ptrs += SCALE_BLOCK

    out_ptr += split.to(tl.int64) * out_stride_s + g * out_stride_g
    tl.store(
        out_ptr + row[:, None] * out_stride_t + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_cols[None, :],
    )


@triton.jit(do_not_specialize=["num_splits"])
def fp8_einsum_merge_kernel(
    partial_ptr,
    out_ptr,
    groups,
    cols,
    num_splits,
    partial_stride_s,
    partial_stride_t,
    partial_stride_g,
    out_stride_t,
    out_stride_g,
    BLOCK_D: tl.constexpr,
):
    """Sum the fp32 parts of one (token, group) in split order, over BLOCK_D columns."""
    t = (tl.program_id(0) // groups).to(tl.int64)
    g = (tl.program_id(0) % groups).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ptrs = partial_ptr + t * partial_stride_t + g * partial_stride_g + d
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(num_splits):
        acc += tl.load(ptrs, mask=d < cols, other=0.0)
        ptrs += partial_stride_s
    tl.store(
        out_ptr + t * out_stride_t + g * out_stride_g + d,
        acc.to(out_ptr.dtype.element_ty),
        mask=d < cols,
    )
