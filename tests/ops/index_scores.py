# SPDX-License-Identifier: Apache-2.0
"""How index scores are compared with their oracle: in the interpreter, and on FP8 tensor cores."""

import math
from collections.abc import Callable
from typing import Any

import torch

# e4m3 products are exact in fp32, so in the interpreter only the order of fp32 sums differs.
INTERPRETER = 1e-5
# FP8 tensor cores up to SM90 align the products of a sum to the largest and keep some 14 bits
# (DeepSeek-V3 technical report, 3.3.2): an error of 2^-14 of the sum of magnitudes at most.
TENSOR_CORE = 2**-14


def magnitudes(oracle: Callable[..., torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
    """The same scores with every q, k and weight positive: what an error is relative to.

    The cache of a paged oracle holds e4m3 bytes and fp32 scales: its sign bits are cleared.
    """
    positive = dict(inputs)
    for name in ("q", "k"):
        if name in inputs:
            positive[name] = inputs[name].float().abs().to(torch.float8_e4m3fn)
    positive["weights"] = inputs["weights"].abs()
    if "cache" in inputs:
        cache = inputs["cache"]
        keys = cache.as_strided((len(cache), cache.shape[1] * 128), (cache.stride(0), 1))
        positive["cache"] = cache.clone()
        target = positive["cache"].as_strided(keys.shape, (positive["cache"].stride(0), 1))
        target.copy_(keys & 0x7F)
    return oracle(**positive)


def assert_scores(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Same -inf, no NaN, and the error within what the hardware's sums allow."""
    assert not got.isnan().any(), "an output element was not written"
    assert torch.equal(got == -math.inf, want == -math.inf)
    seen = want.isfinite()
    error = (got[seen] - want[seen]).norm()
    relative = (error / want[seen].norm().clamp_min(1e-30)).item()
    print(f"relative error {relative:.2e}")
    if got.is_cuda:
        assert error <= TENSOR_CORE * magnitude[seen].norm()
    else:
        assert relative <= INTERPRETER
