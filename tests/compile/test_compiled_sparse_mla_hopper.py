# SPDX-License-Identifier: Apache-2.0
"""What sparse_mla compiles to on sm_90 for more than 32 heads: its kernel of wgmma."""

import importlib
from dataclasses import dataclass, replace

import pytest
from cross_compile import Case

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla.config import LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import SparseMlaShape, sparse_mla_inputs

# By import_module: the package's attribute of that name is the function.
sparse_mla_module = importlib.import_module("vllm_sm12x.ops.sparse_mla")

SMS = 132  # an H100's
SHARED_MEMORY_BYTES = 232_448  # that a program may have there
# Of one tile: 512 columns of Q K^T, 16 at a time, and 64 candidates of P K.
MMA = {
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16": 32,
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16": 4,
}


@dataclass(frozen=True)
class HopperCase(Case):
    """One call of sparse_mla on a GPU with wgmma.

    Attributes:
        split: whether the candidates are split, so that the merge kernel runs too.
        unpack: whether the extra rows are unpacked first; needs a table, and excludes a split.
    """

    arch: int = 90
    split: bool = False
    extra_block: int = 0
    table: bool = False
    sink: bool = True
    lse: bool = False
    unpack: bool = False

    def __str__(self) -> str:
        extra = f"extra{self.extra_block}" if self.extra_block else "swa"
        names = ("table", "sink", "lse", "split", "unpack")
        return "-".join([extra, *(name for name in names if getattr(self, name))])

    @property
    def tile(self) -> str:
        return f"64 {'unpacked' if self.unpack else 'wgmma'}"

    def call(self) -> None:
        shape = SparseMlaShape(
            tokens=2,
            swa=128 if self.extra_block else 192,
            extra=512 if self.extra_block else 0,
            extra_block=self.extra_block or 64,
            table=self.table,
            sink=self.sink,
            rows=128,
            unpack=self.unpack,
        )
        # Which always takes the widest tile; one tile of candidates at a time leaves no split.
        policy = LaunchPolicy(batch_invariant=True, topk_chunk=512 if self.split else 64)
        sparse_mla_module.multiprocessors = lambda name, device: SMS
        sparse_mla_module.has_mma = sparse_mla_module.has_wgmma = lambda device: True
        sparse_mla(**sparse_mla_inputs(shape, device="cpu"), policy=policy, return_lse=self.lse)


SWA = HopperCase()
C4A, C128A = (replace(SWA, extra_block=block) for block in (64, 2))
LAYERS = (SWA, C4A, replace(C4A, table=True), C128A, replace(C128A, table=True))
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
    kernels = ["sparse_mla_hopper_kernel"]
    if case.unpack:
        kernels.insert(0, "unpack_rows_kernel")
    if case.split:
        kernels.append("sparse_mla_merge_kernel")
    assert [launch.kernel for launch in launches] == kernels
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
