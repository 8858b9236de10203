# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of hc_pre: a static table, chosen from shapes only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled shape of the programs.

    Attributes:
        block_t: tokens that one program mixes.
        block_s: parts of a token's logits that a program takes at a time.
    """

    block_t: int
    block_s: int

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_s}"


# hc_prenorm_gemm makes the more parts the fewer tokens there are: 128 and more up to some 200
# tokens, some 10 at 4,096. Many parts go to a program a token, for latency. Where they are few,
# tokens are many and share a program: the Sinkhorn iterations of 16 tokens cost it at most twice
# the instructions of those of one, 16 cells a token on 256 threads.
CONFIGS = (
    LaunchConfig(block_t=16, block_s=8),
    LaunchConfig(block_t=4, block_s=32),
    LaunchConfig(block_t=1, block_s=64),
)


def choose(splits: int) -> LaunchConfig:
    """The first that takes this many parts in two steps, else the last."""
    return next((config for config in CONFIGS if splits <= 2 * config.block_s), CONFIGS[-1])


def warps(width: int) -> int:
    """Warps of a program: rows of up to 4,096 elements have 16 or fewer of each stream a thread."""
    return 8 if width <= 4096 else 16


def max_registers(hc: int, width: int) -> int | None:
    """Registers a thread to compile for: 64, two thirds of which hold the row, where it fits.

    Left alone, the assemblers that Triton 3.6 to 3.8 bring take some 80 in a few variants, to no
    use, and an SM has room for a quarter fewer threads. None leaves a larger row alone.
    """
    return 64 if hc <= 4 and width <= 8192 else None
