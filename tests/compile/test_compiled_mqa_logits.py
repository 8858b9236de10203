# SPDX-License-Identifier: Apache-2.0
"""What mqa_logits and paged_mqa_logits compile to on sm_120 and sm_121."""

import importlib
from dataclasses import dataclass

import pytest
from cross_compile import SMS, Case, Compiled

from vllm_sm12x.device import SM12X_SHARED_MEMORY_BYTES
from vllm_sm12x.ops import mqa_logits, paged_mqa_logits
from vllm_sm12x.ops.mqa_logits.config import FEW_KEYS_LIMIT
from vllm_sm12x.ops.mqa_logits.spec import MqaLogitsShape, mqa_logits_inputs
from vllm_sm12x.ops.paged_mqa_logits.spec import PagedMqaLogitsShape, paged_mqa_logits_inputs

# By import_module: the package's attribute of that name is the function.
mqa_logits_module = importlib.import_module("vllm_sm12x.ops.mqa_logits")
paged_mqa_logits_module = importlib.import_module("vllm_sm12x.ops.paged_mqa_logits")

E4M3_MMA = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
FP16_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


@dataclass(frozen=True)
class MqaLogitsCase(Case):
    """One call of mqa_logits: 64 heads are the model's; 128 take two dots."""

    keys: int
    heads: int

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.keys}keys-{self.heads}heads"

    @property
    def tile(self) -> str:
        return f"{self.heads} heads"

    def call(self) -> None:
        mqa_logits_module.multiprocessors = lambda name, device: SMS
        mqa_logits(**mqa_logits_inputs(MqaLogitsShape(64, self.keys, self.heads), device="cpu"))


@dataclass(frozen=True)
class PagedMqaLogitsCase(Case):
    """One call of paged_mqa_logits, with one or several query rows a request."""

    next_n: int
    block_size: int = 64
    heads: int = 64
    lens: str = "full"
    page_padding: int = 0

    def __str__(self) -> str:
        lens = "-lens_per_row" if self.lens == "rows" else ""
        return (
            f"sm_{self.arch}-next_n{self.next_n}-{self.heads}heads-"
            f"block{self.block_size}+{self.page_padding}{lens}"
        )

    @property
    def tile(self) -> str | None:
        return None if self.page_padding % 16 else f"{self.heads} heads"

    def call(self) -> None:
        mqa_logits_module.multiprocessors = lambda name, device: SMS
        paged_mqa_logits_module.multiprocessors = lambda name, device: SMS
        shape = PagedMqaLogitsShape(
            2,
            512,
            next_n=self.next_n,
            heads=self.heads,
            block_size=self.block_size,
            lens=self.lens,
            page_padding=self.page_padding,
        )
        paged_mqa_logits(**paged_mqa_logits_inputs(shape, device="cpu"))


# Pages of 2 rows (264 bytes) are padded to a multiple of 16 by whoever allocates them.
PAGED = (
    {"next_n": 1},
    {"next_n": 3},
    {"next_n": 2, "lens": "rows"},
    {"next_n": 1, "heads": 128},
    {"next_n": 1, "block_size": 2, "page_padding": 248},
    {"next_n": 1, "block_size": 256},
)
CASES = [
    case
    for arch in (120, 121)
    for case in (
        *(
            MqaLogitsCase(arch, keys, heads)
            for keys in (1024, 2 * FEW_KEYS_LIMIT)
            for heads in (64, 128)
        ),
        *(PagedMqaLogitsCase(arch, **axes) for axes in PAGED),
    )
]


def narrow_loads(launch: Compiled) -> int:
    return sum(count for bits, count in launch.loads.items() if bits < 32)


def wide_reads(launch: Compiled) -> int:
    return launch.loads.get(128, 0) + launch.copies.get(128, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_sm12x(case, compiled):
    (launch,) = compiled(case)
    assert launch.shared <= SM12X_SHARED_MEMORY_BYTES, f"{launch.shared} bytes of shared memory"
    assert (launch.stack, launch.local) == (0, 0), "registers are spilled"
    assert wide_reads(launch) >= 12, f"few 16-byte reads: {launch.loads}, {launch.copies}"
    assert narrow_loads(launch) == 0, f"loads by bits: {launch.loads}"
    # Triton before 3.8 has no FP8 MMA on sm_121: it converts both operands to fp16, exactly.
    assert set(launch.mma) <= ({E4M3_MMA} if case.arch == 120 else {E4M3_MMA, FP16_MMA})
    assert launch.mma, "no tensor-core instruction"


@pytest.mark.parametrize("arch", [120, 121])
def test_the_gate_sees_a_page_stride_that_breaks_wide_loads(arch, compiled):
    """4 bytes more a page, and Triton can no longer prove 16-byte alignment."""
    (launch,) = compiled(PagedMqaLogitsCase(arch, 1, page_padding=4))
    assert narrow_loads(launch) >= 64
