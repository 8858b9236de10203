# SPDX-License-Identifier: Apache-2.0
"""What sparse_mla compiles to on sm_120 and sm_121, in every variant that the backend launches."""

from dataclasses import replace

import pytest
from cross_compile import Case, Compiled

from vllm_sm12x.device import SM12X_SHARED_MEMORY_BYTES
from vllm_sm12x.ops.sparse_mla.config import CONFIGS

BF16_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
# Scale bytes and the like; with byte loads of the rows there are some 200.
NARROW_LOADS = 8


def variants(arch: int, head_block: int, split: bool) -> list[Case]:
    swa = Case(arch, head_block, split)
    c4a, c128a = replace(swa, extra_block=64), replace(swa, extra_block=2)
    layers = [swa, c4a, replace(c4a, table=True), c128a, replace(c128a, table=True)]
    with_lse = [replace(c4a, lse=True), replace(c4a, lse=True, sink=False)]
    return [*layers, *with_lse, replace(c4a, sink=False)]


CASES = [
    case
    for arch in (120, 121)
    for head_block in CONFIGS
    for split in (False, True)
    for case in variants(arch, head_block, split)
]


def narrow_loads(launch: Compiled) -> int:
    return sum(count for bits, count in launch.loads.items() if bits < 32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_sm12x(case, compiled):
    attention, *merge = compiled(case)
    assert attention.kernel == "sparse_mla_kernel"
    assert [launch.kernel for launch in merge] == ["sparse_mla_merge_kernel"] * case.split
    for launch in (attention, *merge):
        assert launch.shared <= SM12X_SHARED_MEMORY_BYTES, f"{launch.shared} bytes of shared memory"
        assert (launch.stack, launch.local) == (0, 0), "registers are spilled"
        assert launch.loads.get(128, 0) >= 8, f"few 16-byte loads: {launch.loads}"
        assert narrow_loads(launch) <= NARROW_LOADS, f"loads by bits: {launch.loads}"
    assert set(attention.mma) == {BF16_MMA}


@pytest.mark.parametrize("arch", [120, 121])
def test_the_gate_sees_a_page_stride_that_breaks_wide_loads(arch, compiled):
    """2 bytes more a page, and Triton can no longer prove 16-byte alignment."""
    attention, *_ = compiled(Case(arch, 4, False, extra_block=64, page_bytes_off=2))
    assert narrow_loads(attention) > 10 * NARROW_LOADS
    assert attention.stack > 0, "this many loads in flight used to spill"
