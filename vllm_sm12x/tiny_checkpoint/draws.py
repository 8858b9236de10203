# SPDX-License-Identifier: Apache-2.0
"""Random tensors, drawn already in the format in which they are stored.

A quantised weight is not a float that was quantised: its bytes and its block scales are drawn
directly, so that what the checkpoint holds is what was intended, exactly.

The only source of randomness is the raw output of numpy's Philox bit generator, keyed by
(seed, tensor name). Bit generator streams are part of numpy's compatibility promise (NEP 19);
the streams of `Generator.normal` and of torch's generators are not.
"""

from functools import cache
from hashlib import blake2b
from math import floor, log2
from statistics import NormalDist

import numpy as np

_CHUNK = 1 << 20
_E8M0_BIAS = 127

# Squared mean of the 16 FP4 e2m1 values +-{0, .5, 1, 1.5, 2, 3, 4, 6}.
_E2M1_SECOND_MOMENT = 68.5 / 8
# Every block's exponent moves by -1, 0, 0 or +1, so that neighbouring scales differ.
_SPREAD_SECOND_MOMENT = (1 / 4 + 1 + 1 + 4) / 4


def raw_bytes(seed: int, name: str, count: int) -> np.ndarray:
    """`count` independent uniform uint8, a function of (seed, name) alone."""
    key = np.frombuffer(blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "<u8")
    words = np.random.Philox(key=key).random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def normal_f32(seed: int, name: str, count: int) -> np.ndarray:
    """`count` float32 from N(0, 1), on a grid of 65,536 equally likely values."""
    return _lookup(_normal_quantiles(1 << 16), raw_bytes(seed, name, 2 * count).view("<u2"))


def fp8_codes(seed: int, name: str, count: int) -> np.ndarray:
    """`count` e4m3 codes (uint8) whose values are normal with the largest one at 448."""
    return _lookup(_fp8_table(), raw_bytes(seed, name, count))


def fp8_scales(seed: int, name: str, count: int, *, std: float) -> np.ndarray:
    """`count` UE8M0 codes (uint8) that give `fp8_codes` the standard deviation `std`."""
    values = e4m3_values()[_fp8_table()]
    return _exponents(seed, name, count, std**2 / float(np.mean(values**2)))


def fp4_codes(seed: int, name: str, count: int) -> np.ndarray:
    """`count` bytes of two e2m1 codes each: every code is equally likely."""
    return raw_bytes(seed, name, count)


def fp4_scales(seed: int, name: str, count: int, *, std: float) -> np.ndarray:
    """`count` UE8M0 codes (uint8) that give `fp4_codes` the standard deviation `std`."""
    return _exponents(seed, name, count, std**2 / _E2M1_SECOND_MOMENT)


def distinct_experts(seed: int, name: str, rows: int, experts: int, top_k: int) -> np.ndarray:
    """int64 [rows, top_k]: in each row `top_k` different experts of `experts`, in random order."""
    keys = raw_bytes(seed, name, rows * experts * 2).view("<u2").reshape(rows, experts)
    return np.argsort(keys, axis=1, kind="stable")[:, :top_k].astype("<i8")


def permutation(seed: int, name: str, count: int) -> np.ndarray:
    """int64 [count]: 0 to count - 1 in random order."""
    keys = raw_bytes(seed, name, 8 * count).view("<u8")
    return np.argsort(keys, kind="stable")


def bf16_codes(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, ties to even; returns the codes as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def bf16_values(codes: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 codes (uint16)."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


@cache
def e4m3_values() -> np.ndarray:
    """The 256 values of float8 e4m3fn by code; codes 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)
    )
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -magnitude, magnitude)


@cache
def _normal_quantiles(count: int) -> np.ndarray:
    """The midpoints of `count` equally likely intervals of N(0, 1), as float32."""
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / count) for i in range(count // 2)]
    return np.array([-q for q in reversed(upper)] + upper, np.float32)


@cache
def _fp8_table() -> np.ndarray:
    """Uniform byte -> e4m3 code nearest to that byte's normal quantile, scaled to +-448."""
    quantiles = _normal_quantiles(256).astype(np.float64)
    values = e4m3_values()
    distance = np.abs(values[None, :] - (448 * quantiles / quantiles[-1])[:, None])
    return np.nanargmin(distance, axis=1).astype(np.uint8)


def _exponents(seed: int, name: str, count: int, second_moment: float) -> np.ndarray:
    """`count` UE8M0 codes b with E[4^(b - 127)] = `second_moment`.

    Powers of two alone cannot meet a given variance, so each exponent is one higher with the
    probability that makes up the rest.
    """
    target = second_moment / _SPREAD_SECOND_MOMENT
    base = floor(log2(target) / 2)
    higher = (target / 4.0**base - 1) / 3
    draw = raw_bytes(seed, name, 2 * count).view("<u2")
    spread = np.array([-1, 0, 0, 1])[draw & 3]
    exponent = base + spread + ((draw >> 2) < round(higher * (1 << 14)))
    return (exponent + _E8M0_BIAS).astype(np.uint8)


def _lookup(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`table[index]`, in chunks: numpy widens the index to 8 bytes an element."""
    out = np.empty(index.size, table.dtype)
    for start in range(0, index.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        np.take(table, index[part], out=out[part], mode="clip")
    return out
