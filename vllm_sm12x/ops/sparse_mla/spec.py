# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of sparse_mla."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM, ROW_BYTES, pack_fp8_ds_mla
from vllm_sm12x.ops.op_spec import OpSpec
from vllm_sm12x.ops.sparse_mla import sparse_mla
from vllm_sm12x.ops.sparse_mla.reference import sparse_mla_reference


@dataclass(frozen=True)
class SparseMlaShape:
    """Axes of one sparse_mla call.

    Attributes:
        swa, extra: candidate widths; extra 0 means no extra cache.
        swa_block, extra_block: rows a page.
        table: extra candidates are request-local positions, mapped through a block table.
        holes: share of -1 entries among the indices.
        lens: "full", "ragged" (0 to the width, some rows empty) or None for no lengths.
        padded: pages padded to a multiple of 576 bytes, as vLLM allocates them.
        rows: rows that each cache holds.
    """

    tokens: int
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

    @property
    def flops(self) -> int:
        """FLOP of QK^T and PV over all candidates."""
        return 2 * self.tokens * self.heads * (self.swa + self.extra) * 2 * HEAD_DIM

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: packed rows and indices once, Q in, output out."""
        candidates = self.swa + self.extra
        return self.tokens * (candidates * (ROW_BYTES + 4) + 2 * self.heads * HEAD_DIM * 2)

    def __str__(self) -> str:
        changed = [
            f"{name}{getattr(self, name)}"
            for name, spec in self.__dataclass_fields__.items()
            if name != "tokens" and getattr(self, name) != spec.default
        ]
        return "-".join([f"T{self.tokens}", *changed])


def sparse_mla_inputs(
    shape: SparseMlaShape, *, device: torch.device | str, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `sparse_mla` for `shape`.

    Rows have magnitudes that differ from scale tile to scale tile by up to 64 times, so that a
    misread UE8M0 byte shows; scores spread over several units, so that the softmax is not flat.
    """
    gen = torch.Generator(device=device).manual_seed(seed)

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, size, generator=gen, device=device, dtype=torch.int32)

    def cache(block: int) -> torch.Tensor:
        pages = -(-shape.rows // block)
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
    inputs: dict[str, Any] = {
        "q": q.to(torch.bfloat16),
        "swa_cache": cache(shape.swa_block),
        "swa_indices": indices(shape.swa),
        "swa_lens": lengths(shape.swa),
        "softmax_scale": HEAD_DIM**-0.5,
    }
    if shape.sink:
        inputs["sink"] = torch.randn(shape.heads, generator=gen, device=device)
    if shape.extra:
        inputs["extra_cache"] = cache(shape.extra_block)
        inputs["extra_indices"] = indices(shape.extra)
        inputs["extra_lens"] = lengths(shape.extra)
    if shape.table:
        pages = inputs["extra_cache"].shape[0]
        requests = min(shape.tokens, 3)
        order = [torch.randperm(pages, generator=gen, device=device) for _ in range(requests)]
        inputs["extra_block_table"] = torch.stack(order).to(torch.int32)
        inputs["request_ids"] = randint(0, requests, (shape.tokens,))
    return inputs


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
    ),
    bench=(
        *(
            SparseMlaShape(tokens, heads=heads, extra=extra, rows=65536)
            for heads in (64, 128)
            for extra in (0, 512, 1024)
            for tokens in (1, 16, 64, 256, 512)
        ),
        SparseMlaShape(512, heads=128, extra=1664, rows=65536),
    ),
)
