# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of hc_prenorm_gemm: a static table, chosen from shapes only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_T tokens by BLOCK_K of the sum; all rows of fn.

    Attributes:
        programs_per_sm: programs for each multiprocessor, by which K is split.
    """

    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_k}"


# Measured as SM12x would run it (benchmarks/README.md) on an H200, K = 16384, microseconds. T = 64:
# SOME 5.3. T = 256: MANY 8.4, SOME 10.1. T = 1024: MANY 21.2, MOST 23.6, SOME 28.8. T = 4096: MANY
# 71.6, MOST 71.5, SOME 101.1; 64 x 64 with fn's terms made by a kernel of their own, as before,
# 112.0. On an H100 T = 4096 took 78.4 with MANY and 72.0 with MOST, natively 75.5 and 56.6.
FEW = LaunchConfig(block_t=16, block_k=128, num_warps=4, num_stages=3, programs_per_sm=4)
SOME = LaunchConfig(block_t=64, block_k=64, num_warps=4, num_stages=3, programs_per_sm=4)
MANY = LaunchConfig(block_t=128, block_k=32, num_warps=4, num_stages=4, programs_per_sm=2)
MOST = LaunchConfig(block_t=128, block_k=64, num_warps=4, num_stages=3, programs_per_sm=2)
CONFIGS = (FEW, SOME, MANY, MOST)
# From two tiles of SOME on, and from eight of MANY.
MANY_TOKENS = 129
MOST_TOKENS = 1025
# K steps of 64 below which a split is only prologue of its pipeline.
MIN_STEPS = 2
# Of a split, where the splits are the same for any number of tokens: some more would be quicker for
# one token, and for thousands write and read again as many more parts.
INVARIANT_STEPS = 8


def choose(tokens: int, *, batch_invariant: bool = False) -> LaunchConfig:
    """The configuration for calls with this many tokens; `batch_invariant`: for any number."""
    if batch_invariant:
        return SOME
    if tokens <= FEW.block_t:
        return FEW
    if tokens < MANY_TOKENS:
        return SOME
    return MANY if tokens < MOST_TOKENS else MOST


def splits_of(tokens: int, depth: int, *, sms: int, batch_invariant: bool = False) -> int:
    """Splits of K: as many as give each multiprocessor its programs, at least 1.

    `batch_invariant`: by K alone.
    """
    steps = -(-depth // 64)
    if batch_invariant:
        return -(-steps // INVARIANT_STEPS)
    config = choose(tokens)
    row_tiles = max(1, -(-tokens // config.block_t))
    return max(1, min(config.programs_per_sm * sms // row_tiles, steps // MIN_STEPS))
