# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of fp8_einsum."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.fp8_einsum import fp8_einsum
from vllm_sm12x.ops.fp8_einsum.reference import fp8_einsum_reference
from vllm_sm12x.ops.op_spec import OpSpec, TokensShape


@dataclass(frozen=True)
class Fp8EinsumShape(TokensShape):
    """Axes of one fp8_einsum call.

    Attributes:
        a_scale, b_scale: "fp32", or "e8m0" or "uint8" for the same powers of two as exponents.
        transposed: a_scale with tokens contiguous, as vLLM's quantiser writes it for DeepGEMM.
    """

    groups: int = 8
    cols: int = 1024
    depth: int = 4096
    a_scale: str = "fp32"
    b_scale: str = "fp32"
    transposed: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.groups * self.cols * self.depth

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: values once, output once; scales are 1 to 3% of it."""
        values = self.tokens * self.groups * self.depth + self.groups * self.cols * self.depth
        return values + 2 * self.tokens * self.groups * self.cols


def fp8_einsum_inputs(
    shape: Fp8EinsumShape, *, device: str | torch.device, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments: values of all magnitudes of e4m3, scales from 2^-6 to 2^3."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def values(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=gen, device=device) * 16).to(torch.float8_e4m3fn)

    def scales(kind: str, *size: int) -> torch.Tensor:
        exponents = torch.randint(121, 131, size, generator=gen, device=device, dtype=torch.uint8)
        if kind == "uint8":
            return exponents
        e8m0 = exponents.view(torch.float8_e8m0fnu)
        return e8m0 if kind == "e8m0" else e8m0.float()

    steps = shape.depth // 128
    a_scale = scales(shape.a_scale, shape.tokens, shape.groups, steps)
    if shape.transposed:
        a_scale = a_scale.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return {
        "a": values(shape.tokens, shape.groups, shape.depth),
        "a_scale": a_scale,
        "b": values(shape.groups, shape.cols, shape.depth),
        "b_scale": scales(shape.b_scale, shape.groups, -(-shape.cols // 128), steps),
    }


FP8_EINSUM = OpSpec(
    name="fp8_einsum",
    function=fp8_einsum,
    oracle=fp8_einsum_reference,
    inputs=fp8_einsum_inputs,
    tolerance=2**-8,
    tolerance_reason="the output is rounded to bf16, at most 2^-9; FP8 sums keep some 14 bits",
    small=(
        Fp8EinsumShape(1, groups=1, cols=1, depth=128),
        Fp8EinsumShape(3, groups=2, cols=130, depth=256, transposed=True),
        Fp8EinsumShape(17, groups=3, cols=33, depth=384, a_scale="e8m0", b_scale="uint8"),
        Fp8EinsumShape(2, groups=1, cols=40, depth=2048, b_scale="e8m0", transposed=True),
        Fp8EinsumShape(70, groups=2, cols=200, depth=256, a_scale="uint8"),
        Fp8EinsumShape(300, groups=1, cols=384, depth=128),
        Fp8EinsumShape(0, groups=2, cols=16, depth=128),
    ),
    full=tuple(
        Fp8EinsumShape(tokens, groups=groups, a_scale=a_scale, transposed=a_scale == "e8m0")
        for tokens in (1, 3, 16, 33, 64, 100, 256, 1031, 4096)
        for groups, a_scale in ((8, "fp32"), (8, "e8m0"), (2, "fp32"), (1, "e8m0"))
    ),
    bench=tuple(
        Fp8EinsumShape(tokens, groups=groups)
        for groups in (8, 4, 2)
        for tokens in (1, 16, 64, 256, 4096)
    ),
)
