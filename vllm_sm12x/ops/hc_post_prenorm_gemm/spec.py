# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of hc_post_prenorm_gemm."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.hc_post.spec import HcPostShape, hc_post_inputs
from vllm_sm12x.ops.hc_post_prenorm_gemm import hc_post_prenorm_gemm
from vllm_sm12x.ops.hc_post_prenorm_gemm.reference import hc_post_prenorm_gemm_reference
from vllm_sm12x.ops.op_spec import OpSpec, TokensShape


@dataclass(frozen=True)
class HcPostPrenormGemmShape(TokensShape):
    """Axes of one hc_post_prenorm_gemm call; `splits` 0 leaves the number to the op."""

    width: int = 4096
    streams: int = 4
    rows: int = 24
    splits: int = 0

    @property
    def flops(self) -> int:
        depth = self.width * self.streams
        return 2 * self.tokens * depth * (self.streams + 1 + self.rows + 1)

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: those of hc_post, fn, and one part of the results."""
        post = HcPostShape(self.tokens, width=self.width, streams=self.streams)
        fn = 4 * self.rows * self.width * self.streams
        return post.bytes + fn + 4 * self.tokens * (self.rows + 1)


def hc_post_prenorm_gemm_inputs(
    shape: HcPostPrenormGemmShape, *, device: str | torch.device, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments: those of hc_post, and normal fn with 24 bits of significand in use."""
    post = HcPostShape(shape.tokens, width=shape.width, streams=shape.streams)
    gen = torch.Generator(device=device).manual_seed(seed + 1)
    fn = torch.randn(shape.rows, shape.streams * shape.width, generator=gen, device=device)
    inputs = hc_post_inputs(post, device=device, seed=seed)
    return {**inputs, "fn": fn, "num_splits": shape.splits or None}


HC_POST_PRENORM_GEMM = OpSpec(
    name="hc_post_prenorm_gemm",
    function=hc_post_prenorm_gemm,
    oracle=hc_post_prenorm_gemm_reference,
    inputs=hc_post_prenorm_gemm_inputs,
    tolerance=2**-7,
    tolerance_reason="the streams in bf16: rounded, at most 2^-9; the interpreter truncates, 2^-7",
    small=(
        HcPostPrenormGemmShape(1, width=64),
        HcPostPrenormGemmShape(1, width=1, streams=1, rows=1),
        HcPostPrenormGemmShape(5, width=250),
        HcPostPrenormGemmShape(33, width=83, rows=17, splits=3),
        HcPostPrenormGemmShape(130, width=96, streams=2, rows=32),
        HcPostPrenormGemmShape(2, width=37, rows=7, splits=5),
        HcPostPrenormGemmShape(17, width=7168, splits=2),
        HcPostPrenormGemmShape(1),
        HcPostPrenormGemmShape(0),
    ),
    full=tuple(
        HcPostPrenormGemmShape(tokens, width=width, splits=splits)
        for tokens in (1, 3, 16, 33, 64, 128, 1031)
        for width, splits in ((4096, 0), (4096, 1), (7168, 0))
    ),
    bench=tuple(
        HcPostPrenormGemmShape(tokens, width=width)
        for width in (4096, 7168)
        for tokens in (1, 16, 64, 128)
    ),
)
