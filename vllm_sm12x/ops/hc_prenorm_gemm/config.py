# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of hc_prenorm_gemm: a static table, chosen from shapes only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_T tokens by BLOCK_K of the sum; all rows of fn."""

    block_t: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_k}"


# Largest first. With the model's 24 rows of fn both take at most 24,576 B of shared memory and 96
# registers, so that several programs share an SM (tests/compile); neither has been timed on a GPU.
# 64 x 64 issues as many instructions for a token as 32 x 64, and its registers let no second
# program onto an SM.
CONFIGS = (
    LaunchConfig(block_t=32, block_k=64, num_warps=4, num_stages=3),
    LaunchConfig(block_t=16, block_k=64, num_warps=4, num_stages=3),
)


def splits_of(tokens: int, depth: int, *, sms: int) -> int:
    """Splits of K: min(SMs / ceil(T / 64), ceil(K / 64) / 4), at least 1.

    The rule of vLLM's compute_num_split, which sizes the parts for DeepGEMM. With tiles of 32
    tokens it gives each multiprocessor up to two programs, with 4 K steps or more each.
    """
    return max(1, min(sms // max(1, -(-tokens // 64)), -(-depth // 64) // 4))


def choose(tokens: int, num_splits: int, *, sms: int) -> LaunchConfig:
    """The largest tile whose grid gives every multiprocessor a program, else the smallest."""
    covering = max(16, 1 << (tokens - 1).bit_length())
    fitting = [c for c in CONFIGS if c.block_t <= covering]
    filling = (c for c in fitting if -(-tokens // c.block_t) * num_splits >= sms)
    return next(filling, fitting[-1])
