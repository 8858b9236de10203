# SPDX-License-Identifier: Apache-2.0
"""Oracle of mqa_logits: plain torch, fp32, written from the formula in README.md."""

import math

import torch


def mqa_logits_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mqa_logits` in fp32: same arguments."""
    scores = torch.einsum("mhd,nd->mhn", q.float(), k.float())
    logits = torch.einsum("mhn,mh->mn", scores.relu(), weights) * k_scale
    positions = torch.arange(k.shape[0], device=k.device)
    inside = (positions >= ks[:, None]) & (positions < ke[:, None])
    logits = logits.masked_fill(~inside, -math.inf)
    return logits if out is None else out.copy_(logits)
