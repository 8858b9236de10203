# SPDX-License-Identifier: Apache-2.0
"""The configurations that `vllm-sm12x tune` tries for one M of a weight shape."""

import itertools
import random

from vllm_sm12x.integration.fp8_config_files import Config

# The values of benchmark_w8a8_block_fp8.py in vLLM's repository, without 256 rows, which no file
# has that vLLM ships for GPUs with 100 KiB of shared memory (L20, L40S).
ROWS = (16, 32, 64, 128)
COLUMNS = (32, 64, 128, 256)
DEPTHS = (64, 128)
GROUPS = (1, 16, 32, 64)
WARPS = (4, 8)
STAGES = (2, 3, 4, 5)


def candidates(m: int, block: tuple[int, int], shared_memory: int) -> tuple[list[Config], int]:
    """What to try for `m` rows, in an order that mixes all sizes, and how many cannot fit.

    GROUP_SIZE_M, the order of the tiles, is the same in all of them: `regrouped` varies it. Left
    out are tiles with room for twice the rows, and tiles of less than a quarter of them. What
    cannot fit needs more than `shared_memory` bytes for operands on their way alone: stages - 1
    tiles of x and of the weight, a byte for each element.
    """
    found, too_large = [], 0
    for rows, columns, depth, warps, stages in itertools.product(
        ROWS, COLUMNS, DEPTHS, WARPS, STAGES
    ):
        too_many_rows = rows > ROWS[0] and rows >= 2 * m
        too_few_rows = rows * 4 < min(m, ROWS[-1])
        if too_many_rows or too_few_rows or block[1] % depth:
            continue
        if (stages - 1) * (rows + columns) * depth > shared_memory:
            too_large += 1
            continue
        found.append(
            {
                "BLOCK_SIZE_M": rows,
                "BLOCK_SIZE_N": columns,
                "BLOCK_SIZE_K": depth,
                "GROUP_SIZE_M": GROUPS[0] if m <= rows else GROUPS[1],
                "num_warps": warps,
                "num_stages": stages,
            }
        )
    random.Random(0).shuffle(found)
    return found, too_large


def regrouped(config: Config, m: int) -> list[Config]:
    """`config` with the other orders of its tiles; none where one tile has all `m` rows."""
    if m <= config["BLOCK_SIZE_M"]:
        return []
    return [
        {**config, "GROUP_SIZE_M": group} for group in GROUPS if group != config["GROUP_SIZE_M"]
    ]
