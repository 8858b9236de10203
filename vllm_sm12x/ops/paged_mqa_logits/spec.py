# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of paged_mqa_logits."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.op_spec import OpSpec
from vllm_sm12x.ops.paged_mqa_logits import HEAD_DIM, ROW_BYTES, paged_mqa_logits
from vllm_sm12x.ops.paged_mqa_logits.reference import paged_mqa_logits_reference


@dataclass(frozen=True)
class PagedMqaLogitsShape:
    """Axes of one paged_mqa_logits call.

    Attributes:
        context: longest context.
        columns: max_model_len; 0: the context.
        lens: "full", "ragged" (-1 to the context, also empty), or "rows" (ragged, for each row).
        page_padding: bytes between a page's end and the next page.
    """

    requests: int
    context: int
    next_n: int = 1
    heads: int = 64
    columns: int = 0
    block_size: int = 64
    lens: str = "full"
    page_padding: int = 0

    @property
    def max_model_len(self) -> int:
        """Columns of the output."""
        return self.columns or self.context


def pack_indexer_cache(
    keys: torch.Tensor, scales: torch.Tensor, *, page_padding: int = 0
) -> torch.Tensor:
    """Keys e4m3 [blocks, bs, 128] and scales fp32 [blocks, bs] as a cache [blocks, bs, 1, 132]."""
    blocks, block_size, _ = keys.shape
    values = keys.flatten(1).view(torch.uint8)
    parts = [values, scales.contiguous().view(torch.uint8)]
    pages = torch.cat([*parts, values.new_full((blocks, page_padding), 0xFF)], 1)
    shape = (blocks, block_size, 1, ROW_BYTES)
    return pages.as_strided(shape, (pages.shape[1], ROW_BYTES, ROW_BYTES, 1))


def paged_mqa_logits_inputs(
    shape: PagedMqaLogitsShape, *, device: torch.device | str, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `paged_mqa_logits`.

    Scales are powers of two over a range of 64; each request's pages are in random order; block
    table entries past a full context are -1.
    """
    gen = torch.Generator(device=device).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen, device=device)

    pages = -(-shape.context // shape.block_size)
    blocks = pages + 3
    scales = torch.exp2((randn(blocks, shape.block_size) * 2).round().clamp(-3, 3))
    keys = randn(blocks, shape.block_size, HEAD_DIM).to(torch.float8_e4m3fn)
    width = max(pages, -(-shape.max_model_len // shape.block_size))
    table = torch.full((shape.requests, width), -1, dtype=torch.int32, device=device)
    for b in range(shape.requests):
        table[b, :pages] = torch.randperm(blocks, generator=gen, device=device)[:pages]
    size = (shape.requests, shape.next_n) if shape.lens == "rows" else (shape.requests,)
    lens = torch.full(size, shape.context, dtype=torch.int32, device=device)
    if shape.lens != "full":
        lens.random_(-1, shape.context + 1, generator=gen)
    return {
        "q": randn(shape.requests, shape.next_n, shape.heads, HEAD_DIM).to(torch.float8_e4m3fn),
        "cache": pack_indexer_cache(keys, scales, page_padding=shape.page_padding),
        "weights": randn(shape.requests * shape.next_n, shape.heads),
        "context_lens": lens,
        "block_table": table,
        "max_model_len": shape.max_model_len,
    }


PAGED_MQA_LOGITS = OpSpec(
    name="paged_mqa_logits",
    function=paged_mqa_logits,
    oracle=paged_mqa_logits_reference,
    inputs=paged_mqa_logits_inputs,
    tolerance=5e-4,
    tolerance_reason="FP8 tensor cores up to SM90 keep some 14 bits of a sum; 1e-4 to 2e-4 seen",
    small=(
        PagedMqaLogitsShape(1, 1, heads=1),
        PagedMqaLogitsShape(2, 200, columns=1000),
        PagedMqaLogitsShape(3, 300, heads=8, next_n=3, lens="ragged", page_padding=384),
        PagedMqaLogitsShape(2, 150, heads=16, next_n=2, lens="rows", block_size=2, columns=700),
        PagedMqaLogitsShape(2, 131, heads=65, block_size=7, lens="ragged", page_padding=12),
        PagedMqaLogitsShape(1, 260, heads=128, block_size=256),
        PagedMqaLogitsShape(40, 30, heads=4, block_size=1, lens="ragged"),
        PagedMqaLogitsShape(0, 64),
    ),
    full=tuple(
        PagedMqaLogitsShape(requests, context, next_n=next_n, lens="ragged", columns=65_536)
        for requests, context in ((1, 1024), (8, 32_768), (33, 5000))
        for next_n in (1, 3)
    ),
    bench=tuple(
        PagedMqaLogitsShape(requests, keys, next_n=next_n)
        for next_n in (1, 3)
        for keys in (4096, 32_768, 131_072)
        for requests in (1, 8, 32)
    ),
)
