# SPDX-License-Identifier: Apache-2.0
"""Oracle of paged_mqa_logits: plain torch, fp32, written from the formula in README.md."""

import math

import torch


def _gather(
    cache: torch.Tensor, table_row: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys fp32 [length, 128] and scales fp32 [length] of one request's first positions."""
    block_size = cache.shape[1]
    raw = cache.as_strided((cache.shape[0], block_size * 132), (cache.stride(0), 1))
    pages = raw[table_row[: -(-length // block_size)].long()]
    keys = pages[:, : block_size * 128].contiguous().view(torch.float8_e4m3fn)
    scales = pages[:, block_size * 128 :].contiguous().view(torch.float32)
    return keys.float().view(-1, 128)[:length], scales.flatten()[:length]


def paged_mqa_logits_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_model_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_mqa_logits` in fp32: same arguments."""
    requests, next_n = q.shape[:2]
    logits = torch.full((requests * next_n, max_model_len), -math.inf, device=q.device)
    most = min(max_model_len, block_table.shape[1] * cache.shape[1])
    for b in range(requests):
        for i in range(next_n):
            if context_lens.dim() == 1:
                context = int(context_lens[b]) - next_n + i + 1
            else:
                context = int(context_lens[b, i])
            length = min(context, most)
            if length > 0:
                keys, scales = _gather(cache, block_table[b], length)
                scores = (q[b, i].float() @ keys.T).relu()
                logits[b * next_n + i, :length] = weights[b * next_n + i] @ scores * scales
    return logits if out is None else out.copy_(logits)
