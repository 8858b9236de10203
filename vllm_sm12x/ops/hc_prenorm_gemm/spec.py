# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of hc_prenorm_gemm."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.hc_prenorm_gemm import hc_prenorm_gemm
from vllm_sm12x.ops.hc_prenorm_gemm.reference import hc_prenorm_gemm_reference
from vllm_sm12x.ops.op_spec import OpSpec, TokensShape


@dataclass(frozen=True)
class HcPrenormGemmShape(TokensShape):
    """Axes of one hc_prenorm_gemm call; `splits` 0 leaves the number to the op."""

    depth: int = 16384
    rows: int = 24
    splits: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.depth * (self.rows + 1)

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: x and fn once, one part of the results."""
        return 2 * self.tokens * self.depth + 4 * self.rows * (self.depth + self.tokens)


def hc_prenorm_gemm_inputs(
    shape: HcPrenormGemmShape, *, device: str | torch.device, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments: normal x and fn, with all 24 bits of fn's significands in use."""
    gen = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(shape.tokens, shape.depth, generator=gen, device=device)
    fn = torch.randn(shape.rows, shape.depth, generator=gen, device=device)
    return {"x": x.to(torch.bfloat16), "fn": fn, "num_splits": shape.splits or None}


HC_PRENORM_GEMM = OpSpec(
    name="hc_prenorm_gemm",
    function=hc_prenorm_gemm,
    oracle=hc_prenorm_gemm_reference,
    inputs=hc_prenorm_gemm_inputs,
    tolerance=1e-5,
    tolerance_reason="fn in two bf16 terms, 2^-18 of it; sums in fp32; tf32 would be 3e-4",
    small=(
        HcPrenormGemmShape(1, depth=64),
        HcPrenormGemmShape(1, depth=1, rows=1),
        HcPrenormGemmShape(5, depth=1000),
        HcPrenormGemmShape(33, depth=333, rows=17, splits=3),
        HcPrenormGemmShape(130, depth=512, rows=32),
        HcPrenormGemmShape(1031, depth=200, rows=9),
        HcPrenormGemmShape(2, depth=130, rows=7, splits=5),
        HcPrenormGemmShape(1),
        HcPrenormGemmShape(0),
    ),
    full=tuple(
        HcPrenormGemmShape(tokens, depth=depth, splits=splits)
        for tokens in (1, 3, 16, 33, 64, 256, 1031, 4096)
        for depth, splits in ((4096, 0), (16384, 0), (16384, 1), (28672, 0))
    ),
    bench=tuple(
        HcPrenormGemmShape(tokens, depth=depth)
        for depth in (16384, 28672)
        for tokens in (1, 64, 4096)
    ),
)
