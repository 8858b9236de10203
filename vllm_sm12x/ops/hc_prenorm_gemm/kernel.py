# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of hc_prenorm_gemm.

Design constraints, please keep them when editing:
- fn is split into three bf16 terms that together are its fp32 value, and x is bf16 already: three
  bf16 dots are an fp32 product, at a quarter of the MMA work of tf32x3 (README.md, "Accuracy").
- A K step's dots start from zero and are added to the sum outside the tensor core, which truncates
  its sums where an fp32 add rounds.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "num_splits", "steps", "steps_per_split"])
def hc_prenorm_gemm_kernel(
    x_ptr,
    fn_ptr,
    out_ptr,
    sqrsum_ptr,
    tokens,
    rows,
    depth,
    steps,
    num_splits,
    steps_per_split,
    x_stride_t,
    fn_stride_n,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """BLOCK_T tokens by all rows of fn over one share of K. Grid (row tiles * splits)."""
    split = tl.program_id(0) % num_splits
    t = tl.program_id(0) // num_splits * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_tokens = (t < tokens)[:, None]
    in_rows = (n < rows)[:, None]
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * x_stride_t + k[None, :]
    fn_ptrs = fn_ptr + n.to(tl.int64)[:, None] * fn_stride_n + k[None, :]

    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for step in range(first, last):
        start = step * BLOCK_K
        in_depth = (start + k < depth)[None, :]
        x = tl.load(x_ptrs + start, mask=in_tokens & in_depth, other=0.0)
        fn = tl.load(fn_ptrs + start, mask=in_rows & in_depth, other=0.0)
        high = fn.to(tl.bfloat16)
        rest = fn - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        operand = x.to(DOT_DTYPE)
        part = tl.dot(operand, tl.trans(low.to(DOT_DTYPE)))
        part = tl.dot(operand, tl.trans(middle.to(DOT_DTYPE)), part)
        part = tl.dot(operand, tl.trans(high.to(DOT_DTYPE)), part)
        acc += part
        wide = x.to(tl.float32)
        squares += wide * wide

    row = split.to(tl.int64) * tokens + t
    tl.store(out_ptr + row[:, None] * rows + n[None, :], acc, mask=in_tokens & (n < rows)[None, :])
    tl.store(sqrsum_ptr + row, tl.sum(squares, 1), mask=t < tokens)
