# SPDX-License-Identifier: Apache-2.0
"""What sparse_mla compiles to on sm_120 and sm_121 for more than 32 heads: Q in registers."""

from dataclasses import replace

import pytest
import triton
from gluon_case import GluonCase, layers
from packaging.version import Version

# Q, or the result, or K and the scores; the packed rows of two tiles; biases and positions.
SHARED_MEMORY_BYTES = 65_536 + 2 * (3 * 4_096 + 128) + 512 + 128
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
# Of a warp and tile, 16 heads: Q K^T of 16 candidates and P K, both of 256 columns.
MMAS = 2 * 16 + 32
# Ours, and the one between the store of one K and the loads of another.
BARRIERS = 2


SWA = GluonCase(arch=120)
LAYERS = layers(SWA)
C4A = LAYERS[1]
UNPACKED = replace(C4A, table=True, unpack=True)
# The compiler makes the same for sm_121. Where the kernel is compiled for another GPU it must still
# be what that GPU has: sm_80 has no mul of bf16x2, and sm_90 is not to get wgmma.
CASES = [
    *LAYERS,
    *(replace(layer, split=True) for layer in LAYERS),
    *(replace(C4A, table=True, sink=sink, lse=True) for sink in (True, False)),
    *(replace(case, lens=None) for case in (C4A, UNPACKED)),
    # What the layers call on SM12x. Of splits the merge quantises.
    *(replace(layer, quantise=True) for layer in (SWA, LAYERS[2])),
    *(replace(LAYERS[2], split=split, quantise=True, lse=True) for split in (False, True)),
    *(replace(UNPACKED, extra_block=block, quantise=True) for block in (64, 2)),
    *(
        replace(UNPACKED, extra_block=block, sink=sink, lse=lse)
        for block in (64, 2)
        for sink in (True, False)
        for lse in (False, True)
    ),
    *(
        replace(case, arch=arch)
        for arch in (121, 80, 89, 90)
        for case in (
            LAYERS[2],
            replace(LAYERS[2], split=True),
            UNPACKED,
            replace(UNPACKED, quantise=True),
        )
        # Rows are unpacked with conversions that sm_80 has not.
        if arch > 80 or not case.unpack
    ),
]


def allowed_stack(case: GluonCase) -> int:
    """Bytes. From 3.7 on Triton restricts ptxas, which then may keep addresses on the stack."""
    restricted = Version(triton.__version__) >= Version("3.7") and case.arch >= 120
    # A Hopper GPU has a kernel of its own.
    return 16 if restricted or case.arch == 90 else 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_sm12x(case, compiled):
    launches = compiled(case)
    assert [launch.kernel for launch in launches] == case.kernels
    attention = launches[int(case.unpack)]
    assert attention.shared <= SHARED_MEMORY_BYTES, f"{attention.shared} bytes of shared memory"
    loops = 1 + case.unpack
    # Before each loop the scores of its first tile.
    assert attention.mma == {MMA: (MMAS + 32) * loops}
    assert attention.barriers == (BARRIERS,) * loops
    # Scales and positions are copied by 4 bytes, Q and rows by 16.
    assert set(attention.copies) == {32, 128}, f"asynchronous copies by bits: {attention.copies}"
    # A position by 8 bytes, its cosines and sines by 16.
    loads = {32, 64, 128} if case.quantise and not case.split else {32}
    assert set(attention.loads) == loads, f"loads by bits: {attention.loads}"
    for launch in launches:
        assert launch.local == 0 and launch.stack <= allowed_stack(case), "registers are spilled"
