# SPDX-License-Identifier: Apache-2.0
"""Back from a layer's output to the streams of DeepSeek V4's hyper-connections (README.md)."""

import torch
import triton

from vllm_sm12x.ops import launch
from vllm_sm12x.ops.hc_post.config import choose
from vllm_sm12x.ops.hc_post.kernel import hc_post_kernel
from vllm_sm12x.ops.hc_pre.arguments import check_streams, check_tensor


def hc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_mix: torch.Tensor,
    comb_mix: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t, j] = post_mix[t, j] * x[t] + sum_k comb_mix[t, k, j] * residual[t, k], in fp32.

    hc is 1, 2, 4 or 8, and d from 1 to 16384. Tensors have contiguous rows; their other strides
    may be anything.

    Args:
        x: bf16 [T, d], what the layer gave.
        residual: bf16 [T, hc, d].
        post_mix: fp32 [T, hc].
        comb_mix: fp32 [T, hc, hc].
        out: bf16 [T, hc, d]; None allocates it.

    Returns:
        out.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched then.
    """
    tokens, hc, width = check_streams("residual", residual)
    device = residual.device
    check_tensor("x", x, torch.bfloat16, (tokens, width), device)
    check_tensor("post_mix", post_mix, torch.float32, (tokens, hc), device)
    check_tensor("comb_mix", comb_mix, torch.float32, (tokens, hc, hc), device)
    if out is None:
        out = residual.new_empty((tokens, hc, width))
    else:
        check_tensor("out", out, torch.bfloat16, (tokens, hc, width), device)
    sms = launch.multiprocessors("residual", device)

    if tokens:
        config = choose(tokens, width, sms=sms)
        with launch.on_device(device):
            hc_post_kernel[(tokens * triton.cdiv(width, config.block_d),)](
                x,
                residual,
                post_mix,
                comb_mix,
                out,
                width,
                x.stride(0),
                residual.stride(0),
                residual.stride(1),
                post_mix.stride(0),
                comb_mix.stride(0),
                comb_mix.stride(1),
                out.stride(0),
                out.stride(1),
                HC=hc,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
            )
    return out
