# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of fp8_einsum: a static table, chosen from shapes only (graph-safe)."""

from dataclasses import dataclass

SCALE_BLOCK = 128


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_T tokens by BLOCK_D columns of the output.

    Attributes:
        scales_first: a program loads all its scales before its loop (kernel.py).
    """

    block_t: int
    block_d: int
    num_warps: int
    num_stages: int
    scales_first: bool = False

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_d}"


@dataclass(frozen=True)
class LaunchPlan:
    """A configuration, and how the K steps are shared out."""

    config: LaunchConfig
    num_splits: int
    steps_per_split: int


# Largest first. All fit sm_120 / sm_121 (101,376 B shared memory, 255 registers) without spills
# (tests/compile). 128 x 128 fits sm_120, but spills on sm_121, where Triton up to 3.7 converts to
# fp16; 64 x 128 spills with 4 warps. A deep pipeline of a narrow tile keeps enough bytes in flight
# for DRAM. Measured on an H200, 8 groups, microseconds. T = 1: 16 x 32, 2 warps, 7 stages 11.5, 5
# stages 12.5, 4 warps 12.7; with the scales one step ahead 13.7 (4 warps, 5 stages); with R in 2
# to 4 parts 12.7 at best. T = 64: 64 x 32 14.8, with the scales one step ahead 15.8. T = 256:
# 64 x 128 27.8, with the scales first 35.5. T = 4096: 64 x 128 433 (128 x 128 391).
CONFIGS = (
    LaunchConfig(block_t=64, block_d=128, num_warps=8, num_stages=4),
    LaunchConfig(block_t=64, block_d=64, num_warps=4, num_stages=4),
    LaunchConfig(block_t=64, block_d=32, num_warps=4, num_stages=5, scales_first=True),
    LaunchConfig(block_t=32, block_d=64, num_warps=4, num_stages=4),
    LaunchConfig(block_t=32, block_d=32, num_warps=4, num_stages=5),
    LaunchConfig(block_t=16, block_d=64, num_warps=2, num_stages=5, scales_first=True),
    LaunchConfig(block_t=16, block_d=32, num_warps=2, num_stages=7, scales_first=True),
    LaunchConfig(block_t=16, block_d=16, num_warps=2, num_stages=7, scales_first=True),
)
# Up to this many tokens one row tile covers all, so that B is read from DRAM once.
ONE_ROW_TILE = 64
# K steps below which a split is only prologue of its pipeline.
MIN_STEPS = 4


def choose(tokens: int, groups: int, cols: int, steps: int, *, sms: int) -> LaunchPlan:
    """The largest tile whose grid gives every multiprocessor a program.

    If none does, the narrowest tile, with R split until the grid does: only when fewer than about
    200 tiles of 16 columns exist, as with one or two groups a rank (TP 4 or 8).
    """
    covering = max(16, 1 << (tokens - 1).bit_length())
    least = min(covering, ONE_ROW_TILE)
    fitting = [c for c in CONFIGS if least <= c.block_t <= covering]

    def programs(config: LaunchConfig) -> int:
        return groups * -(-tokens // config.block_t) * -(-cols // config.block_d)

    config = next((c for c in fitting if programs(c) >= sms), fitting[-1])
    splits = max(1, min(-(-sms // programs(config)), steps // MIN_STEPS))
    steps_per_split = -(-steps // splits)
    return LaunchPlan(config, -(-steps // steps_per_split), steps_per_split)
