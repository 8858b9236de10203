# SPDX-License-Identifier: Apache-2.0
"""Launch configuration of hc_post_prenorm_gemm: one tile, splits from shapes only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_T tokens by BLOCK_D columns of all streams; all rows of fn.

    Attributes:
        programs_per_sm: programs for each multiprocessor, by which the columns are split.
    """

    block_t: int
    block_d: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_d}"


# Measured as SM12x would run it (benchmarks/README.md), d = 4096, microseconds, beside hc_post and
# hc_prenorm_gemm. On an H200, T = 1: 3.5, they 5.5; 16 x 16 with 256 splits 3.5, 32 x 32 5.1. On an
# H100, T = 64: 6.1, they 8.2, 64 x 16 7.7, 64 x 32 7.4; T = 128: 8.9, they 10.9, 16 x 16 8.6.
CONFIG = LaunchConfig(block_t=16, block_d=32, num_warps=4, num_stages=3, programs_per_sm=2)
# Up to which the one kernel is the faster. On an H200, T = 256: 13.8 with the best of six tiles,
# 64 x 32, they 14.1; T = 4096: 147.9 with the best, 64 x 16, they 142.8 (README.md).
MOST_TOKENS = 128
# Columns of a split, at least: 32 of each of 4 streams are the 128 of K of hc_prenorm_gemm.
MIN_COLUMNS = 32


def splits_of(tokens: int, width: int, *, sms: int) -> int:
    """Splits of the columns: as many as give each multiprocessor its programs, at least 1."""
    row_tiles = max(1, -(-tokens // CONFIG.block_t))
    return max(1, min(CONFIG.programs_per_sm * sms // row_tiles, width // MIN_COLUMNS))
