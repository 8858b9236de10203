# SPDX-License-Identifier: Apache-2.0
"""Oracle of hc_head: plain torch, fp32, written from the formula in README.md."""

import torch


def hc_head_reference(
    hs: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    rms_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """The result in fp32."""
    streams = hs.float()
    flat = streams.flatten(1)
    rms = (flat.square().mean(1, keepdim=True) + rms_eps).sqrt()
    gates = (flat / rms @ fn.T * scale + base).sigmoid() + hc_eps
    return (gates[:, :, None] * streams).sum(1)
