# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of paged_mqa_topk: static, with a grid from shapes only (graph-safe)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile of BLOCK_N keys by as many query rows as give `columns` columns.

    Attributes:
        columns: rows times (padded) heads of one dot.
        num_stages: of Triton's pipeline, which loads a page's number, then its keys: 5 keep two
            tiles of keys in flight, 3 only one.
        chunk: keys between two selections: a power of two and a multiple of block_n.
    """

    columns: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk: int


# Two rows of 64 heads by one page of 64 keys on 4 warps: two programs run on an SM at a time, so
# that one's selection hides behind the other's dots. Four rows on 8 warps halve the reads of keys,
# but fill an SM alone. Measured on an H200, topk 512, 4096 rows x 32,768 keys, milliseconds: 1024
# keys a chunk 3.89, 512 4.03, 3 stages 4.47; 4 rows 4.05 (4 warps) and 5.06 (8 warps); 1 row 5.57;
# 128 keys on 8 warps 8.04.
TWO_ROWS = LaunchConfig(columns=128, block_n=64, num_warps=4, num_stages=5, chunk=1024)
TWO_ROWS_SHORT = LaunchConfig(columns=128, block_n=64, num_warps=4, num_stages=5, chunk=512)
FOUR_ROWS = LaunchConfig(columns=256, block_n=64, num_warps=8, num_stages=5, chunk=512)
# Longer lists spill the registers of 4 warps when they are cut.
TWO_ROWS_MAX_TOPK = 512
TWO_ROWS_SHORT_MAX_TOPK = 1024
# Fewer heads do not mean more rows: the running state of a row is kept in every thread.
MAX_BLOCK_M = 4
# Programs that run on a multiprocessor at a time. Splitting the keys further only adds merging:
# 512 rows x 32,768 keys took 0.50 ms in one part, 0.56 in 2, 0.61 in 4 (H200).
PROGRAMS_PER_SM = 2
# Registers that a thread may have: all that one of such two programs can. Left to choose, ptxas may
# spill to make room for a third program, for which there is no shared memory (Triton 3.7, sm_121).
MAX_REGISTERS = 255
# Keys, by the block table's width, that are worth a split's own list.
MIN_KEYS_PER_SPLIT = 2048
# Candidates of one row that a merge holds in registers.
MAX_MERGED = 8192
MERGE_WARPS = 8


def choose(topk: int, block_heads: int) -> LaunchConfig:
    """The configuration for selections of this size, with so many (padded) heads."""
    # With fewer heads a program has more rows, whose longer chunks spill.
    if topk <= TWO_ROWS_MAX_TOPK and block_heads * 2 >= TWO_ROWS.columns:
        return TWO_ROWS
    return TWO_ROWS_SHORT if topk <= TWO_ROWS_SHORT_MAX_TOPK else FOUR_ROWS


def capacity(topk: int, chunk: int) -> int:
    """Entries of a row's list, a power of two: topk, at least half as many more, and one chunk."""
    return 1 << (topk + topk // 2 + chunk - 1).bit_length()


def splits(row_tiles: int, keys: int, topk: int, *, sms: int) -> int:
    """Programs that share the keys of one tile of rows, a power of two.

    From shapes and the device only, never from lens: a captured CUDA graph stays right.
    """
    wanted = max(1, PROGRAMS_PER_SM * sms // row_tiles)
    most = min(keys // MIN_KEYS_PER_SPLIT, MAX_MERGED >> (topk - 1).bit_length())
    return min(1 << (wanted - 1).bit_length(), 1 << max(most, 1).bit_length() - 1)
