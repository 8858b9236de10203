# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of hc_post."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.hc_post import hc_post
from vllm_sm12x.ops.hc_post.reference import hc_post_reference
from vllm_sm12x.ops.op_spec import OpSpec, TokensShape


@dataclass(frozen=True)
class HcPostShape(TokensShape):
    """Axes of one hc_post call."""

    width: int = 4096
    streams: int = 4

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.width * self.streams * (self.streams + 1)

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: x and the streams in, the streams out, and the mixes."""
        mixes = 4 * self.streams * (1 + self.streams)
        return self.tokens * (2 * self.width * (1 + 2 * self.streams) + mixes)


def hc_post_inputs(
    shape: HcPostShape, *, device: str | torch.device, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments: gates from 0 to 2, and rows of comb_mix that sum to 1, not its columns."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=gen, device=device)

    tokens, hc, width = shape.tokens, shape.streams, shape.width
    return {
        "x": normal(tokens, width).bfloat16(),
        "residual": normal(tokens, hc, width).bfloat16(),
        "post_mix": normal(tokens, hc).sigmoid() * 2,
        "comb_mix": normal(tokens, hc, hc).softmax(2),
    }


HC_POST = OpSpec(
    name="hc_post",
    function=hc_post,
    oracle=hc_post_reference,
    inputs=hc_post_inputs,
    tolerance=2**-7,
    tolerance_reason="the output in bf16: rounded, at most 2^-9; the interpreter truncates, 2^-7",
    small=(
        HcPostShape(1),
        HcPostShape(1, width=1, streams=1),
        HcPostShape(3, width=1000),
        HcPostShape(2, width=7168),
        HcPostShape(9, width=257, streams=8),
        HcPostShape(5, width=300, streams=2),
        HcPostShape(0),
    ),
    full=tuple(
        HcPostShape(tokens, width=width)
        for width in (4096, 7168)
        for tokens in (1, 3, 16, 47, 129, 1031, 4096)
    ),
    bench=tuple(
        HcPostShape(tokens, width=width) for width in (4096, 7168) for tokens in (1, 64, 4096)
    ),
)
