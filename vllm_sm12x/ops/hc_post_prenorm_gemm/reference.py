# SPDX-License-Identifier: Apache-2.0
"""Oracle of hc_post_prenorm_gemm: plain torch, fp32, written from the formula in README.md."""

import torch


def hc_post_prenorm_gemm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_mix: torch.Tensor,
    comb_mix: torch.Tensor,
    fn: torch.Tensor,
    *,
    streams: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The streams in fp32, and of them in bf16 the sums over splits [1, T, N] and [1, T]."""
    kept = comb_mix.float().transpose(1, 2) @ residual.float()
    mixed = post_mix.float()[:, :, None] * x.float()[:, None] + kept
    rows = mixed.bfloat16().float().flatten(1)
    return mixed, (rows @ fn.float().T)[None], rows.square().sum(-1)[None]
