# SPDX-License-Identifier: Apache-2.0
"""Oracle of paged_mqa_topk: plain torch, fp32, written from the formula in README.md."""

import math

import torch


def paged_mqa_topk_scores(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    query_start_loc: torch.Tensor,
    lens: torch.Tensor,
    block_table: torch.Tensor,
) -> list[torch.Tensor | None]:
    """For each row of a request the fp32 scores of the positions that it sees; None for padding."""
    blocks, block_size = cache.shape[:2]
    raw = cache.as_strided((blocks, block_size * 132), (cache.stride(0), 1))
    values = raw[:, : block_size * 128].contiguous().view(torch.float8_e4m3fn)
    scales = raw[:, block_size * 128 :].contiguous().view(torch.float32)
    rows: list[torch.Tensor | None] = [None] * q.shape[0]
    starts = query_start_loc.tolist()
    lengths = lens.clamp(0, block_table.shape[1] * block_size).tolist()
    for r in range(block_table.shape[0]):
        for t in range(starts[r], starts[r + 1]):
            pages = block_table[r, : -(-lengths[t] // block_size)].long()
            keys = values[pages].view(-1, 128)[: lengths[t]].float()
            dots = (q[t].float() @ keys.T).relu()
            scores = (weights[t] @ dots) * scales[pages].flatten()[: lengths[t]]
            rows[t] = scores.nan_to_num(-math.inf, math.inf, -math.inf)
    return rows


def paged_mqa_topk_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    query_start_loc: torch.Tensor,
    lens: torch.Tensor,
    block_table: torch.Tensor,
    topk: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_mqa_topk` in fp32: same arguments. Positions stand in the order of their scores."""
    if out is None:
        out = torch.empty((q.shape[0], topk), dtype=torch.int32, device=q.device)
    out.fill_(-1)
    every_row = paged_mqa_topk_scores(q, cache, weights, query_start_loc, lens, block_table)
    for t, scores in enumerate(every_row):
        if scores is not None:
            best = scores.topk(min(topk, len(scores))).indices
            out[t, : len(best)] = best.to(torch.int32)
    return out
