# SPDX-License-Identifier: Apache-2.0
"""Oracle of hc_pre: plain torch, fp32, written from the formula in README.md."""

import torch


def hc_pre_reference(
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
    """The same results, the layer's input in fp32 and rounded to bf16 only before the norm."""
    hc = round((1 + parts.shape[2]) ** 0.5) - 1  # N + 1 = (hc + 1)^2
    mean_square = sqrsum.sum(0) / residual.shape[1:].numel()
    mixes = parts.sum(0) / (mean_square + rms_eps).sqrt()[:, None]
    pre, post, comb = (
        part * factor + offset
        for part, factor, offset in zip(
            mixes.split([hc, hc, hc * hc], 1), scale, base.split([hc, hc, hc * hc]), strict=True
        )
    )
    comb = comb.unflatten(1, (hc, hc)).softmax(2) + sinkhorn_eps
    comb = comb / (comb.sum(1, keepdim=True) + sinkhorn_eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + sinkhorn_eps)
        comb = comb / (comb.sum(1, keepdim=True) + sinkhorn_eps)

    streams = residual.float()
    if residual.dim() == 2:
        streams = streams[:, None].expand(-1, hc, -1)
        if expanded is not None:
            expanded.copy_(streams)
    mixed = ((pre.sigmoid() + pre_eps)[:, :, None] * streams).sum(1)
    if norm_weight is not None:
        rms = (mixed.square().mean(1, keepdim=True) + norm_eps).sqrt()
        mixed = mixed.bfloat16().float() / rms * norm_weight.float()
    return post.sigmoid() * post_mult, comb, mixed
