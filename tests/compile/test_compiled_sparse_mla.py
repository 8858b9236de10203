# SPDX-License-Identifier: Apache-2.0
"""What sparse_mla compiles to on sm_120 and sm_121, in every variant that the backend launches."""

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from cross_compile import SMS, Case, Compiled

from vllm_sm12x.device import SM12X_SHARED_MEMORY_BYTES
from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla.config import CONFIGS, UNPACKED_GROUP, LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import SparseMlaShape, quantised_output, sparse_mla_inputs

# By import_module: the package's attribute of that name is the function.
sparse_mla_module = importlib.import_module("vllm_sm12x.ops.sparse_mla")

BF16_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
# Scale bytes and the like; with byte loads of the rows there are some 200.
NARROW_LOADS = 8
# Of SM12x, and what each program takes of it beyond what it asks for.
MULTIPROCESSOR_SHARED_BYTES = 102_400
RESERVED_SHARED_BYTES = 1_024


@dataclass(frozen=True)
class SparseMlaCase(Case):
    """One call of sparse_mla whose launches are compiled.

    Attributes:
        head_block: key of CONFIGS.
        split: whether the candidates are split, so that the merge kernel runs too.
        unpack: whether the extra rows are unpacked first, by a kernel that then runs before; needs
            a table, and excludes a split.
        quantise: whether the result is, by the attention or, of splits, by the merge.
        page_bytes_off: added to the page stride; anything that is not a multiple of 16 is a page
            that vLLM would not allocate.
    """

    head_block: int
    split: bool
    extra_block: int = 0
    table: bool = False
    sink: bool = True
    lse: bool = False
    unpack: bool = False
    quantise: bool = False
    page_bytes_off: int = 0

    def __str__(self) -> str:
        extra = f"extra{self.extra_block}" if self.extra_block else "swa"
        names = ("table", "sink", "lse", "split", "unpack", "quantise")
        flags = [name for name in names if getattr(self, name)]
        return "-".join([f"sm_{self.arch}", f"{16 * self.head_block}heads", extra, *flags])

    @property
    def tile(self) -> str | None:
        if self.page_bytes_off:
            return None
        return f"{16 * self.head_block} {'unpacked' if self.unpack else 'heads'}"

    def call(self) -> None:
        inputs = sparse_mla_inputs(
            SparseMlaShape(
                tokens=2,
                extra=512 if self.extra_block else 0,
                extra_block=self.extra_block or 64,
                table=self.table,
                sink=self.sink,
                rows=128,
                unpack=self.unpack,
            ),
            device="cpu",
        )
        if self.page_bytes_off:
            for name in ("swa_cache", "extra_cache"):
                if name in inputs:
                    inputs[name] = with_page_stride(inputs[name], self.page_bytes_off)
        if self.quantise:
            inputs |= quantised_output(*inputs["q"].shape[:2], device="cpu")
        # One 16-candidate tile at a time leaves nothing to split.
        policy = LaunchPolicy(head_block=self.head_block, topk_chunk=512 if self.split else 16)
        sparse_mla_module.multiprocessors = lambda name, device: SMS
        sparse_mla(**inputs, policy=policy, return_lse=self.lse)


def with_page_stride(cache: torch.Tensor, off: int) -> torch.Tensor:
    blocks, block_size, width = cache.shape
    stride = cache.stride(0) + off
    storage = torch.zeros(blocks * stride, dtype=torch.uint8)
    return storage.as_strided((blocks, block_size, width), (stride, width, 1))


def variants(arch: int, head_block: int, split: bool) -> list[SparseMlaCase]:
    swa = SparseMlaCase(arch, head_block, split)
    c4a, c128a = replace(swa, extra_block=64), replace(swa, extra_block=2)
    layers = [swa, c4a, replace(c4a, table=True), c128a, replace(c128a, table=True)]
    with_lse = [replace(c4a, lse=True), replace(c4a, lse=True, sink=False)]
    # Of splits the merge quantises, whatever the tile.
    quantised = [replace(layer, quantise=True) for layer in (swa, layers[2])]
    if split:
        quantised = quantised[:1] if head_block == 1 else []
    return [*layers, *with_lse, replace(c4a, sink=False), *quantised]


