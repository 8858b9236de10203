# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of hc_head."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.hc_head import hc_head
from vllm_sm12x.ops.hc_head.reference import hc_head_reference
from vllm_sm12x.ops.op_spec import OpSpec, TokensShape


@dataclass(frozen=True)
class HcHeadShape(TokensShape):
    """Axes of one hc_head call."""

    width: int = 4096
    streams: int = 4

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.width * self.streams * (self.streams + 2)

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: streams and fn in, the row out."""
        rows = 2 * self.tokens * self.width * (self.streams + 1)
        return rows + 4 * self.streams**2 * self.width


def hc_head_inputs(
    shape: HcHeadShape, *, device: str | torch.device, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments: logits of a few units, so that gates differ from token to token."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=gen, device=device)

    hc, depth = shape.streams, shape.streams * shape.width
    return {
        "hs": normal(shape.tokens, hc, shape.width).bfloat16(),
        "fn": normal(hc, depth) * 2 / depth**0.5,
        "scale": normal(1) / 4 + 1,
        "base": normal(hc),
        "rms_eps": 1e-6,
        "hc_eps": 1e-6,
    }


HC_HEAD = OpSpec(
    name="hc_head",
    function=hc_head,
    oracle=hc_head_reference,
    inputs=hc_head_inputs,
    tolerance=2**-7,
    tolerance_reason="the output in bf16: rounded, at most 2^-9; the interpreter truncates, 2^-7",
    small=(
        HcHeadShape(1),
        HcHeadShape(1, width=1, streams=1),
        HcHeadShape(3, width=200),
        HcHeadShape(2, width=7168),
        HcHeadShape(130, width=33, streams=8),
        HcHeadShape(5, width=96, streams=2),
        HcHeadShape(0),
    ),
    full=tuple(
        HcHeadShape(tokens, width=width)
        for width in (4096, 7168)
        for tokens in (1, 3, 16, 129, 1031, 4096)
    ),
    bench=tuple(
        HcHeadShape(tokens, width=width) for width in (4096, 7168) for tokens in (1, 64, 4096)
    ),
)
