# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of hc_prenorm_gemm: a static table, chosen from shapes only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_T tokens by BLOCK_K of the sum; all rows of fn.

    Attributes:
        in_terms: a kernel of its own splits fn into its bf16 terms first.
    """

    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    in_terms: bool

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_k}{'-terms' if self.in_terms else ''}"


# Measured on an H200, K = 16384, microseconds. T = 1: 128 x 16 3.3, 64 x 16 3.4 to 3.5 (splits
# 128). T = 64: 64 x 64 4.0. T = 4096: 64 x 64 with fn split beforehand 40.5 at 8 splits, 59.5 at
# vLLM's 2; no tile that splits fn in its loop was among the 8 fastest at 2 to 16 splits.
FEW = LaunchConfig(block_t=16, block_k=128, num_warps=4, num_stages=3, in_terms=False)
SOME = LaunchConfig(block_t=64, block_k=64, num_warps=4, num_stages=3, in_terms=False)
MANY = LaunchConfig(block_t=64, block_k=64, num_warps=4, num_stages=3, in_terms=True)
CONFIGS = (FEW, SOME, MANY)
# Tokens from which the kernel that splits fn pays for its launch.
MANY_TOKENS = 129
PROGRAMS_PER_SM = 4
# K steps of 64 below which a split is only prologue of its pipeline.
MIN_STEPS = 2


def choose(tokens: int) -> LaunchConfig:
    """The configuration for calls with this many tokens."""
    if tokens <= FEW.block_t:
        return FEW
    return SOME if tokens < MANY_TOKENS else MANY


def splits_of(tokens: int, depth: int, *, sms: int) -> int:
    """Splits of K: as many as give each multiprocessor PROGRAMS_PER_SM programs, at least 1."""
    row_tiles = max(1, -(-tokens // choose(tokens).block_t))
    return max(1, min(PROGRAMS_PER_SM * sms // row_tiles, -(-depth // 64) // MIN_STEPS))
