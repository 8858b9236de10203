# SPDX-License-Identifier: Apache-2.0
"""What the ops with a GEMM compile to on sm_120 and sm_121, in every configuration.

And on sm_90, fp8_einsum for many tokens.
"""

import importlib
from dataclasses import dataclass
from unittest import mock

import pytest
from cross_compile import SMS, Case, Compiled

from vllm_sm12x.device import SM12X_SHARED_MEMORY_BYTES
from vllm_sm12x.ops import fp8_einsum, hc_post_prenorm_gemm, hc_prenorm_gemm, launch
from vllm_sm12x.ops.fp8_einsum.config import CONFIGS as EINSUM_CONFIGS
from vllm_sm12x.ops.fp8_einsum.config import HOPPER, LaunchPlan
from vllm_sm12x.ops.fp8_einsum.spec import Fp8EinsumShape, fp8_einsum_inputs
from vllm_sm12x.ops.hc_post_prenorm_gemm.config import CONFIG as POST_PRENORM
from vllm_sm12x.ops.hc_post_prenorm_gemm.spec import (
    HcPostPrenormGemmShape,
    hc_post_prenorm_gemm_inputs,
)
from vllm_sm12x.ops.hc_prenorm_gemm.config import CONFIGS as PRENORM_CONFIGS
from vllm_sm12x.ops.hc_prenorm_gemm.spec import HcPrenormGemmShape, hc_prenorm_gemm_inputs

# By import_module: the package's attributes of these names are the functions.
einsum_module = importlib.import_module("vllm_sm12x.ops.fp8_einsum")
prenorm_module = importlib.import_module("vllm_sm12x.ops.hc_prenorm_gemm")

E4M3_MMA = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
BF16_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
# Triton up to 3.7 has no e4m3 dot for sm_121 and converts to fp16, exactly.
FP16_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
# With 1,024 B reserved for each, two such programs share the 102,400 B of an SM.
HALF_AN_SM = 50_176
SM_SHARED_MEMORY, RESERVED, SM_REGISTERS = 102_400, 1024, 65_536
HOPPER_SM = 233_472
# Of one step: 64 x 128 x 128.
WGMMA = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"


@dataclass(frozen=True)
class EinsumCase(Case):
    """One call of fp8_einsum.

    Attributes:
        config: index into CONFIGS.
        scales: form of the scales of a and of b.
        transposed: a_scale with tokens contiguous.
        split: whether R is split, so that the merge kernel runs too.
        row_bytes_off: added to the row stride of b.
    """

    config: int
    scales: str = "fp32"
    transposed: bool = False
    split: bool = False
    row_bytes_off: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("transposed", "split") if getattr(self, name)]
        return "-".join([f"sm_{self.arch}", str(EINSUM_CONFIGS[self.config]), self.scales, *flags])

    @property
    def tile(self) -> str | None:
        return None if self.row_bytes_off else str(EINSUM_CONFIGS[self.config])

    def call(self) -> None:
        shape = Fp8EinsumShape(
            3,
            groups=2,
            cols=256,
            depth=1024,
            a_scale=self.scales,
            b_scale=self.scales,
            transposed=self.transposed,
        )
        inputs = fp8_einsum_inputs(shape, device="cpu")
        if self.row_bytes_off:
            wide = inputs["b"].new_empty(2, 256, 1024 + self.row_bytes_off)
            inputs["b"] = wide[..., :1024]
        plan = LaunchPlan(EINSUM_CONFIGS[self.config], 2 if self.split else 1, 8 >> self.split)
        with (
            mock.patch.object(launch, "multiprocessors", return_value=SMS),
            mock.patch.object(einsum_module, "choose", return_value=plan),
        ):
            fp8_einsum(**inputs)


@dataclass(frozen=True)
class HopperEinsumCase(Case):
    """One call of fp8_einsum that takes hopper.py's kernel; `scales` as in EinsumCase."""

    scales: str = "fp32"
    transposed: bool = False

    def __str__(self) -> str:
        flags = ["transposed"] * self.transposed
        return "-".join([f"sm_{self.arch}", self.tile, self.scales, *flags])

    @property
    def tile(self) -> str:
        return str(HOPPER)

    def call(self) -> None:
        shape = Fp8EinsumShape(
            4161,
            groups=2,
            cols=1000,
            depth=1024,
            a_scale=self.scales,
            b_scale=self.scales,
            transposed=self.transposed,
        )
        with (
            mock.patch.object(launch, "multiprocessors", return_value=132),
            mock.patch.object(launch, "has_wgmma", return_value=True),
        ):
            fp8_einsum(**fp8_einsum_inputs(shape, device="cpu"))


@dataclass(frozen=True)
class PrenormCase(Case):
    """One call of hc_prenorm_gemm; `config` is an index into its CONFIGS."""

    config: int
    rows: int = 24
    depth: int = 16384

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.tile}-K{self.depth}"

    @property
    def tile(self) -> str:
        return f"{PRENORM_CONFIGS[self.config]} N{self.rows}"

    def call(self) -> None:
        config = PRENORM_CONFIGS[self.config]
        shape = HcPrenormGemmShape(3, depth=self.depth, rows=self.rows)
        with (
            mock.patch.object(launch, "multiprocessors", return_value=SMS),
            mock.patch.object(prenorm_module, "choose", return_value=config),
        ):
            hc_prenorm_gemm(**hc_prenorm_gemm_inputs(shape, device="cpu"))


