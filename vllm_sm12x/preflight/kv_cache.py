# SPDX-License-Identifier: Apache-2.0
"""The pages of DeepSeek V4's caches by the format alone, for machines where vLLM cannot be asked.

Formats: vllm_sm12x/ops/fp8_ds_mla/README.md for the 584-byte rows; 128 e4m3 values and one fp32
scale for an indexer key; two fp32 vectors (values and gates) for a compressor's state.
"""

from dataclasses import dataclass
from typing import Any

BLOCK_SIZE = 256
_ROW, _ALIGNMENT = 584, 576
_INDEX_ROW_EXTRA, _FP32 = 4, 4
_SWA_BLOCK = 64
_STATE_BLOCK = {4: 4, 128: 8}


@dataclass(frozen=True)
class Cache:
    """One layer's cache: bytes of a page, tokens in it, and the window it keeps (None: all)."""

    name: str
    page: int
    tokens: int
    window: int | None


def caches(config: dict[str, Any], layers: range | None = None) -> list[Cache]:
    """Every cache of the model's layers, named as in vLLM below `model.layers`."""
    ratios = config["compress_ratios"][: config["num_hidden_layers"]]
    found = []
    for layer in layers if layers is not None else range(len(ratios)):
        ratio = ratios[layer]
        name = f"{layer}.attn"
        found.append(
            Cache(
                f"{name}.swa_cache", _page(_SWA_BLOCK, _ROW), _SWA_BLOCK, config["sliding_window"]
            )
        )
        if ratio <= 1:
            continue
        found.append(Cache(name, _page(BLOCK_SIZE // ratio, _ROW), BLOCK_SIZE, None))
        found.append(_state(f"{name}.compressor.state_cache", config["head_dim"], ratio))
        if ratio == 4:
            dim = config["index_head_dim"]
            row = dim + _INDEX_ROW_EXTRA
            found.append(
                Cache(f"{name}.indexer.k_cache", _page(BLOCK_SIZE // ratio, row), BLOCK_SIZE, None)
            )
            found.append(_state(f"{name}.indexer.compressor.state_cache", dim, ratio))
    return found


def bytes_per_token(config: dict[str, Any]) -> float:
    """What a token of context adds to the caches of each tensor-parallel rank, on average."""
    return sum(cache.page / cache.tokens for cache in caches(config) if cache.window is None)


def _state(name: str, dim: int, ratio: int) -> Cache:
    # Ratio 4 pools overlapping windows, and so keeps two vectors of each kind.
    overlap = 2 if ratio == 4 else 1
    block = _STATE_BLOCK[ratio]
    return Cache(name, _page(block, 2 * overlap * dim * _FP32), block, overlap * ratio)


def _page(rows: int, row: int) -> int:
    return -(-rows * row // _ALIGNMENT) * _ALIGNMENT
