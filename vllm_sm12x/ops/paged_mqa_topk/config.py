# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of paged_mqa_topk: static, with a grid from shapes only (graph-safe)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile of BLOCK_N keys by as many query rows as give `columns` columns.

    Attributes:
        columns: rows times (padded) heads of one dot.
        num_stages: the page, its address and its keys are in flight together, so two tiles of
            keys need 5.
        chunk: keys between two selections: a power of two and a multiple of block_n.
    """

    columns: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk: int


# Chosen from what the compiler makes of them (README), not timed. Two rows of 64 heads by one page
# of 64 keys on 4 warps: two programs run on an SM at a time, so that one's selection hides behind
# the other's dots. Four rows on 8 warps halve the reads of keys, but fill an SM alone. Other tiles
# that fit: (128, 128, 8, 5, 512), (128, 64, 4, 5, 1024), (64, 64, 4, 5, 512).
TWO_ROWS = LaunchConfig(columns=128, block_n=64, num_warps=4, num_stages=5, chunk=512)
FOUR_ROWS = LaunchConfig(columns=256, block_n=64, num_warps=8, num_stages=5, chunk=512)
# Longer lists spill the registers of 4 warps when they are cut.
TWO_ROWS_MAX_TOPK = 1024
# Fewer heads do not mean more rows: the running state of a row is kept in every thread.
MAX_BLOCK_M = 4
# Programs launched for each multiprocessor at least, where the keys can be split: two waves of two.
PROGRAMS_PER_SM = 4
# Keys, by the block table's width, that are worth a split's own list.
MIN_KEYS_PER_SPLIT = 2048
# Candidates of one row that a merge holds in registers.
MAX_MERGED = 8192
MERGE_WARPS = 8


def choose(topk: int) -> LaunchConfig:
    """The configuration for selections of this size."""
    return TWO_ROWS if topk <= TWO_ROWS_MAX_TOPK else FOUR_ROWS


def capacity(topk: int, chunk: int) -> int:
    """Entries of a row's list, a power of two: topk, at least half as many more, and one chunk."""
    return 1 << (topk + topk // 2 + chunk - 1).bit_length()


def splits(row_tiles: int, keys: int, topk: int, *, sms: int) -> int:
    """Programs that share the keys of one tile of rows, a power of two.

    From shapes and the device only, never from lens: a captured CUDA graph stays right.
    """
    wanted = -(-PROGRAMS_PER_SM * sms // row_tiles)
    most = min(keys // MIN_KEYS_PER_SPLIT, MAX_MERGED >> (topk - 1).bit_length())
    return min(1 << (wanted - 1).bit_length(), 1 << max(most, 1).bit_length() - 1)
