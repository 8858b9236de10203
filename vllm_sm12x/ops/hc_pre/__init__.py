# SPDX-License-Identifier: Apache-2.0
"""From the logits of DeepSeek V4's hyper-connections to a layer's input (README.md)."""

import torch
import triton

from vllm_sm12x.ops import launch
from vllm_sm12x.ops.hc_pre.arguments import MAX_WIDTH, STREAM_COUNTS, check_tensor
from vllm_sm12x.ops.hc_pre.config import choose, max_registers, warps
from vllm_sm12x.ops.hc_pre.kernel import hc_pre_kernel


def hc_pre(
    parts: torch.Tensor,
    sqrsum: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    residual: torch.Tensor,
    *,
    rms_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_iters: int,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    expanded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixes of a layer's hc residual streams, and the layer's input: their weighted sum.

    hc is 1, 2, 4 or 8, and d from 1 to 16384. Tensors have contiguous rows; their other strides
    may be anything. Same inputs give the same bits.

    Args:
        parts: fp32 [S, T, hc * (2 + hc)], the products of hc_prenorm_gemm in S parts.
        sqrsum: fp32 [S, T], its sums of squares.
        scale: fp32 [3], of the logits of pre, post and comb.
        base: fp32 [hc * (2 + hc)], added to them.
        residual: bf16 [T, hc, d]; or [T, d] if all streams are the same, with parts and sqrsum of
            that [T, d] and of fn summed over the streams.
        rms_eps, pre_eps, sinkhorn_eps, post_mult: of the formula in README.md.
        sinkhorn_iters: at least 1.
        norm_weight: bf16 [d]; with it the input is RMSNorm(input) * norm_weight.
        norm_eps: of that norm.
        expanded: bf16 [T, hc, d] that takes the hc copies of a residual [T, d].

    Returns:
        post_mix fp32 [T, hc], comb_mix fp32 [T, hc, hc], and the layer's input bf16 [T, d].

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched then.
    """
    counts = {hc * (2 + hc): hc for hc in STREAM_COUNTS}
    if parts.dim() != 3 or parts.shape[0] == 0 or parts.shape[2] not in counts:
        raise ValueError(
            "parts: expected [S, T, hc * (2 + hc)] with S of at least 1 and hc of "
            f"{', '.join(map(str, STREAM_COUNTS))}, got {list(parts.shape)}"
        )
    splits, tokens, cells = parts.shape
    hc = counts[cells]
    same = residual.dim() == 2
    width = residual.shape[-1] if residual.dim() in (2, 3) else 0
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"residual: expected [{tokens}, {hc}, d] or [{tokens}, d] with d from 1 to "
            f"{MAX_WIDTH}, got {list(residual.shape)}"
        )
    if expanded is not None and not same:
        raise ValueError("expanded: expected None, as residual already has its streams")
    if sinkhorn_iters < 1:
        raise ValueError(f"sinkhorn_iters: expected at least 1, got {sinkhorn_iters}")
    fp32, bf16, device = torch.float32, torch.bfloat16, parts.device
    check_tensor("parts", parts, fp32, (splits, tokens, cells), device)
    check_tensor("sqrsum", sqrsum, fp32, (splits, tokens), device)
    check_tensor("scale", scale, fp32, (3,), device)
    check_tensor("base", base, fp32, (cells,), device)
    row = (tokens, width) if same else (tokens, hc, width)
    check_tensor("residual", residual, bf16, row, device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, bf16, (width,), device)
    if expanded is not None:
        check_tensor("expanded", expanded, bf16, (tokens, hc, width), device)
    launch.multiprocessors("parts", device)

    post_mix = parts.new_empty((tokens, hc))
    comb_mix = parts.new_empty((tokens, hc, hc))
    layer_input = residual.new_empty((tokens, width))
    if tokens:
        config = choose(splits)
        with launch.on_device(device):
            hc_pre_kernel[(triton.cdiv(tokens, config.block_t) + tokens,)](
                parts,
                sqrsum,
                scale,
                base,
                residual,
                norm_weight,
                expanded,
                post_mix,
                comb_mix,
                layer_input,
                tokens,
                splits,
                width,
                float(residual.shape[1:].numel()),
                parts.stride(0),
                parts.stride(1),
                sqrsum.stride(0),
                residual.stride(0),
                0 if same else residual.stride(1),
                0 if expanded is None else expanded.stride(0),
                0 if expanded is None else expanded.stride(1),
                rms_eps,
                pre_eps,
                sinkhorn_eps,
                post_mult,
                norm_eps,
                sinkhorn_iters,
                HC=hc,
                STREAMS=1 if same else hc,
                BLOCK_T=config.block_t,
                BLOCK_S=config.block_s,
                BLOCK_D=triton.next_power_of_2(width),
                HAS_NORM=norm_weight is not None,
                HAS_EXPANDED=expanded is not None,
                num_warps=warps(width),
                maxnreg=max_registers(hc, width),
            )
    return post_mix, comb_mix, layer_input
