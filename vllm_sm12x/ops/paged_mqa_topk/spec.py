# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of paged_mqa_topk."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.op_spec import OpSpec
from vllm_sm12x.ops.paged_mqa_logits.spec import pack_indexer_cache
from vllm_sm12x.ops.paged_mqa_topk import HEAD_DIM, paged_mqa_topk
from vllm_sm12x.ops.paged_mqa_topk.reference import paged_mqa_topk_reference

# DeepSeek V4 keeps one indexer key for every 4 tokens.
COMPRESS_RATIO = 4


@dataclass(frozen=True)
class PagedMqaTopkShape:
    """Axes of one paged_mqa_topk call.

    Attributes:
        rows: of all requests together, shared evenly, the rest in the last one.
        keys: longest context, in keys.
        lens: "causal" (a request's rows are its last tokens), "full", or "ragged" (any, also
            empty, negative and past the block table).
        scores: "random", or by position "rising", "falling" or "constant" (every score a tie).
        padding: rows before the first request, and as many after the last.
        page_padding: bytes between a page's end and the next page.
    """

    rows: int
    keys: int
    topk: int = 512
    requests: int = 1
    heads: int = 64
    block_size: int = 64
    lens: str = "causal"
    scores: str = "random"
    padding: int = 0
    page_padding: int = 0


def paged_mqa_topk_inputs(
    shape: PagedMqaTopkShape, *, device: torch.device | str, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `paged_mqa_topk`; pages are in random order over the requests."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen, device=device)

    total = shape.rows + 2 * shape.padding
    pages = -(-shape.keys // shape.block_size)
    blocks = shape.requests * pages + 3
    q = randn(total, shape.heads, HEAD_DIM)
    weights = randn(total, shape.heads)
    keys = randn(blocks, shape.block_size, HEAD_DIM)
    scales = torch.exp2((randn(blocks, shape.block_size) * 2).round().clamp(-3, 3))
    order = torch.randperm(blocks, generator=gen, device=device)[: shape.requests * pages]
    if shape.scores != "random":
        q, weights, keys = (torch.ones_like(tensor) for tensor in (q, weights, keys))
        position = torch.arange(pages * shape.block_size, device=device, dtype=torch.float32)
        by_position = {
            "rising": 1 + position,
            "falling": pages * shape.block_size - position,
            "constant": torch.ones_like(position),
        }[shape.scores]
        scales[order] = by_position.view(pages, -1).repeat(shape.requests, 1)

    each = shape.rows // max(shape.requests, 1)
    starts = torch.arange(shape.requests + 1, dtype=torch.int32, device=device) * each
    starts += shape.padding
    starts[-1:] = shape.padding + shape.rows
    lens = torch.full((total,), shape.keys, dtype=torch.int32, device=device)
    if shape.lens == "ragged":
        lens.random_(-1, shape.keys + 2 * shape.block_size, generator=gen)
    elif shape.lens == "causal":
        for r in range(shape.requests):
            rows = lens[starts[r] : starts[r + 1]]
            tokens_after = torch.arange(len(rows), device=device).flip(0)
            rows -= (tokens_after // COMPRESS_RATIO).int()
    return {
        "q": q.to(torch.float8_e4m3fn),
        "cache": pack_indexer_cache(
            keys.to(torch.float8_e4m3fn), scales, page_padding=shape.page_padding
        ),
        "weights": weights,
        "query_start_loc": starts,
        "lens": lens,
        "block_table": order.view(shape.requests, pages).int(),
        "topk": shape.topk,
    }


PAGED_MQA_TOPK = OpSpec(
    name="paged_mqa_topk",
    function=paged_mqa_topk,
    oracle=paged_mqa_topk_reference,
    inputs=paged_mqa_topk_inputs,
    tolerance=2**-13,
    tolerance_reason=(
        "how far a selected score may be below the k-th best, of the row's largest sum of "
        "magnitudes: FP8 tensor cores up to SM90 keep some 14 bits of each of the two sums"
    ),
    small=(
        PagedMqaTopkShape(1, 1, 1, heads=1),
        PagedMqaTopkShape(3, 130, 16),
        PagedMqaTopkShape(9, 300, 4, requests=3, heads=8, padding=2, page_padding=384),
        PagedMqaTopkShape(5, 150, 32, requests=2, heads=16, block_size=2, lens="ragged"),
        PagedMqaTopkShape(3, 131, 7, heads=65, block_size=7, page_padding=12),
        PagedMqaTopkShape(2, 260, 32, heads=128, block_size=256),
        PagedMqaTopkShape(2, 1300, 5, heads=2, lens="full", scores="rising"),
        PagedMqaTopkShape(2, 40, 64, heads=3),
        PagedMqaTopkShape(2, 700, 600, heads=2),
        PagedMqaTopkShape(0, 64, 8),
        PagedMqaTopkShape(3, 0, 8),
        PagedMqaTopkShape(0, 0, 8, requests=0, padding=2),
    ),
    full=(
        PagedMqaTopkShape(1, 1),
        PagedMqaTopkShape(64, 32_768),
        PagedMqaTopkShape(300, 5000, 1024, requests=3, lens="ragged", padding=5),
        PagedMqaTopkShape(257, 20_000, 2048, requests=2, heads=128),
        PagedMqaTopkShape(1024, 4096),
        PagedMqaTopkShape(64, 40_000, lens="full", scores="rising"),
        PagedMqaTopkShape(512, 9000, lens="full", scores="constant"),
        PagedMqaTopkShape(512, 9000, 2048, lens="full", scores="falling"),
    ),
    bench=tuple(
        PagedMqaTopkShape(rows, keys, topk)
        for topk in (512, 1024)
        for rows, keys in (
            (4096, 4096),
            (4096, 32_768),
            (512, 32_768),
            (64, 32_768),
            (2048, 262_144),
        )
    ),
)
