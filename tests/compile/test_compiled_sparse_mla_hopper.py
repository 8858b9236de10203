# SPDX-License-Identifier: Apache-2.0
"""What sparse_mla compiles to on sm_90 for more than 32 heads: its kernel of wgmma."""

from dataclasses import replace

import pytest
from gluon_case import GluonCase, layers

SHARED_MEMORY_BYTES = 232_448  # that a program may have there
# Of one tile: 512 columns of Q K^T, 16 at a time, and 64 candidates of P K.
MMA = {
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16": 32,
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16": 4,
}


LAYERS = layers(GluonCase(arch=90, wgmma=True))
C4A = LAYERS[1]
CASES = [
    *LAYERS,
    *(replace(layer, split=True) for layer in LAYERS),
    *(replace(C4A, table=True, sink=sink, lse=True) for sink in (True, False)),
    *(
        replace(C4A, table=True, unpack=True, sink=sink, lse=lse)
        for sink in (True, False)
        for lse in (False, True)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_hopper(case, compiled):
    launches = compiled(case)
    assert [launch.kernel for launch in launches] == case.kernels
    for launch in launches:
        assert (launch.stack, launch.local) == (0, 0), "registers are spilled"
    attention = launches[int(case.unpack)]
    assert attention.shared <= SHARED_MEMORY_BYTES, f"{attention.shared} bytes of shared memory"
    loops = 1 + case.unpack
    for name, count in MMA.items():
        assert attention.mma.get(name) == count * loops, attention.mma
    assert not any(name.startswith("mma.") for name in attention.mma), attention.mma
    assert attention.serialised == ()
    assert set(attention.copies) == {128}, f"asynchronous copies by bits: {attention.copies}"
    assert set(attention.loads) <= {32, 128}, f"loads by bits: {attention.loads}"
