# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of hc_pre, and the part of it that hc_head shares.

Design constraints, please keep them when editing:
- One launch has two kinds of program: the mixes of BLOCK_T tokens, and the row of one token. The
  Sinkhorn iterations are a chain of 2 * iterations dependent sums; they run beside the rows.
- A row's loads come first, so that they are in flight while its gates are worked out, and it stays
  in registers until it is written: the norm needs no second pass.
- A row is a tuple of its streams, added one after the other: for a sum over a [HC, BLOCK_D] the
  assembler has all of it in fp32 at once, twice the registers.
- The loops over parts add them up by element and only then are parts summed: no barrier between
  loads, and nothing of a reduction to keep during a loop.
"""

import triton
import triton.language as tl


@triton.jit
def stream_gates(
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
    HC: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The weight of each stream of token t in the layer's input: fp32 [HC]."""
    s = tl.arange(0, BLOCK_S)
    k = tl.arange(0, HC)
    parts_ptr += t * parts_stride_t
    sqrsum_ptr += t
    logits = tl.zeros((BLOCK_S, HC), tl.float32)
    squares = tl.zeros((BLOCK_S,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        here = first + s < splits
        split = (first + s).to(tl.int64)
        parts_ptrs = parts_ptr + split[:, None] * parts_stride_s + k[None, :]
        logits += tl.load(parts_ptrs, mask=here[:, None], other=0.0)
        squares += tl.load(sqrsum_ptr + split * sqrsum_stride_s, mask=here, other=0.0)
    logits = tl.sum(logits, 0) * tl.rsqrt(tl.sum(squares, 0) / counted + rms_eps)
    return tl.sigmoid(logits * tl.load(scale_ptr) + tl.load(base_ptr + k)) + eps


@triton.jit
def _write_mixes(
    parts_ptr,
    sqrsum_ptr,
    scale_ptr,
    base_ptr,
    post_ptr,
    comb_ptr,
    block,
    tokens,
    splits,
    counted,
    parts_stride_s,
    parts_stride_t,
    sqrsum_stride_s,
    rms_eps,
    sinkhorn_eps,
    post_mult,
    sinkhorn_iters,
    HC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """post_mix and comb_mix of BLOCK_T tokens."""
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.arange(0, BLOCK_S)
    j = tl.arange(0, HC)
    cell = j[:, None] * HC + j[None, :]
    in_tokens = t < tokens

    squares = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
    post = tl.zeros((BLOCK_S, BLOCK_T, HC), tl.float32)
    comb = tl.zeros((BLOCK_S, BLOCK_T, HC, HC), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = (first + s).to(tl.int64)[:, None]
        here = (split < splits) & in_tokens[None, :]
        sqrsum_ptrs = sqrsum_ptr + split * sqrsum_stride_s + t[None, :]
        post_ptrs = parts_ptr + split * parts_stride_s + t[None, :] * parts_stride_t + HC
        comb_ptrs = post_ptrs + HC
        squares += tl.load(sqrsum_ptrs, mask=here, other=0.0)
        post += tl.load(post_ptrs[:, :, None] + j[None, None, :], mask=here[:, :, None], other=0.0)
        comb += tl.load(
            comb_ptrs[:, :, None, None] + cell[None, None, :, :],
            mask=here[:, :, None, None],
            other=0.0,
        )

    rms = tl.rsqrt(tl.sum(squares, 0) / counted + rms_eps)[:, None]
    post = tl.sum(post, 0) * rms * tl.load(scale_ptr + 1) + tl.load(base_ptr + HC + j)[None, :]
    post_ptrs = post_ptr + t[:, None] * HC + j[None, :]
    tl.store(post_ptrs, tl.sigmoid(post) * post_mult, mask=in_tokens[:, None])

    comb = tl.sum(comb, 0) * rms[:, :, None] * tl.load(scale_ptr + 2)
    comb += tl.load(base_ptr + 2 * HC + cell)[None, :, :]
    comb = tl.exp(comb - tl.max(comb, 2, keep_dims=True))
    comb = comb / tl.sum(comb, 2, keep_dims=True) + sinkhorn_eps
    comb = comb / (tl.sum(comb, 1, keep_dims=True) + sinkhorn_eps)
    for _ in range(1, sinkhorn_iters):
        comb = comb / (tl.sum(comb, 2, keep_dims=True) + sinkhorn_eps)
        comb = comb / (tl.sum(comb, 1, keep_dims=True) + sinkhorn_eps)
    comb_ptrs = comb_ptr + t[:, None, None] * (HC * HC) + cell[None, :, :]
    tl.store(comb_ptrs, comb, mask=in_tokens[:, None, None])


# What is not worth a variant of its own is not specialised: parts are read 4 bytes at a time.
@triton.jit(
    do_not_specialize=[
        "tokens",
        "splits",
        "parts_stride_s",
        "parts_stride_t",
        "sqrsum_stride_s",
        "sinkhorn_iters",
    ]
)
def hc_pre_kernel(
    parts_ptr,
    sqrsum_ptr,
    scale_ptr,
    base_ptr,
    residual_ptr,
    norm_weight_ptr,
    expanded_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    tokens,
    splits,
    width,
    counted,
    parts_stride_s,
    parts_stride_t,
    sqrsum_stride_s,
    residual_stride_t,
    residual_stride_k,
    expanded_stride_t,
    expanded_stride_k,
    rms_eps,
    pre_eps,
    sinkhorn_eps,
    post_mult,
    norm_eps,
    sinkhorn_iters,
    HC: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_EXPANDED: tl.constexpr,
):
    """Grid (ceil(tokens / BLOCK_T) + tokens): the mixes first, as they take longest.

    `counted` is how many elements sqrsum is the sum of. STREAMS is HC, or 1 for a residual that is
    the same in all streams.
    """
    mixing = tl.cdiv(tokens, BLOCK_T)
    if tl.program_id(0) < mixing:
        _write_mixes(
            parts_ptr,
            sqrsum_ptr,
            scale_ptr,
            base_ptr,
            post_ptr,
            comb_ptr,
            tl.program_id(0),
            tokens,
            splits,
            counted,
            parts_stride_s,
            parts_stride_t,
            sqrsum_stride_s,
            rms_eps,
            sinkhorn_eps,
            post_mult,
            sinkhorn_iters,
            HC,
            BLOCK_T,
            BLOCK_S,
        )
    else:
        t = (tl.program_id(0) - mixing).to(tl.int64)
        columns = tl.arange(0, BLOCK_D)
        in_row = columns < width
        row_ptrs = residual_ptr + t * residual_stride_t + columns
        rows = ()  # type: tuple[tl.tensor, ...]
        for _ in tl.static_range(STREAMS):
            rows += (tl.load(row_ptrs, mask=in_row, other=0.0),)
            row_ptrs += residual_stride_k
        if HAS_NORM:
            norm_weight = tl.load(norm_weight_ptr + columns, mask=in_row, other=0.0)
        if HAS_EXPANDED:  # before the gates, so that the row need not be kept for it
            expanded_ptrs = expanded_ptr + t * expanded_stride_t + columns
            for _ in tl.static_range(HC):
                tl.store(expanded_ptrs, rows[0], mask=in_row)
                expanded_ptrs += expanded_stride_k
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
            pre_eps,
            HC,
            BLOCK_S,
        )
        mixed = tl.zeros((BLOCK_D,), tl.float32)
        for k in tl.static_range(HC):
            gate = tl.sum(tl.where(tl.arange(0, HC) == k, gates, 0.0), 0)
            mixed += gate * rows[min(k, STREAMS - 1)].to(tl.float32)
        if HAS_NORM:
            rms = tl.rsqrt(tl.sum(mixed * mixed, 0) / width + norm_eps)
            # The norm sees what a bf16 layer before it would have written.
            mixed = mixed.to(tl.bfloat16).to(tl.float32) * rms * norm_weight.to(tl.float32)
        tl.store(out_ptr + t * width + columns, mixed.to(tl.bfloat16), mask=in_row)