@dataclass(frozen=True)
class PostPrenormCase(Case):
    """One call of hc_post_prenorm_gemm.

    Attributes:
        row_padding: elements between the rows of the residual.
    """

    width: int = 4096
    streams: int = 4
    row_padding: int = 0

    def __str__(self) -> str:
        return f"sm_{self.arch}-d{self.width}-hc{self.streams}"

    @property
    def tile(self) -> str | None:
        return None if self.row_padding else f"{POST_PRENORM} hc{self.streams}"

    def call(self) -> None:
        shape = HcPostPrenormGemmShape(3, width=self.width, streams=self.streams)
        inputs = hc_post_prenorm_gemm_inputs(shape, device="cpu")
        if self.row_padding:
            padded = inputs["residual"].new_empty(3, self.streams, self.width + self.row_padding)
            inputs["residual"] = padded[..., : self.width]
        with mock.patch.object(launch, "multiprocessors", return_value=SMS):
            hc_post_prenorm_gemm(**inputs)


EINSUM_CASES = [
    EinsumCase(arch, config, scales, transposed=scales == "e8m0", split=split)
    for arch in (120, 121)
    for config in range(len(EINSUM_CONFIGS))
    for scales in ("fp32", "e8m0")
    for split in (False, True)
]
HOPPER_CASES = [
    HopperEinsumCase(90, scales, transposed)
    for scales in ("fp32", "e8m0")
    for transposed in (False, True)
]
PRENORM_CASES = [
    PrenormCase(arch, config, rows)
    for arch in (120, 121)
    for config in range(len(PRENORM_CONFIGS))
    for rows in (24, 32)
]
POST_PRENORM_CASES = [
    PostPrenormCase(arch, width, streams)
    for arch in (120, 121)
    for width, streams in ((4096, 4), (7168, 4), (4096, 2), (4096, 1))
]


def check_fits(launched: Compiled) -> None:
    assert launched.shared <= SM12X_SHARED_MEMORY_BYTES, f"{launched.shared} B of shared memory"
    assert (launched.stack, launched.local) == (0, 0), "registers are spilled"


@pytest.mark.parametrize("case", EINSUM_CASES, ids=str)
def test_fp8_einsum_fits_sm12x(case, compiled):
    product, *merge = compiled(case)
    assert product.kernel == "fp8_einsum_kernel"
    check_fits(product)
    assert set(product.copies) == {128}, f"copies of values by bits: {product.copies}"
    assert set(product.loads) == {32 if case.scales == "fp32" else 8}, "only scales by plain loads"
    mma = set(product.mma)
    assert mma == {E4M3_MMA} or (case.arch == 121 and mma == {FP16_MMA})
    assert [launched.kernel for launched in merge] == ["fp8_einsum_merge_kernel"] * case.split
    for launched in merge:
        check_fits(launched)
        assert set(launched.loads) == {128}


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_fp8_einsum_fits_hopper(case, compiled):
    (product,) = compiled(case)
    assert product.kernel == "fp8_einsum_hopper_kernel"
    assert (product.stack, product.local) == (0, 0), "registers are spilled"
    # Three programs share a multiprocessor.
    assert 3 * (product.shared + RESERVED) <= HOPPER_SM, f"{product.shared} B of shared memory"
    assert 3 * 32 * HOPPER.num_warps * product.registers <= SM_REGISTERS, product.registers
    assert product.mma.get(WGMMA) == 4, product.mma
    assert not any(name.startswith("mma.") for name in product.mma), product.mma
    assert product.serialised == ()
    # A and B, for each stage but one before the loop, and once in it.
    assert product.tma == 2 * HOPPER.num_stages
    assert not product.copies, f"copies of values by threads: {product.copies}"
    assert set(product.loads) == {32 if case.scales == "fp32" else 8}, "only scales by plain loads"


@pytest.mark.parametrize("case", PRENORM_CASES, ids=str)
def test_hc_prenorm_gemm_fits_sm12x(case, compiled):
    (product,) = compiled(case)
    check_fits(product)
    assert product.shared <= HALF_AN_SM
    assert set(product.copies) == {128} and not product.loads
    assert set(product.mma) == {BF16_MMA}


@pytest.mark.parametrize("case", POST_PRENORM_CASES, ids=str)
def test_hc_post_prenorm_gemm_fits_sm12x(case, compiled):
    (fused,) = compiled(case)
    check_fits(fused)
    threads, programs = 32 * POST_PRENORM.num_warps, POST_PRENORM.programs_per_sm
    assert programs * threads * fused.registers <= SM_REGISTERS
    assert programs * (fused.shared + RESERVED) <= SM_SHARED_MEMORY
    # fn by copies; x and the residual before the loop and in it, the mixes 4 bytes at a time.
    bits = 16 * min(8, POST_PRENORM.block_t * POST_PRENORM.block_d // threads)
    assert set(fused.copies) == {128}
    assert set(fused.loads) == {32, bits} and fused.loads[bits] % (2 * (case.streams + 1)) == 0
    assert set(fused.mma) == {BF16_MMA}
    assert fused.barriers == (2,), "a step's streams are mixed before the first is multiplied"


def test_the_gate_sees_a_residual_that_breaks_wide_loads(compiled):
    """2 bytes more a row, and Triton can no longer prove 16-byte alignment."""
    (fused,) = compiled(PostPrenormCase(120, row_padding=1))
    assert 16 in fused.loads, f"loads by bits: {fused.loads}"


@pytest.mark.parametrize("arch", [120, 121])
def test_the_gate_sees_a_stride_that_breaks_wide_copies(arch, compiled):
    """8 bytes more a row of B, and Triton can no longer prove 16-byte alignment."""
    (product,) = compiled(EinsumCase(arch, 0, row_bytes_off=8))
    assert product.loads.get(8, 0) >= 16, f"loads by bits: {product.loads}"
