# SPDX-License-Identifier: Apache-2.0
"""What paged_mqa_topk compiles to on sm_120 and sm_121."""

import importlib
from dataclasses import dataclass

import pytest
from cross_compile import SMS, Case

from vllm_sm12x.device import SM12X_SHARED_MEMORY_BYTES
from vllm_sm12x.ops import paged_mqa_topk
from vllm_sm12x.ops.paged_mqa_topk.spec import PagedMqaTopkShape, paged_mqa_topk_inputs

# By import_module: the package's attribute of that name is the function.
mqa_logits_module = importlib.import_module("vllm_sm12x.ops.mqa_logits")
paged_mqa_topk_module = importlib.import_module("vllm_sm12x.ops.paged_mqa_topk")

E4M3_MMA = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
FP16_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
# Rows that fill the GPU by themselves, and rows that need splits.
MANY_ROWS, FEW_ROWS = 4096, 8


@dataclass(frozen=True)
class PagedMqaTopkCase(Case):
    """One call of paged_mqa_topk: 64 heads and topk 512 or 1024 are the models'."""

    rows: int = MANY_ROWS
    topk: int = 512
    heads: int = 64
    block_size: int = 64
    page_padding: int = 0

    def __str__(self) -> str:
        return (
            f"sm_{self.arch}-{self.rows}rows-top{self.topk}-{self.heads}heads-"
            f"block{self.block_size}+{self.page_padding}"
        )

    @property
    def tile(self) -> str | None:
        return None if self.page_padding % 16 else f"top{self.topk}, {self.heads}"

    def call(self) -> None:
        for module in (mqa_logits_module, paged_mqa_topk_module):
            module.multiprocessors = lambda name, device: SMS
        shape = PagedMqaTopkShape(
            self.rows,
            32_768,
            self.topk,
            heads=self.heads,
            block_size=self.block_size,
            page_padding=self.page_padding,
        )
        paged_mqa_topk(**paged_mqa_topk_inputs(shape, device="cpu"))


# Pages of 2 rows (264 bytes) are padded to a multiple of 16 by whoever allocates them.
CASES = [
    PagedMqaTopkCase(arch, **axes)
    for arch in (120, 121)
    for axes in (
        *({"rows": rows, "topk": k} for rows in (MANY_ROWS, FEW_ROWS) for k in (512, 1024, 2048)),
        {"heads": 128},
        {"heads": 128, "topk": 2048},
        {"heads": 16},
        {"block_size": 2, "page_padding": 248},
        {"block_size": 256},
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_sm12x(case, compiled):
    launches = compiled(case)
    names = [launch.kernel for launch in launches]
    merges = ["merge_splits_kernel"] if case.rows == FEW_ROWS else []
    assert names == ["paged_mqa_topk_kernel", *merges]
    for launch in launches:
        assert launch.shared <= SM12X_SHARED_MEMORY_BYTES, f"{launch.shared} B of shared memory"
        assert (launch.stack, launch.local) == (0, 0), "registers are spilled"
    scores = launches[0]
    wide = scores.loads.get(128, 0) + scores.copies.get(128, 0)
    assert wide >= 10, f"few 16-byte reads: {scores.loads}, {scores.copies}"
    assert all(bits >= 32 for bits in scores.loads), f"loads by bits: {scores.loads}"
    # Triton before 3.8 has no FP8 MMA on sm_121: it converts both operands to fp16, exactly.
    assert set(scores.mma) <= ({E4M3_MMA} if case.arch == 120 else {E4M3_MMA, FP16_MMA})
    assert scores.mma, "no tensor-core instruction"


@pytest.mark.parametrize("arch", [120, 121])
def test_keys_are_copied_while_others_are_multiplied(arch, compiled):
    (launch,) = compiled(PagedMqaTopkCase(arch))
    assert launch.copies.get(128, 0) >= 8, "no asynchronous 16-byte copies"


@pytest.mark.parametrize("arch", [120, 121])
def test_the_gate_sees_a_page_stride_that_breaks_wide_copies(arch, compiled):
    """4 bytes more a page, and Triton can no longer prove 16-byte alignment."""
    (launch,) = compiled(PagedMqaTopkCase(arch, page_padding=4))
    assert launch.copies.get(128, 0) == 0
