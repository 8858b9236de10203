# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of hc_post_prenorm_gemm: a static table, chosen from shapes only."""

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


# By what fits an SM as compiled for sm_120, not measured yet: 3 programs of MANY by registers, 2 of
# FEW by shared memory. 64 x 32 spills with 4 warps; with 8, two warps compute the same.
FEW = LaunchConfig(block_t=16, block_d=32, num_warps=4, num_stages=3, programs_per_sm=2)
MANY = LaunchConfig(block_t=64, block_d=16, num_warps=4, num_stages=3, programs_per_sm=3)
CONFIGS = (FEW, MANY)
# Columns of a split, at least: 32 of each of 4 streams are the 128 of K of hc_prenorm_gemm.
MIN_COLUMNS = 32
# Of a split, where the splits are the same for any number of tokens: 512 of K, as there.
INVARIANT_COLUMNS = 128


def choose(tokens: int, *, batch_invariant: bool = False) -> LaunchConfig:
    """The configuration for calls with this many tokens; `batch_invariant`: for any number."""
    return FEW if tokens <= FEW.block_t and not batch_invariant else MANY


def splits_of(tokens: int, width: int, *, sms: int, batch_invariant: bool = False) -> int:
    """Splits of the columns: as many as give each multiprocessor its programs, at least 1.

    `batch_invariant`: by the width alone.
    """
    if batch_invariant:
        return -(-width // INVARIANT_COLUMNS)
    config = choose(tokens)
    row_tiles = max(1, -(-tokens // config.block_t))
    return max(1, min(config.programs_per_sm * sms // row_tiles, width // MIN_COLUMNS))
