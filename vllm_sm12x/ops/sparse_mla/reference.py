# SPDX-License-Identifier: Apache-2.0
"""Oracle of sparse_mla: plain torch, fp32, written from the formula in README.md."""

import math

import torch

from vllm_sm12x.ops.fp8_ds_mla import unpack_fp8_ds_mla


def _gather(
    cache: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows fp32 [T, W, 512] at global slots, and which of them take part, bool [T, W]."""

    slots = slots.flatten(1).long()
    valid = slots >= 0
    if lens is not None:
        valid &= torch.arange(slots.shape[1], device=slots.device) < lens[:, None]
    used = torch.where(valid, slots, 0)
    pages, inverse = torch.unique(used // cache.shape[1], return_inverse=True)
    if cache.shape[0] == 0:
        rows = torch.zeros(*used.shape, 512, device=cache.device)
    else:
        unpacked = unpack_fp8_ds_mla(_select_pages(cache, pages))
        rows = unpacked[inverse, used % cache.shape[1]]
    return torch.where(valid[..., None], rows, 0.0), valid


def _select_pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The named pages as a cache of their own, so that a huge cache is not unpacked whole."""
    page_bytes = cache.shape[1] * cache.shape[2]
    raw = cache.as_strided((cache.shape[0], page_bytes), (cache.stride(0), 1))
    return raw[pages].view(len(pages), cache.shape[1], cache.shape[2])


def _to_slots(
    positions: torch.Tensor, block_table: torch.Tensor, request_ids: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Global slots of request-local positions; -1 stays -1."""
    positions = positions.flatten(1).long()
    column = positions.clamp_min(0) // block_size
    inside = (positions >= 0) & (column < block_table.shape[1])
    table = block_table.long()[request_ids.long()]
    page = table.gather(1, column.clamp_max(block_table.shape[1] - 1))
    return torch.where(inside, page * block_size + positions % block_size, -1)


def sparse_mla_reference(
    q: torch.Tensor,
    swa_cache: torch.Tensor,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None = None,
    *,
    extra_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_lens: torch.Tensor | None = None,
    extra_block_table: torch.Tensor | None = None,
    request_ids: torch.Tensor | None = None,
    unpacked: torch.Tensor | None = None,
    unpacked_lens: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    softmax_scale: float,
    out: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`sparse_mla` in fp32: same arguments, `out` fp32 unless one is given; `unpacked` is left."""
    rows, valid = _gather(swa_cache, swa_indices, swa_lens)
    if extra_cache is not None and extra_indices is not None:
        slots = extra_indices.flatten(1)
        if unpacked is not None and unpacked_lens is not None and request_ids is not None:
            held = unpacked_lens.clamp_max(unpacked.shape[1])[request_ids.long()]
            slots = torch.where(slots < held[:, None], slots, -1)
        if extra_block_table is not None and request_ids is not None:
            slots = _to_slots(slots, extra_block_table, request_ids, extra_cache.shape[1])
        extra_rows, extra_valid = _gather(extra_cache, slots, extra_lens)
        rows, valid = torch.cat([rows, extra_rows], 1), torch.cat([valid, extra_valid], 1)

    scores = torch.einsum("thd,twd->thw", q.float(), rows) * softmax_scale
    scores = scores.masked_fill(~valid[:, None, :], -math.inf)
    lse = torch.logsumexp(scores, -1)
    denominator = lse if sink is None else torch.logaddexp(lse, sink.float()[None, :])
    weights = torch.exp(scores - denominator[..., None])
    # A row without candidates has denominator -inf or the sink alone: its weights are all zero.
    weights = weights.masked_fill(~valid[:, None, :], 0.0)
    result = torch.einsum("thw,twd->thd", weights, rows)
    if out_scale is not None and positions is not None and cos_sin_cache is not None:
        result, scale = quantised_reference(result, positions, cos_sin_cache)
        out_scale.copy_(scale)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def quantised_reference(
    rows: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T, H, 512] without their RoPE, as e4m3 and scales fp32 [T, H, 4]."""
    rows = rows.float().clone()
    cos, sin = cos_sin_cache[positions][:, None, :].chunk(2, -1)
    even, odd = rows[..., -64::2].clone(), rows[..., -63::2].clone()
    rows[..., -64::2] = even * cos + odd * sin
    rows[..., -63::2] = odd * cos - even * sin
    runs = rows.unflatten(-1, (4, 128))
    largest = runs.abs().amax(-1).clamp_min(1e-10)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
    return (runs / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale
