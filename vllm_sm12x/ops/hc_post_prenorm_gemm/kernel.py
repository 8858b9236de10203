# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of hc_post_prenorm_gemm.

Design constraints, please keep them when editing:
- A step's tiles of x and of the residual are loop-carried: they are on their way to registers while
  the step before multiplies. That also keeps the mixing in the layout of the loads; with loads in
  the step that uses them, Triton mixes a second time in the layout of the dot's operand.
- All streams of a step are mixed before the first of them is multiplied: two barriers a step, where
  one stream after the other has eight.
- The sum over streams has hc_post's order, and what is multiplied is what is written: bf16.
- The dots are those of hc_prenorm_gemm, for the reasons there.
"""

import triton
import triton.language as tl

from vllm_sm12x.ops.hc_prenorm_gemm.kernel import two_terms


@triton.jit(do_not_specialize=["tokens", "num_splits", "steps", "steps_per_split"])
def hc_post_prenorm_gemm_kernel(
    x_ptr,
    residual_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    streams_ptr,
    out_ptr,
    sqrsum_ptr,
    tokens,
    rows,
    width,
    steps,
    num_splits,
    steps_per_split,
    x_stride_t,
    residual_stride_t,
    residual_stride_k,
    post_stride_t,
    comb_stride_t,
    comb_stride_k,
    fn_stride_n,
    streams_stride_t,
    streams_stride_k,
    HC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """All streams of BLOCK_T tokens over one share of the columns. Grid (row tiles * splits)."""
    split = tl.program_id(0) % num_splits
    t = (tl.program_id(0) // num_splits).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    d = first * BLOCK_D + tl.arange(0, BLOCK_D)
    in_tokens = t < tokens
    in_rows = (n < rows)[:, None]

    post = ()  # type: tuple[tl.tensor, ...]
    comb = ()  # type: tuple[tl.tensor, ...]
    for j in tl.static_range(HC):
        post += (tl.load(post_ptr + t * post_stride_t + j, mask=in_tokens, other=0.0)[:, None],)
        comb_ptrs = comb_ptr + t * comb_stride_t + j
        for _ in tl.static_range(HC):
            comb += (tl.load(comb_ptrs, mask=in_tokens, other=0.0)[:, None],)
            comb_ptrs += comb_stride_k

    x_ptrs = x_ptr + t[:, None] * x_stride_t + d[None, :]
    residual_ptrs = residual_ptr + t[:, None] * residual_stride_t + d[None, :]
    streams_ptrs = streams_ptr + t[:, None] * streams_stride_t + d[None, :]
    fn_ptrs = fn_ptr + n.to(tl.int64)[:, None] * fn_stride_n + d[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    inside = in_tokens[:, None] & ((d < width) & (first < last))[None, :]
    next_x = tl.load(x_ptrs, mask=inside, other=0.0)
    next_residual = ()  # type: tuple[tl.tensor, ...]
    stream_ptrs = residual_ptrs
    for _ in tl.static_range(HC):
        next_residual += (tl.load(stream_ptrs, mask=inside, other=0.0),)
        stream_ptrs += residual_stride_k
    for step in range(first, last):
        in_width = (d < width)[None, :]
        inside = in_tokens[:, None] & in_width
        x = next_x.to(tl.float32)
        residual = ()  # type: tuple[tl.tensor, ...]
        for k in tl.static_range(HC):
            residual += (next_residual[k].to(tl.float32),)
        streams = ()  # type: tuple[tl.tensor, ...]
        squared = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        stream_ptrs = streams_ptrs
        for j in tl.static_range(HC):
            kept = comb[j * HC] * residual[0]
            for k in tl.static_range(1, HC):
                kept += comb[j * HC + k] * residual[k]
            stream = (post[j] * x + kept).to(tl.bfloat16)
            tl.store(stream_ptrs, stream, mask=inside)
            stream_ptrs += streams_stride_k
            streams += (stream,)
            wide = stream.to(tl.float32)
            squared += wide * wide
        squares += tl.sum(squared, 1)

        d += BLOCK_D
        x_ptrs += BLOCK_D
        residual_ptrs += BLOCK_D
        streams_ptrs += BLOCK_D
        inside = in_tokens[:, None] & ((d < width) & (step + 1 < last))[None, :]
        next_x = tl.load(x_ptrs, mask=inside, other=0.0)
        next_residual = ()
        stream_ptrs = residual_ptrs
        for _ in tl.static_range(HC):
            next_residual += (tl.load(stream_ptrs, mask=inside, other=0.0),)
            stream_ptrs += residual_stride_k

        for j in tl.static_range(HC):
            fn = tl.load(fn_ptrs + j * width, mask=in_rows & in_width, other=0.0)
            high, low = two_terms(fn)
            operand = streams[j].to(DOT_DTYPE)
            part = tl.dot(operand, tl.trans(low.to(DOT_DTYPE)))
            part = tl.dot(operand, tl.trans(high.to(DOT_DTYPE)), part)
            acc += part
        fn_ptrs += BLOCK_D

    row = split.to(tl.int64) * tokens + t
    out_ptrs = out_ptr + row[:, None] * rows + n[None, :]
    tl.store(out_ptrs, acc, mask=in_tokens[:, None] & (n < rows)[None, :])
    tl.store(sqrsum_ptr + row, squares, mask=in_tokens)
