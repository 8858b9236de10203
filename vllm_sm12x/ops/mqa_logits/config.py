# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of mqa_logits: a static table, chosen from shapes only (graph-safe)."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_M query rows, one after the other, over BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# 128 keys by 64 heads on 4 warps: each warp has 32 keys and all heads, so the sum over heads needs
# no exchange between warps, and no warp repeats another's MMAs. The keys stay in registers for
# BLOCK_M rows; jasl/vllm-ds4-sm120-harness measured 128 keys, 4 warps and 64 rows best on an RTX
# PRO 6000, and 16 rows best up to 16K keys, where more programs count for more than reuse.
FEW_KEYS = LaunchConfig(block_m=16, block_n=128, num_warps=4, num_stages=2)
MANY_KEYS = LaunchConfig(block_m=64, block_n=128, num_warps=4, num_stages=2)
FEW_KEYS_LIMIT = 16_384
# More than 64 heads need a second dot, which 4 warps do not have the registers for.
NUM_WARPS_TWO_DOTS = 8
# Heads of one dot; more are summed in further dots, fewer are padded to a power of two from 16.
MAX_BLOCK_H = 64


def choose(keys: int, heads: int) -> LaunchConfig:
    """The configuration for calls with this many keys and heads."""
    config = FEW_KEYS if keys <= FEW_KEYS_LIMIT else MANY_KEYS
    return config if heads <= MAX_BLOCK_H else replace(config, num_warps=NUM_WARPS_TWO_DOTS)
