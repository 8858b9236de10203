# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of sparse_mla."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM, ROPE_DIM, ROW_BYTES, pack_fp8_ds_mla
from vllm_sm12x.ops.op_spec import OpSpec, TokensShape
from vllm_sm12x.ops.sparse_mla import sparse_mla
from vllm_sm12x.ops.sparse_mla.reference import sparse_mla_reference

COMPRESSION = 4  # query tokens to one compressed row


@dataclass(frozen=True)
class SparseMlaShape(TokensShape):
    """Axes of one sparse_mla call.

    Attributes:
        swa, extra: candidate widths; extra 0 means no extra cache.
        swa_block, extra_block: rows a page.
        table: extra candidates are request-local positions, mapped through a block table.
        holes: share of -1 entries among the indices.
        lens: "full", "ragged" (0 to the width, some rows empty) or None for no lengths.
        padded: pages padded to a multiple of 576 bytes, as vLLM allocates them.
        rows: rows that each cache holds.
        context: of a prefill: the tokens are the last of one request of so many, and see what a
            layer of ratio 4 lets them see, the window up to themselves and `extra` of the
            compressed rows before them. 0: candidates are anywhere in the caches.
        unpack: the extra rows are unpacked first; needs a table or a context.
        quantised: the result is e4m3 and scales.
    """

    heads: int = 64
    swa: int = 128
    extra: int = 512
    swa_block: int = 64
    extra_block: int = 64
    table: bool = False
    sink: bool = True
    holes: float = 0.0
    lens: str | None = "full"
    padded: bool = True
    rows: int = 4096
    context: int = 0
    unpack: bool = False
    quantised: bool = False

    @property
    def candidates(self) -> int:
        """Candidates of all tokens together."""
        if not self.context:
            return self.tokens * (self.swa + self.extra)
        seen = range(self.context - self.tokens + 1, self.context + 1)
        return sum(min(n, self.swa) + min(n // COMPRESSION, self.extra) for n in seen)

    @property
    def flops(self) -> int:
        """FLOP of QK^T and PV over all candidates."""
        return 2 * self.candidates * self.heads * 2 * HEAD_DIM

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: packed rows and indices once, Q in, output out."""
        rows = self.candidates
        if self.context:  # whose tokens share them
            rows = min(self.context, self.tokens + self.swa - 1)
            rows += self.context // COMPRESSION if self.extra else 0
        values = self.tokens * self.heads * HEAD_DIM
        result = values + values // 32 if self.quantised else values * 2
        return rows * ROW_BYTES + self.candidates * 4 + values * 2 + result


def sparse_mla_inputs(
    shape: SparseMlaShape, *, device: torch.device | str, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `sparse_mla` for `shape`, in a prefill as vLLM's metadata has them.

    Rows have magnitudes that differ from scale tile to scale tile by up to 64 times, so that a
    misread UE8M0 byte shows; scores spread over several units, so that the softmax is not flat.
    """
    gen = torch.Generator(device=device).manual_seed(seed)

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, size, generator=gen, device=device, dtype=torch.int32)

    def cache(block: int, held: int) -> torch.Tensor:
        pages = -(-held // block)
        rows = torch.randn(pages, block, 8, HEAD_DIM // 8, generator=gen, device=device)
        rows *= torch.exp2(randint(-3, 3, (pages, block, 8, 1)).float())
        page_bytes = None if shape.padded else block * ROW_BYTES
        return pack_fp8_ds_mla(rows.flatten(2).to(torch.bfloat16), page_bytes=page_bytes)

    def indices(width: int) -> torch.Tensor:
        hole = torch.rand(shape.tokens, width, generator=gen, device=device) < shape.holes
        return randint(0, shape.rows, (shape.tokens, width)).masked_fill(hole, -1)

    def lengths(width: int) -> torch.Tensor | None:
        if shape.lens is None:
            return None
        if shape.lens == "full":
            return torch.full((shape.tokens,), width, dtype=torch.int32, device=device)
        empty = randint(0, 5, (shape.tokens,)) == 0
        return randint(0, width + 1, (shape.tokens,)).masked_fill(empty, 0)

    q = torch.randn(shape.tokens, shape.heads, HEAD_DIM, generator=gen, device=device)
    inputs: dict[str, Any] = {"q": q.to(torch.bfloat16), "softmax_scale": HEAD_DIM**-0.5}
    if shape.quantised:
        inputs |= quantised_output(shape.tokens, shape.heads, device=device, seed=seed)
    inputs["swa_cache"] = cache(shape.swa_block, shape.context or shape.rows)
    if not shape.context:
        inputs["swa_indices"] = indices(shape.swa)
        inputs["swa_lens"] = lengths(shape.swa)
    if shape.sink:
        inputs["sink"] = torch.randn(shape.heads, generator=gen, device=device)
    if shape.extra:
        held = shape.context // COMPRESSION if shape.context else shape.rows
        inputs["extra_cache"] = cache(shape.extra_block, held)
    if shape.context:
        inputs |= _causal_candidates(shape, inputs, gen)
        return inputs | (_unpacked(shape, inputs) if shape.unpack else {})
    if shape.extra:
        inputs["extra_indices"] = indices(shape.extra)
        inputs["extra_lens"] = lengths(shape.extra)
    if shape.table:
        pages = inputs["extra_cache"].shape[0]
        requests = min(shape.tokens, 3)
        order = [torch.randperm(pages, generator=gen, device=device) for _ in range(requests)]
        inputs["extra_block_table"] = torch.stack(order).to(torch.int32)
        inputs["request_ids"] = randint(0, requests, (shape.tokens,))
    return inputs | (_unpacked(shape, inputs) if shape.unpack else {})


def quantised_output(
    tokens: int, heads: int, *, device: torch.device | str, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Keyword arguments that ask for a quantised result, in memory of NaN.

    As the layer has it, a token's values are the first half of what bf16 would take, and its scales
    follow.
    """
    gen = torch.Generator(device=device).manual_seed(seed)
    size = tokens, heads * 2 * HEAD_DIM
    rows = torch.full(size, 0xFF, dtype=torch.uint8, device=device)
    values, rest = rows[:, : heads * HEAD_DIM], rows[:, heads * HEAD_DIM :]
    scales = rest[:, : heads * HEAD_DIM // 32]
    angles = torch.randn(4096, ROPE_DIM // 2, generator=gen, device=device) * 10
    return {
        "out": values.view(torch.float8_e4m3fn).unflatten(1, (heads, -1)),
        "out_scale": scales.view(torch.float32).unflatten(1, (heads, -1)),
        "positions": torch.randint(0, 4096, (tokens,), generator=gen, device=device),
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1),
    }


def _unpacked(shape: SparseMlaShape, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Room for the rows, NaN, of which a random table's requests have unequal numbers."""
    table = inputs["extra_block_table"]
    rows = shape.context // COMPRESSION if shape.context else shape.rows
    unpacked = torch.full(
        (len(table), max(1, rows), HEAD_DIM), math.nan, dtype=torch.bfloat16, device=table.device
    )
    lens = torch.tensor([rows - place * rows // 4 for place in range(len(table))])
    return {"unpacked": unpacked, "unpacked_lens": lens.int().to(table.device)}


def _causal_candidates(
    shape: SparseMlaShape, caches: dict[str, torch.Tensor], gen: torch.Generator
) -> dict[str, torch.Tensor]:
    """Candidates of a prefill, whose pages lie in the caches in any order."""
    device = gen.device

    def pages(cache: torch.Tensor) -> torch.Tensor:
        return torch.randperm(cache.shape[0], generator=gen, device=device).int()

    seen = torch.arange(shape.context - shape.tokens + 1, shape.context + 1, device=device).int()
    lens = seen.clamp(max=shape.swa)
    place = torch.arange(shape.swa, device=device).int()
    position = (seen - lens)[:, None] + place
    inside = place < lens[:, None]
    table = pages(caches["swa_cache"])
    page = table[torch.where(inside, position // shape.swa_block, 0)]
    slots = page * shape.swa_block + position % shape.swa_block
    candidates = {"swa_indices": torch.where(inside, slots, -1), "swa_lens": lens}
    if shape.extra:
        compressed = seen // COMPRESSION
        rows = torch.arange(max(shape.context // COMPRESSION, shape.extra), device=device)
        scores = torch.rand(shape.tokens, len(rows), generator=gen, device=device)
        visible = rows < compressed[:, None]
        best = scores.masked_fill(~visible, -1.0).topk(shape.extra, 1)
        # As vLLM's selection leaves a row that sees no more than it may select.
        all_of_them = torch.where(visible, rows, -1)[:, : shape.extra]
        chosen = torch.where((compressed > shape.extra)[:, None], best.indices, all_of_them)
        candidates |= {
            "extra_indices": chosen.int().contiguous(),
            "extra_lens": compressed,
            "extra_block_table": pages(caches["extra_cache"])[None],
            "request_ids": torch.zeros_like(compressed),
        }
    return candidates


SPARSE_MLA = OpSpec(
    name="sparse_mla",
    function=sparse_mla,
    oracle=sparse_mla_reference,
    inputs=sparse_mla_inputs,
    tolerance=4e-3,
    tolerance_reason="P and the output are rounded to bf16, 2^-9 each; the interpreter truncates",
    small=(
        SparseMlaShape(1, heads=1, swa=1, extra=0, rows=3),
        SparseMlaShape(2, heads=16, swa=128, extra=0, rows=128),
        SparseMlaShape(3, heads=20, swa=33, extra=21, extra_block=2, rows=70, lens="ragged"),
        SparseMlaShape(2, heads=64, swa=17, extra=40, holes=0.3, rows=100, padded=False),
        SparseMlaShape(4, heads=5, swa=7, extra=9, table=True, extra_block=2, rows=33, holes=0.2),
        SparseMlaShape(3, heads=128, swa=16, extra=16, sink=False, lens=None, rows=64),
        SparseMlaShape(5, heads=33, swa=19, extra=3, swa_block=48, extra_block=5, rows=61),
        SparseMlaShape(2, heads=8, swa=16, extra=16, holes=1.0, rows=16),
        SparseMlaShape(0, heads=64, swa=16, extra=16, rows=16),
        SparseMlaShape(9, heads=4, swa=6, extra=3, swa_block=4, extra_block=2, context=9),
        SparseMlaShape(5, heads=4, swa=6, extra=3, swa_block=4, extra_block=2, context=31),
        SparseMlaShape(
            5, heads=4, swa=6, extra=3, swa_block=4, extra_block=2, context=7, unpack=True
        ),
        SparseMlaShape(9, heads=36, swa=6, extra=19, swa_block=4, context=190, unpack=True),
        SparseMlaShape(
            4, heads=5, swa=7, extra=9, table=True, extra_block=2, rows=33, holes=0.2, unpack=True
        ),
        SparseMlaShape(7, heads=17, extra=21, table=True, rows=70, lens="ragged", unpack=True),
    ),
    full=(
        SparseMlaShape(1),
        SparseMlaShape(1, heads=128, extra=1024),
        SparseMlaShape(3, heads=127, swa=127, extra=509, lens="ragged", holes=0.1),
        SparseMlaShape(8, heads=32, table=True, lens="ragged"),
        SparseMlaShape(17, heads=16, extra=8192, extra_block=2, rows=16384, lens="ragged"),
        SparseMlaShape(33, heads=8, extra=1152, extra_block=2),
        SparseMlaShape(64, extra=0),
        SparseMlaShape(64, lens="ragged", holes=0.2, table=True),
        SparseMlaShape(256, heads=64, extra=1024),
        SparseMlaShape(300, heads=128, extra=512),
        SparseMlaShape(1031, heads=64, extra=512, lens="ragged", swa_block=256),
        SparseMlaShape(700, context=3000),
        SparseMlaShape(700, context=3000, unpack=True),
        SparseMlaShape(301, heads=127, table=True, lens="ragged", holes=0.1, unpack=True),
        SparseMlaShape(300, heads=16, extra=128, extra_block=2, table=True, rows=128, unpack=True),
    ),
    bench=(
        *(
            SparseMlaShape(tokens, heads=heads, extra=extra, rows=65536)
            for heads in (64, 128)
            for extra in (0, 512, 1024)
            for tokens in (1, 16, 64, 256, 512)
        ),
        SparseMlaShape(512, heads=128, extra=1664, rows=65536),
        *(
            SparseMlaShape(4096, context=context, unpack=unpack)
            for context in (4096, 32768)
            for unpack in (False, True)
        ),
        *(
            SparseMlaShape(tokens, rows=65536, table=True, quantised=True)
            for tokens in (1, 8, 32, 64, 512)
        ),
        SparseMlaShape(4096, context=32768, unpack=True, quantised=True),
    ),
)
