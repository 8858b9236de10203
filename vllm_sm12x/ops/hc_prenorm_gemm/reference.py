# SPDX-License-Identifier: Apache-2.0
"""Oracle of hc_prenorm_gemm: plain torch, fp32, written from the formula in README.md."""

import torch


def hc_prenorm_gemm_reference(
    x: torch.Tensor, fn: torch.Tensor, *, num_splits: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over splits: out fp32 [1, T, N] and sqrsum fp32 [1, T], whatever `num_splits`."""
    values = x.float()
    return (values @ fn.float().T)[None], values.square().sum(-1)[None]