# For bf16 the compiler makes the same of both (18 of the variants left out were compared once, on
# Triton 3.6: registers, memory, loads, MMAs): one layer's variants show that it still compiles.
CASES = [
    case
    for arch in (120, 121)
    for head_block in CONFIGS
    for split in (False, True)
    for case in variants(arch, head_block, split)
    if arch == 120 or (case.table and not case.quantise)
]


def unpacked_variants(arch: int, head_block: int) -> list[SparseMlaCase]:
    c4a = SparseMlaCase(arch, head_block, False, extra_block=64, table=True, unpack=True)
    if arch == 121:
        return [c4a]
    cases = [c4a, replace(c4a, extra_block=2), replace(c4a, lse=True), replace(c4a, quantise=True)]
    # With 64 heads and no sink Triton 3.8.0 spills 16 B. Every layer has a sink, and an unpacked
    # call has a tile of 64 heads only where `head_block` asks for it.
    if head_block <= UNPACKED_GROUP:
        cases += [replace(c4a, sink=False), replace(c4a, sink=False, lse=True)]
    return cases


UNPACKED_CASES = [
    case
    for arch in (120, 121)
    for head_block in CONFIGS
    for case in unpacked_variants(arch, head_block)
]


def narrow_loads(launch: Compiled) -> int:
    return sum(count for bits, count in launch.loads.items() if bits < 32)


def check_launch(launch: Compiled, wide_loads: int) -> None:
    """Fail on too much shared memory, a spill, too few 16-byte loads, or too many narrow ones."""
    assert launch.shared <= SM12X_SHARED_MEMORY_BYTES, f"{launch.shared} bytes of shared memory"
    assert (launch.stack, launch.local) == (0, 0), "registers are spilled"
    assert launch.loads.get(128, 0) >= wide_loads, f"few 16-byte loads: {launch.loads}"
    assert narrow_loads(launch) <= NARROW_LOADS, f"loads by bits: {launch.loads}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_sm12x(case, compiled):
    attention, *merge = compiled(case)
    assert attention.kernel == "sparse_mla_kernel"
    assert [launch.kernel for launch in merge] == ["sparse_mla_merge_kernel"] * case.split
    # Of the merge, one load for each of its four splits.
    for launch, least in zip((attention, *merge), (8, 4), strict=False):
        check_launch(launch, least)
    assert set(attention.mma) == {BF16_MMA}


@pytest.mark.parametrize("case", UNPACKED_CASES, ids=str)
def test_unpacked_rows_fit_sm12x(case, compiled):
    unpack, attention = compiled(case)
    assert (unpack.kernel, attention.kernel) == ("unpack_rows_kernel", "sparse_mla_kernel")
    # Of the unpacking, two for the words of each half, and one for RoPE.
    check_launch(unpack, 5)
    check_launch(attention, 8)
    assert unpack.mma == {}
    assert set(attention.mma) == {BF16_MMA}
    assert set(attention.copies) == {128}, f"asynchronous copies by bits: {attention.copies}"
    if case.head_block <= UNPACKED_GROUP:
        two = 2 * (attention.shared + RESERVED_SHARED_BYTES)
        assert two <= MULTIPROCESSOR_SHARED_BYTES, "two programs do not fit a multiprocessor"


@pytest.mark.parametrize("arch", [120, 121])
def test_the_gate_sees_a_page_stride_that_breaks_wide_loads(arch, compiled):
    """4 bytes more a page, and Triton can no longer prove 16-byte alignment."""
    attention, *_ = compiled(SparseMlaCase(arch, 4, False, extra_block=64, page_bytes_off=4))
    aligned, *_ = compiled(SparseMlaCase(arch, 4, False, extra_block=64))
    assert attention.loads.get(128, 0) < aligned.loads[128], attention.loads
    assert narrow_loads(attention) > NARROW_LOADS, attention.loads
