# SPDX-License-Identifier: Apache-2.0
"""The streams of DeepSeek V4's hyper-connections become one, before the head (README.md)."""

import torch
import triton

from vllm_sm12x.ops import launch
from vllm_sm12x.ops.hc_head.config import choose, warps
from vllm_sm12x.ops.hc_head.kernel import hc_head_kernel
from vllm_sm12x.ops.hc_pre.arguments import check_streams, check_tensor
from vllm_sm12x.ops.hc_prenorm_gemm import hc_prenorm_gemm


def hc_head(
    hs: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    rms_eps: float,
    hc_eps: float,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The gated sum of the hc streams of each token; fp32 inside, same inputs give the same bits.

    hc is 1, 2, 4 or 8, and d from 1 to 16384.

    Args:
        hs: bf16 [T, hc, d], contiguous rows; streams that do not follow each other are copied.
        fn: fp32 [hc, hc * d], contiguous rows.
        scale: fp32 [1].
        base: fp32 [hc].
        rms_eps, hc_eps: of the formula in README.md.
        batch_invariant: a token's bits do not depend on T; slower.

    Returns:
        bf16 [T, d].

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched then.
    """
    tokens, hc, width = check_streams("hs", hs)
    device = hs.device
    check_tensor("fn", fn, torch.float32, (hc, hc * width), device)
    check_tensor("scale", scale, torch.float32, (1,), device)
    check_tensor("base", base, torch.float32, (hc,), device)

    parts, sqrsum = hc_prenorm_gemm(hs.flatten(1), fn, batch_invariant=batch_invariant)
    out = hs.new_empty((tokens, width))
    if tokens:
        with launch.on_device(device):
            hc_head_kernel[(tokens,)](
                parts,
                sqrsum,
                scale,
                base,
                hs,
                out,
                parts.shape[0],
                width,
                float(hc * width),
                parts.stride(0),
                parts.stride(1),
                sqrsum.stride(0),
                hs.stride(0),
                hs.stride(1),
                rms_eps,
                hc_eps,
                HC=hc,
                BLOCK_S=choose(parts.shape[0]).block_s,
                BLOCK_D=triton.next_power_of_2(width),
                num_warps=warps(width),
            )
    return out
