# SPDX-License-Identifier: Apache-2.0
"""Mixing logits and squared norm of DeepSeek V4's hyper-connections in one pass (README.md)."""

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops import launch
from vllm_sm12x.ops.hc_prenorm_gemm.config import choose, splits_of
from vllm_sm12x.ops.hc_prenorm_gemm.kernel import hc_prenorm_gemm_kernel

MAX_ROWS = 32


def hc_prenorm_gemm(
    x: torch.Tensor,
    fn: torch.Tensor,
    *,
    num_splits: int | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x.float() @ fn.T and the sum of squares of each row of x, both as S parts of K.

    fn counts to 2^-18 of each value, the sums are fp32. Same inputs give the same bits.

    Args:
        x: bf16 [T, K], any K; any stride with contiguous rows.
        fn: fp32 [N, K], N from 1 to 32, finite; any stride with contiguous rows.
        num_splits: S, at least 1; None: by shape and device (config.py).
        batch_invariant: a token's bits, and S unless it is given, do not depend on T; slower.

    Returns:
        out fp32 [S, T, N] and sqrsum fp32 [S, T]; their sums over S are the results. A split that
        is left without a share of K holds zeros.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched then.
    """
    _check_rows("x", x, torch.bfloat16, "[T, K]")
    _check_rows("fn", fn, torch.float32, "[N, K]")
    tokens, depth = x.shape
    rows = fn.shape[0]
    if depth == 0:
        raise ValueError(f"x: expected [T, K] with K of at least 1, got {list(x.shape)}")
    if not 1 <= rows <= MAX_ROWS or fn.shape[1] != depth:
        raise ValueError(
            f"fn: expected [N, {depth}] (K of x) with N from 1 to {MAX_ROWS}, got {list(fn.shape)}"
        )
    if fn.device != x.device:
        raise ValueError(f"fn: expected device {x.device} (that of x), got {fn.device}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: expected at least 1, got {num_splits}")
    sms = launch.multiprocessors("x", x.device)

    splits = num_splits or splits_of(tokens, depth, sms=sms, batch_invariant=batch_invariant)
    out = x.new_empty((splits, tokens, rows), dtype=torch.float32)
    sqrsum = x.new_empty((splits, tokens), dtype=torch.float32)
    if tokens:
        config = choose(tokens, batch_invariant=batch_invariant)
        steps = triton.cdiv(depth, config.block_k)
        with launch.on_device(x.device):
            hc_prenorm_gemm_kernel[(triton.cdiv(tokens, config.block_t) * splits,)](
                x,
                fn,
                out,
                sqrsum,
                tokens,
                rows,
                depth,
                steps,
                splits,
                triton.cdiv(steps, splits),
                x.stride(0),
                fn.stride(0),
                BLOCK_T=config.block_t,
                BLOCK_N=max(16, triton.next_power_of_2(rows)),
                BLOCK_K=config.block_k,
                DOT_DTYPE=launch.dot_dtype(tl.bfloat16),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    return out, sqrsum


def _check_rows(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: str) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {tuple(tensor.stride())}")
