# SPDX-License-Identifier: Apache-2.0
"""hc_post of one layer and hc_prenorm_gemm of the next in one pass (README.md)."""

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops import launch
from vllm_sm12x.ops.hc_post_prenorm_gemm.config import CONFIG, splits_of
from vllm_sm12x.ops.hc_post_prenorm_gemm.kernel import hc_post_prenorm_gemm_kernel
from vllm_sm12x.ops.hc_pre.arguments import check_streams, check_tensor

MAX_ROWS = 32
MAX_STREAMS = 4


def hc_post_prenorm_gemm(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_mix: torch.Tensor,
    comb_mix: torch.Tensor,
    fn: torch.Tensor,
    *,
    streams: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hc_post, and hc_prenorm_gemm of what it writes: the streams are not read again.

    For few tokens: from some 128 on the two ops are as fast. A token's bits depend on T, and its
    streams may differ from hc_post's by one bf16 ulp: where batches must not matter, take the two.

    hc is 1, 2 or 4, and d from 1 to 16384. Tensors have contiguous rows; their other strides may be
    anything. fn counts to 2^-18 of each value, the sums are fp32. Same inputs give the same bits.

    Args:
        x: bf16 [T, d], what the layer gave.
        residual: bf16 [T, hc, d].
        post_mix: fp32 [T, hc].
        comb_mix: fp32 [T, hc, hc].
        fn: fp32 [N, hc * d], N from 1 to 32, finite.
        streams: bf16 [T, hc, d] that takes the streams, no part of another argument; None allocates
            it.
        num_splits: S, at least 1; None: by shape and device (config.py).

    Returns:
        streams, out fp32 [S, T, N] and sqrsum fp32 [S, T]; the sums of out and sqrsum over S are
        the results. A split that is left without a share of the columns holds zeros.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched then.
    """
    tokens, hc, width = check_streams("residual", residual)
    if hc > MAX_STREAMS:
        raise ValueError(
            f"residual: expected [T, hc, d] with hc of at most {MAX_STREAMS}, got {hc}"
        )
    device = residual.device
    check_tensor("x", x, torch.bfloat16, (tokens, width), device)
    check_tensor("post_mix", post_mix, torch.float32, (tokens, hc), device)
    check_tensor("comb_mix", comb_mix, torch.float32, (tokens, hc, hc), device)
    if fn.dim() != 2 or not 1 <= fn.shape[0] <= MAX_ROWS:
        raise ValueError(
            f"fn: expected [N, {hc * width}] with N from 1 to {MAX_ROWS}, got {list(fn.shape)}"
        )
    rows = fn.shape[0]
    check_tensor("fn", fn, torch.float32, (rows, hc * width), device)
    if streams is None:
        streams = residual.new_empty((tokens, hc, width))
    else:
        check_tensor("streams", streams, torch.bfloat16, (tokens, hc, width), device)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: expected at least 1, got {num_splits}")
    sms = launch.multiprocessors("residual", device)

    splits = num_splits or splits_of(tokens, width, sms=sms)
    out = post_mix.new_empty((splits, tokens, rows))
    sqrsum = post_mix.new_empty((splits, tokens))
    if tokens:
        steps = triton.cdiv(width, CONFIG.block_d)
        with launch.on_device(device):
            hc_post_prenorm_gemm_kernel[(triton.cdiv(tokens, CONFIG.block_t) * splits,)](
                x,
                residual,
                post_mix,
                comb_mix,
                fn,
                streams,
                out,
                sqrsum,
                tokens,
                rows,
                width,
                steps,
                splits,
                triton.cdiv(steps, splits),
                x.stride(0),
                residual.stride(0),
                residual.stride(1),
                post_mix.stride(0),
                comb_mix.stride(0),
                comb_mix.stride(1),
                fn.stride(0),
                streams.stride(0),
                streams.stride(1),
                HC=hc,
                BLOCK_T=CONFIG.block_t,
                BLOCK_N=max(16, triton.next_power_of_2(rows)),
                BLOCK_D=CONFIG.block_d,
                DOT_DTYPE=launch.dot_dtype(tl.bfloat16),
                num_warps=CONFIG.num_warps,
                num_stages=CONFIG.num_stages,
            )
    return streams, out, sqrsum
