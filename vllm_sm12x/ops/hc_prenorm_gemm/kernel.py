# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of hc_prenorm_gemm.

Design constraints, please keep them when editing:
- fn is split into two bf16 terms, x is bf16 already: two bf16 dots keep 17 bits of fn where tf32
  keeps 11, at the same MMA work (README.md, "Accuracy").
- Pointers advance with the loop: with a step's offset added to fixed ones, Triton 3.7 and 3.8 spill
  registers.
- A K step's dots start from zero and are added to the sum outside the tensor core, which truncates
  its sums where an fp32 add rounds.
"""

import triton
import triton.language as tl


@triton.jit
def two_terms(fn):
    """fp32 as the sum of two bf16, to 2^-18 of it."""
    high = fn.to(tl.bfloat16)
    return high, (fn - high.to(tl.float32)).to(tl.bfloat16)


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
    k += first * BLOCK_K
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * x_stride_t + k[None, :]
    fn_ptrs = fn_ptr + n.to(tl.int64)[:, None] * fn_stride_n + k[None, :]

    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for _ in range(first, last):
        in_depth = (k < depth)[None, :]
        x = tl.load(x_ptrs, mask=in_tokens & in_depth, other=0.0)
        high, low = two_terms(tl.load(fn_ptrs, mask=in_rows & in_depth, other=0.0))
        operand = x.to(DOT_DTYPE)
        part = tl.dot(operand, tl.trans(low.to(DOT_DTYPE)))
        part = tl.dot(operand, tl.trans(high.to(DOT_DTYPE)), part)
        acc += part
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        k += BLOCK_K
        x_ptrs += BLOCK_K
        fn_ptrs += BLOCK_K

    row = split.to(tl.int64) * tokens + t
    tl.store(out_ptr + row[:, None] * rows + n[None, :], acc, mask=in_tokens & (n < rows)[None, :])
    tl.store(sqrsum_ptr + row, squares, mask=t < tokens)
