# SPDX-License-Identifier: Apache-2.0
"""Oracle of hc_post: plain torch, fp32, written from the formula in README.md."""

import torch


def hc_post_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_mix: torch.Tensor,
    comb_mix: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The result in fp32, whatever `out`."""
    kept = comb_mix.float().transpose(1, 2) @ residual.float()
    return post_mix.float()[:, :, None] * x.float()[:, None] + kept
