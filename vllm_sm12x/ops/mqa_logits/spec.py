# SPDX-License-Identifier: Apache-2.0
"""Inputs, shapes and tolerance of mqa_logits."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sm12x.ops.mqa_logits import HEAD_DIM, mqa_logits
from vllm_sm12x.ops.mqa_logits.reference import mqa_logits_reference
from vllm_sm12x.ops.op_spec import OpSpec


@dataclass(frozen=True)
class MqaLogitsShape:
    """Axes of one mqa_logits call.

    Attributes:
        rows, keys: M and N.
        ranges: "causal" (row m of the last M positions sees keys up to its own), "full", or
            "random": any ks and ke, also empty, negative and past the keys.
    """

    rows: int
    keys: int
    heads: int = 64
    ranges: str = "causal"


def mqa_logits_inputs(
    shape: MqaLogitsShape, *, device: torch.device | str, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `mqa_logits`; scales are powers of two over a range of 64."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen, device=device)

    def randint(low: int, high: int) -> torch.Tensor:
        size = (shape.rows,)
        return torch.randint(low, high, size, generator=gen, device=device, dtype=torch.int32)

    rows = torch.arange(shape.rows, dtype=torch.int32, device=device)
    if shape.ranges == "random":
        ks, ke = randint(-2, shape.keys + 2), randint(-2, shape.keys + 3)
    elif shape.ranges == "full":
        ks, ke = torch.zeros_like(rows), torch.full_like(rows, shape.keys)
    else:
        ks, ke = torch.zeros_like(rows), (rows + 1 + shape.keys - shape.rows).clamp_min(0)
    return {
        "q": randn(shape.rows, shape.heads, HEAD_DIM).to(torch.float8_e4m3fn),
        "k": randn(shape.keys, HEAD_DIM).to(torch.float8_e4m3fn),
        "k_scale": torch.exp2((randn(shape.keys) * 2).round().clamp(-3, 3)),
        "weights": randn(shape.rows, shape.heads),
        "ks": ks,
        "ke": ke,
    }


MQA_LOGITS = OpSpec(
    name="mqa_logits",
    function=mqa_logits,
    oracle=mqa_logits_reference,
    inputs=mqa_logits_inputs,
    tolerance=5e-4,
    tolerance_reason="FP8 tensor cores up to SM90 keep some 14 bits of a sum; 1e-4 to 2e-4 seen",
    small=(
        MqaLogitsShape(1, 1, heads=1),
        MqaLogitsShape(3, 130),
        MqaLogitsShape(17, 129, heads=8, ranges="full"),
        MqaLogitsShape(20, 300, heads=16, ranges="random"),
        MqaLogitsShape(2, 255, heads=65, ranges="random"),
        MqaLogitsShape(3, 40, heads=128),
        MqaLogitsShape(18, 7, heads=3),
        MqaLogitsShape(0, 64),
        MqaLogitsShape(3, 0),
    ),
    full=(
        MqaLogitsShape(1, 1),
        MqaLogitsShape(127, 1023),
        MqaLogitsShape(300, 5000, ranges="random"),
        MqaLogitsShape(1024, 4096),
        MqaLogitsShape(129, 33_001, heads=128),
    ),
    bench=(
        MqaLogitsShape(4096, 4096, ranges="full"),
        MqaLogitsShape(4096, 32_768, ranges="full"),
    ),
)
