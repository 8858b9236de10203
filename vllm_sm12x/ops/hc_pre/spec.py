# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of hc_pre."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.hc_pre import hc_pre
from vllm_sm12x.ops.hc_pre.reference import hc_pre_reference
from vllm_sm12x.ops.op_spec import OpSpec, TokensShape


@dataclass(frozen=True)
class HcPreShape(TokensShape):
    """Axes of one hc_pre call.

    Attributes:
        splits: parts that the logits come in.
        norm: with an RMSNorm of the layer's input.
        same: a residual [T, d], expanded by the call.
    """

    width: int = 4096
    streams: int = 4
    splits: int = 1
    norm: bool = True
    same: bool = False

    @property
    def flops(self) -> int:
        return self.tokens * self.width * (2 * self.streams + 4)

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: residual in, the layer's input out, and the parts."""
        read = self.width * (1 if self.same else self.streams)
        written = self.width * (1 + self.same * self.streams)
        cells = self.streams * (2 + self.streams)
        return self.tokens * (2 * (read + written) + 4 * (self.splits * (cells + 1) + cells))


def hc_pre_inputs(
    shape: HcPreShape, *, device: str | torch.device, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments: logits of a few units, so that gates differ from token to token."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=gen, device=device)

    hc = shape.streams
    streams = () if shape.same else (hc,)
    residual = normal(shape.tokens, *streams, shape.width).bfloat16()
    squares = residual.float().square().flatten(1).sum(1)
    shares = torch.rand(shape.splits, shape.tokens, generator=gen, device=device) + 0.1
    cells = hc * (2 + hc)
    parts = normal(shape.splits, shape.tokens, cells) * 2 / shape.splits**0.5
    expanded = (shape.tokens, hc, shape.width)
    return {
        "parts": parts,
        "sqrsum": squares * shares / shares.sum(0),
        "scale": normal(3) / 4 + 1,
        "base": normal(cells),
        "residual": residual,
        "rms_eps": 1e-6,
        "pre_eps": 1e-6,
        "sinkhorn_eps": 1e-6,
        "post_mult": 2.0,
        "sinkhorn_iters": 20,
        "norm_weight": (normal(shape.width) / 4 + 1).bfloat16() if shape.norm else None,
        "norm_eps": 1e-6,
        "expanded": residual.new_empty(expanded) if shape.same else None,
    }


HC_PRE = OpSpec(
    name="hc_pre",
    function=hc_pre,
    oracle=hc_pre_reference,
    inputs=hc_pre_inputs,
    tolerance=2**-6,
    tolerance_reason="bf16 before and after the norm: rounded, at most 2^-9 each; the interpreter "
    "truncates, 2^-7 each",
    small=(
        HcPreShape(1),
        HcPreShape(1, width=1, streams=1),
        HcPreShape(3, width=200, splits=64),
        HcPreShape(2, width=96, splits=130, norm=False),
        HcPreShape(5, width=7168, splits=3, same=True),
        HcPreShape(4, width=33, streams=8, splits=2),
        HcPreShape(130, width=16, splits=17),
        HcPreShape(37, width=3, splits=5, same=True, norm=False),
        HcPreShape(0),
    ),
    full=tuple(
        HcPreShape(tokens, width=width, splits=splits, norm=norm, same=same)
        for width in (4096, 7168)
        for tokens, splits in ((1, 128), (3, 224), (16, 128), (129, 94), (1031, 44), (4096, 11))
        for norm, same in ((True, False), (True, True), (False, False))
    ),
    bench=tuple(
        HcPreShape(tokens, width=width, splits=splits)
        for width in (4096, 7168)
        for tokens, splits in ((1, 128), (64, 128), (4096, 11))
    ),
)
