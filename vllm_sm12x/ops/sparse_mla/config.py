# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of sparse_mla: a static table, chosen from shapes only (graph-safe)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_H heads by BLOCK_N candidates."""

    block_h: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class LaunchPolicy:
    """What a caller may steer; the defaults are those of the VLLM_TRITON_MLA_SPARSE_* settings.

    Attributes:
        head_block: head group of one program in units of a 16-head MMA tile (1, 2 or 4);
            None: by shape.
        topk_chunk: candidates of one query that all its splits together process at one time;
            bounds the number of splits and with it the fp32 partial workspace.
        query_chunk: a launch without splits covers whole multiples of this many query tokens.
    """

    head_block: int | None = None
    topk_chunk: int = 512
    query_chunk: int = 256


@dataclass(frozen=True)
class LaunchPlan:
    """A configuration, the number of splits of each query's candidates, and tokens a launch."""

    config: LaunchConfig
    num_splits: int
    tokens_per_launch: int


# Tiles that fit sm_120 / sm_121 (101,376 B shared memory, 255 registers) without spills when they
# read the packed rows directly. Measured ahead of time for both (tests/compile).
CONFIGS = {
    1: LaunchConfig(block_h=16, block_n=16, num_warps=4),  # 33 KiB: 2 programs on an SM
    2: LaunchConfig(block_h=32, block_n=32, num_warps=8),  # 66 KiB
    4: LaunchConfig(block_h=64, block_n=16, num_warps=8),  # 82 KiB: one dequantisation, 64 heads
}
# Waves of the grid after which the last, partly filled one no longer matters.
WAVES_PER_LAUNCH = 8
# A candidate list of at most this length leaves nothing to gain from the widest tile.
SHORT_LIST = 128


def choose(
    tokens: int, heads: int, candidates: int, *, sms: int, policy: LaunchPolicy
) -> LaunchPlan:
    """Plan a launch for `tokens` queries of `heads` heads over at most `candidates` candidates.

    Depends on shapes and on the device only, never on lengths: a captured CUDA graph stays right
    when the lengths change.
    """
    config = CONFIGS[policy.head_block or _head_block(tokens, heads, candidates, sms)]
    programs = tokens * _cdiv(heads, config.block_h)
    tiles = _cdiv(candidates, config.block_n)
    splits = max(1, min(sms // programs, tiles, policy.topk_chunk // config.block_n))
    blocks_per_chunk = policy.query_chunk * _cdiv(heads, config.block_h)
    chunks = _cdiv(WAVES_PER_LAUNCH * sms, blocks_per_chunk)
    return LaunchPlan(config, splits, policy.query_chunk * chunks)


def _head_block(tokens: int, heads: int, candidates: int, sms: int) -> int:
    """Small while the grid has room, as a small tile has less latency; 64 heads for throughput.

    H100, 64 heads, code for mma.sync (benchmarks/README.md, "As SM12x would run it"), us with 16,
    32 and 64 heads a program: 640 candidates, T=1 13.4 / 16.3 / 17.2, T=4 16.2 / 18.0 / 20.6, T=16
    32.5 / 35.2 / 34.5, T=64 86.9 / 71.6 / 61.8, T=512 624 / 526 / 344; 128 candidates, T=64
    20.2 / 17.1 / 30.6. At T=16 and 1,152 candidates 16 heads took 52 on an H200, where 64 took 46
    with an older and slower tile.
    """
    groups = [g for g in CONFIGS if g == 1 or CONFIGS[g // 2].block_h < heads]
    room = sms if candidates <= SHORT_LIST else sms // 4
    if tokens * _cdiv(heads, CONFIGS[1].block_h) <= room:
        return groups[0]
    if candidates <= SHORT_LIST:
        fitting = (g for g in groups if tokens * _cdiv(heads, CONFIGS[g].block_h) <= sms)
        return next(fitting, groups[-1])
    return groups[-1]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
