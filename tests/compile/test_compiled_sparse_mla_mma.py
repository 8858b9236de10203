# SPDX-License-Identifier: Apache-2.0
"""What sparse_mla compiles to on sm_120 and sm_121 for more than 32 heads: Q in registers."""

import importlib
from dataclasses import dataclass, replace

import pytest
import triton
from cross_compile import SMS, Case

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla.config import LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import SparseMlaShape, sparse_mla_inputs

# By import_module: the package's attribute of that name is the function.
sparse_mla_module = importlib.import_module("vllm_sm12x.ops.sparse_mla")

# Q, or the result, or K and the scores; the packed rows of two tiles; biases and positions.
SHARED_MEMORY_BYTES = 65_536 + 2 * (3 * 4_096 + 128) + 512 + 128
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
# Of a warp and tile, 16 heads: Q K^T of 16 candidates and P K, both of 256 columns.
MMAS = 2 * 16 + 32
# Ours, and the one between the store of one K and the loads of another.
BARRIERS = 2


@dataclass(frozen=True)
class MmaCase(Case):
    """One call of sparse_mla on a GPU without wgmma.

    Attributes:
        split: whether the candidates are split, so that the merge kernel runs too.
        unpack: whether the extra rows are unpacked first; needs a table, and excludes a split.
    """

    arch: int = 120
    split: bool = False
    extra_block: int = 0
    table: bool = False
    sink: bool = True
    lse: bool = False
    unpack: bool = False
    lens: str | None = "full"

    def __str__(self) -> str:
        extra = f"extra{self.extra_block}" if self.extra_block else "swa"
        names = ("table", "sink", "lse", "lens", "split", "unpack")
        flags = [name for name in names if getattr(self, name)]
        return "-".join([f"sm_{self.arch}", extra, *flags])

    @property
    def tile(self) -> str:
        return f"64 {'unpacked' if self.unpack else 'mma'}"

    def call(self) -> None:
        shape = SparseMlaShape(
            tokens=2,
            swa=128 if self.extra_block else 192,
            extra=512 if self.extra_block else 0,
            extra_block=self.extra_block or 64,
            table=self.table,
            sink=self.sink,
            lens=self.lens,
            rows=128,
            unpack=self.unpack,
        )
        # Which always takes the widest tile; one tile of candidates at a time leaves no split.
        policy = LaunchPolicy(batch_invariant=True, topk_chunk=512 if self.split else 16)
        sparse_mla_module.multiprocessors = lambda name, device: SMS
        sparse_mla_module.has_mma = lambda device: True
        sparse_mla(**sparse_mla_inputs(shape, device="cpu"), policy=policy, return_lse=self.lse)


SWA = MmaCase()
C4A, C128A = (replace(SWA, extra_block=block) for block in (64, 2))
LAYERS = (SWA, C4A, replace(C4A, table=True), C128A, replace(C128A, table=True))
UNPACKED = replace(C4A, table=True, unpack=True)
# The compiler makes the same for sm_121. Where the kernel is compiled for another GPU it must still
# be what that GPU has: sm_80 has no mul of bf16x2, and sm_90 is not to get wgmma.
CASES = [
    *LAYERS,
    *(replace(layer, split=True) for layer in LAYERS),
    *(replace(C4A, table=True, sink=sink, lse=True) for sink in (True, False)),
    *(replace(case, lens=None) for case in (C4A, UNPACKED)),
    *(
        replace(UNPACKED, extra_block=block, sink=sink, lse=lse)
        for block in (64, 2)
        for sink in (True, False)
        for lse in (False, True)
    ),
    *(
        replace(case, arch=arch)
        for arch in (121, 80, 89, 90)
        for case in (LAYERS[2], replace(LAYERS[2], split=True), UNPACKED)
        # Rows are unpacked with conversions that sm_80 has not.
        if arch > 80 or not case.unpack
    ),
]


def allowed_stack(case: MmaCase) -> int:
    """Bytes. From 3.7 on Triton restricts ptxas, which then may keep addresses on the stack."""
    # A Hopper GPU has a kernel of its own.
    return 16 if case.arch == 90 or (triton.__version__ >= "3.7" and case.arch >= 120) else 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_sm12x(case, compiled):
    launches = compiled(case)
    kernels = ["sparse_mla_mma_kernel"]
    if case.unpack:
        kernels.insert(0, "unpack_rows_kernel")
    if case.split:
        kernels.append("sparse_mla_merge_kernel")
    assert [launch.kernel for launch in launches] == kernels
    attention = launches[int(case.unpack)]
    assert attention.shared <= SHARED_MEMORY_BYTES, f"{attention.shared} bytes of shared memory"
    loops = 1 + case.unpack
    # Before each loop the scores of its first tile.
    assert attention.mma == {MMA: (MMAS + 32) * loops}
    assert attention.barriers == (BARRIERS,) * loops
    # Scales and positions are copied by 4 bytes, Q and rows by 16.
    assert set(attention.copies) == {32, 128}, f"asynchronous copies by bits: {attention.copies}"
    assert set(attention.loads) == {32}, f"loads by bits: {attention.loads}"
    for launch in launches:
        assert launch.local == 0 and launch.stack <= allowed_stack(case), "registers are spilled"
