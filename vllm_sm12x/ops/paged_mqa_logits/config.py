# SPDX-License-Identifier: Apache-2.0
"""Launch configuration of paged_mqa_logits: static, with a grid from shapes only (graph-safe)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile of BLOCK_N keys by BLOCK_R query rows, and how many programs share an SM.

    Attributes:
        num_stages: the page number, the keys and the dot of a tile are stages of one pipeline.
        programs_per_sm: programs launched for each multiprocessor, all requests together.
    """

    block_r: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


# 64 keys are one page of the model's cache: its address is one scalar. With 64 heads a row a warp
# has 16 keys and all heads, so that the sum over heads stays in the warp. Measured on an H200 at 8
# requests of 131,072 keys, microseconds: 64 keys, 6 stages and 4 programs 31.7, 6 programs 30.6, 2
# stages 31.5, 128 keys 33 and more; at 32,768 keys 10.7, and 10.5 with 2 stages. 3 rows, 6 stages:
# 76.0 with 2 programs, 78.8 with 4. Four rows take 3 stages (79 to 86 there), because then two
# programs share the shared memory of an SM12x multiprocessor.
CONFIGS = {
    1: LaunchConfig(block_r=1, block_n=64, num_warps=4, num_stages=6, programs_per_sm=4),
    2: LaunchConfig(block_r=2, block_n=64, num_warps=4, num_stages=4, programs_per_sm=3),
    4: LaunchConfig(block_r=4, block_n=64, num_warps=4, num_stages=3, programs_per_sm=2),
}
# Columns of the dot, rows times heads: more need more registers than there are.
MAX_COLUMNS = 256
# Positions past the context that a program fills with one store instruction a thread and 16 bytes.
FILL_BLOCK = 512


def choose(next_n: int, block_heads: int) -> LaunchConfig:
    """The configuration for calls with this many query rows and (padded) heads a request."""
    rows = min(max(CONFIGS), 1 << (next_n - 1).bit_length(), MAX_COLUMNS // block_heads)
    return CONFIGS[rows]


def programs(config: LaunchConfig, requests: int, max_model_len: int, *, sms: int) -> int:
    """Programs that share one request's keys; each takes an equal, contiguous run of its tiles.

    Depends on shapes and the device only, never on context lengths, and is bounded by the GPU and
    not by `max_model_len`: a captured CUDA graph stays right and cheap when contexts are short.
    """
    tiles = -(-max_model_len // config.block_n)
    return max(1, min(config.programs_per_sm * sms // requests, tiles))
