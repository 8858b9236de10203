# SPDX-License-Identifier: Apache-2.0
"""The kernel of fp8_einsum for many tokens on Hopper GPUs: wgmma, fed by TMA.

kernel.py copies by cp.async: threads work out an address and a bound for every 16 bytes. By
calculation the MMAs of a step, 64 x 128 x 128, take 2,048 cycles on SM12x, which hide that, and 256
by Hopper's wgmma. Here TMA copies whole blocks, zeros where they are out of bounds. T = 4,096 with
8 groups, natively on an H200, takes 273 us, and kernel.py 353 with SM12x's tile.

Constraints, please keep them when editing:
- The descriptors' first axis is the group, of which a block has one: Triton drops a leading axis
  of 1 where it loads, and wgmma reads both operands where TMA has put them.
- Descriptors are made on the host for each call, some 10 us, which many tokens hide. A CUDA graph
  captures them by value, as it does addresses and strides.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_sm12x.ops.fp8_einsum.kernel import SCALE_BLOCK, as_float


@triton.jit(do_not_specialize=["tokens", "col_tiles", "row_tiles", "steps"])
def fp8_einsum_hopper_kernel(
    a_rows,
    a_scale_ptr,
    b_rows,
    b_scale_ptr,
    out_ptr,
    tokens,
    cols,
    col_tiles,
    row_tiles,
    steps,
    a_scale_stride_t,
    a_scale_stride_g,
    a_scale_stride_k,
    b_scale_stride_g,
    b_scale_stride_d,
    b_scale_stride_k,
    out_stride_t,
    out_stride_g,
    A_E8M0: tl.constexpr,
    B_E8M0: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """One [BLOCK_T, BLOCK_D] tile of one group. `a_rows` is [G, T, R], `b_rows` [G, D, R].

    Grid (groups * row tiles * column tiles); the rows of a band of BAND row tiles run fastest, so
    that B's columns are read once a band, and the band's A stays in L2.
    """
    pid = tl.program_id(0)
    group = pid // (row_tiles * col_tiles)
    pid %= row_tiles * col_tiles
    first_row_tile = pid // (BAND * col_tiles) * BAND
    pid %= BAND * col_tiles
    band = tl.minimum(row_tiles - first_row_tile, BAND)
    row_tile = first_row_tile + pid % band
    col_tile = pid // band

    t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    d = col_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    in_rows = t < tokens
    row = t.to(tl.int64)
    g = group.to(tl.int64)
    a_scale_ptrs = a_scale_ptr + g * a_scale_stride_g + row * a_scale_stride_t
    b_scale_ptr += g * b_scale_stride_g
    b_scale_ptr += (col_tile * BLOCK_D // SCALE_BLOCK).to(tl.int64) * b_scale_stride_d
    a_scale = tl.load(a_scale_ptrs, mask=in_rows, other=0)
    b_scale = tl.load(b_scale_ptr)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for step in range(steps):
        a = a_rows.load([group, row_tile * BLOCK_T, step * SCALE_BLOCK])
        b = b_rows.load([group, col_tile * BLOCK_D, step * SCALE_BLOCK])
        a = a.reshape(BLOCK_T, SCALE_BLOCK).to(DOT_DTYPE)
        b = b.reshape(BLOCK_D, SCALE_BLOCK).to(DOT_DTYPE)
        scale = as_float(a_scale, A_E8M0) * as_float(b_scale, B_E8M0)
        # One step ahead, as Triton pipelines only the loads that feed a dot.
        more = step + 1 < steps
        a_scale_ptrs += a_scale_stride_k
        b_scale_ptr += b_scale_stride_k
        a_scale = tl.load(a_scale_ptrs, mask=in_rows & more, other=0)
        b_scale = tl.load(b_scale_ptr, mask=more, other=0)
        part = tl.dot(a, tl.trans(b))
        acc += part * scale[:, None]

    tl.store(
        out_ptr + g * out_stride_g + row[:, None] * out_stride_t + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (d < cols)[None, :],
    )


def descriptor(values: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of e4m3 [G, rows, R] that TMA can describe: blocks of one group, `rows` rows, one step."""
    return TensorDescriptor.from_tensor(values, [1, rows, SCALE_BLOCK.value])
