# SPDX-License-Identifier: Apache-2.0
"""The packed DeepSeek V4 KV cache, `fp8_ds_mla`, at reference quality.

A page of `block_size` rows is block-packed: first `block_size` data rows of 576 bytes (448 e4m3
NoPE values, then 64 bf16 RoPE values), then `block_size` groups of 8 scale bytes (7 UE8M0
exponents, one per 64 NoPE values, and one zero byte). vLLM gives such a cache the nominal shape
[blocks, block_size, 584]; pages may be padded, so `stride(0)` is the only truth about a page's
size, and the last two dimensions never address a row. Format: README.md of this folder.
"""

import torch

NOPE_DIM = 448
ROPE_DIM = 64
HEAD_DIM = NOPE_DIM + ROPE_DIM
QUANT_TILE = 64
SCALES_PER_ROW = 8
DATA_BYTES = NOPE_DIM + 2 * ROPE_DIM
ROW_BYTES = DATA_BYTES + SCALES_PER_ROW
PAGE_ALIGNMENT = DATA_BYTES

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def packed_page_bytes(block_size: int) -> int:
    """Bytes of a page as vLLM allocates it: rows and scales, padded to a multiple of 576."""
    return -(-block_size * ROW_BYTES // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _page_view(storage: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Data rows [blocks, block_size, 576] and scale rows [blocks, block_size, 8] of raw pages."""
    split = block_size * DATA_BYTES
    data = storage[:, :split].unflatten(1, (block_size, DATA_BYTES))
    scales = storage[:, split : split + block_size * SCALES_PER_ROW]
    return data, scales.unflatten(1, (block_size, SCALES_PER_ROW))


def pack_fp8_ds_mla(rows: torch.Tensor, *, page_bytes: int | None = None) -> torch.Tensor:
    """Quantise KV rows into a packed cache.

    Args:
        rows: bf16 [blocks, block_size, 512]; the last 64 values of a row are stored unquantised.
        page_bytes: bytes from one page to the next, at least `block_size * 584`; default: the
            next multiple of 576, as vLLM pads it.

    Returns:
        uint8 [blocks, block_size, 584] with `stride(0) == page_bytes`. The scale of 64 NoPE values
        is 2**ceil(log2(max(amax, 1e-4) / 448)), kept as its biased exponent (UE8M0).

    Raises:
        TypeError, ValueError: `rows` or `page_bytes` is not as above.
    """
    if rows.dtype != torch.bfloat16:
        raise TypeError(f"rows: expected dtype torch.bfloat16, got {rows.dtype}")
    if rows.dim() != 3 or rows.shape[2] != HEAD_DIM:
        raise ValueError(f"rows: expected [blocks, block_size, 512], got {list(rows.shape)}")
    blocks, block_size, _ = rows.shape
    least = block_size * ROW_BYTES
    page_bytes = packed_page_bytes(block_size) if page_bytes is None else page_bytes
    if page_bytes < least:
        raise ValueError(
            f"page_bytes: {block_size} rows of {ROW_BYTES} bytes need at least {least}, "
            f"got {page_bytes}"
        )
    nope = rows[..., :NOPE_DIM].float().unflatten(-1, (-1, QUANT_TILE))
    amax = nope.abs().amax(-1).clamp_min(AMAX_FLOOR)
    exponent = torch.ceil(torch.log2(amax / E4M3_MAX))
    scaled = nope / torch.exp2(exponent).unsqueeze(-1)
    values = scaled.clamp(-E4M3_MAX, E4M3_MAX).flatten(-2).to(torch.float8_e4m3fn)

    storage = torch.zeros(blocks, page_bytes, dtype=torch.uint8, device=rows.device)
    data, scales = _page_view(storage, block_size)
    data[..., :NOPE_DIM] = values.view(torch.uint8)
    data[..., NOPE_DIM:] = rows[..., NOPE_DIM:].contiguous().view(torch.uint8)
    scales[..., : NOPE_DIM // QUANT_TILE] = (exponent + 127).to(torch.uint8)
    return storage.as_strided((blocks, block_size, ROW_BYTES), (page_bytes, ROW_BYTES, 1))


def unpack_fp8_ds_mla(cache: torch.Tensor) -> torch.Tensor:
    """Dequantise every row of a packed cache.

    Args:
        cache: uint8 [blocks, block_size, 584], pages possibly padded (`stride(0)` is honoured).

    Returns:
        fp32 [blocks, block_size, 512], exact: e4m3 times a power of two, and the bf16 RoPE values.

    Raises:
        TypeError, ValueError: `cache` is not as above.
    """
    check_packed_cache("cache", cache)
    blocks, block_size, _ = cache.shape
    pages = cache.as_strided((blocks, block_size * ROW_BYTES), (cache.stride(0), 1))
    data, scales = _page_view(pages, block_size)
    values = data[..., :NOPE_DIM].contiguous().view(torch.float8_e4m3fn).float()
    exponent = scales[..., : NOPE_DIM // QUANT_TILE].float() - 127
    nope = values.unflatten(-1, (-1, QUANT_TILE)) * torch.exp2(exponent).unsqueeze(-1)
    rope = data[..., NOPE_DIM:].contiguous().view(torch.bfloat16).float()
    return torch.cat([nope.flatten(-2), rope], dim=-1)


def check_packed_cache(name: str, cache: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError`, naming `name`, unless `cache` has the packed layout."""
    if cache.dtype != torch.uint8:
        raise TypeError(f"{name}: expected dtype torch.uint8 (packed), got {cache.dtype}")
    if cache.dim() != 3 or cache.shape[2] != ROW_BYTES or cache.shape[1] < 1:
        raise ValueError(
            f"{name}: expected [blocks, block_size, {ROW_BYTES}], got {list(cache.shape)}"
        )
    least = cache.shape[1] * ROW_BYTES
    inner_packed = cache.stride(2) == 1 and (cache.shape[1] == 1 or cache.stride(1) == ROW_BYTES)
    pages_apart = cache.shape[0] <= 1 or cache.stride(0) >= least
    if not (inner_packed and pages_apart):
        raise ValueError(
            f"{name}: expected strides (>= {least}, {ROW_BYTES}, 1), got {tuple(cache.stride())}"
        )
    if cache.stride(0) % 4 or cache.data_ptr() % 4:
        raise ValueError(
            f"{name}: pages must start at multiples of 4 bytes (rows are read in 32-bit words), "
            f"got data_ptr {cache.data_ptr():#x} and page stride {cache.stride(0)}"
        )
