# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of hc_post: a static table, chosen from shapes only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_D columns of all streams of a token."""

    block_d: int
    num_warps: int

    def __str__(self) -> str:
        return str(self.block_d)


# 8 elements of each stream a thread, one 16-byte load. Few tokens take one warp a program, for more
# multiprocessors at work.
CONFIGS = (
    LaunchConfig(block_d=1024, num_warps=4),
    LaunchConfig(block_d=256, num_warps=1),
)


def choose(tokens: int, width: int, *, sms: int) -> LaunchConfig:
    """The largest tile whose grid gives every multiprocessor a program, else the smallest."""
    filling = (c for c in CONFIGS if tokens * -(-width // c.block_d) >= sms)
    return next(filling, CONFIGS[-1])
