# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of sparse_mla: a static table, chosen from shapes only (graph-safe)."""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM


class Kernel(Enum):
    """An attention kernel, by the module that it is in."""

    TRITON = "kernel"
    MMA = "mma"
    HOPPER = "hopper"


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_H heads by BLOCK_N candidates.

    Attributes:
        stages: of kernel.py's loop over unpacked rows; one less is the number of tiles in shared
            memory.
        kernel: those of mma.py and hopper.py have one tile each and stages of their own.
    """

    block_h: int
    block_n: int
    num_warps: int
    stages: int = 1
    kernel: Kernel = Kernel.TRITON


@dataclass(frozen=True)
class Pace:
    """Microseconds of one program: to start and to end, and for each tile in between."""

    ends: float
    tile: float

    def of(self, tiles: int) -> float:
        """Of a program with so many tiles."""
        return self.ends + tiles * self.tile


@dataclass(frozen=True)
class LaunchPolicy:
    """What a caller may steer; the defaults are those of the VLLM_TRITON_MLA_SPARSE_* settings.

    Attributes:
        head_block: head group of one program in units of a 16-head MMA tile (1, 2 or 4), of
            kernel.py's tiles; None: by shape.
        topk_chunk: candidates of one query that all its splits together process at one time;
            bounds the number of splits and with it the fp32 partial workspace.
        query_chunk: a launch without splits covers whole multiples of this many query tokens.
        batch_invariant: the plan, and with it a token's bits, do not depend on how many tokens
            there are.
        mma: whether mma.py's kernel may be chosen.
        wgmma: whether hopper.py's kernel may be chosen, on a GPU that has wgmma.
    """

    head_block: int | None = None
    topk_chunk: int = 512
    query_chunk: int = 256
    batch_invariant: bool = False
    mma: bool = True
    wgmma: bool = True


@dataclass(frozen=True)
class LaunchPlan:
    """A configuration, the number of splits of each query's candidates, and tokens a launch."""

    config: LaunchConfig
    num_splits: int
    tokens_per_launch: int


# Tiles that fit sm_120 / sm_121 (101,376 B shared memory, 255 registers) without spills when they
# read the packed rows directly. Measured ahead of time for both (tests/compile).
CONFIGS = {
    # 33 KiB (49 with unpacked rows): 2 programs on an SM.
    1: LaunchConfig(block_h=16, block_n=16, num_warps=4, stages=3),
    # 49 KiB: 2 programs, just.
    2: LaunchConfig(block_h=32, block_n=16, num_warps=4, stages=2),
    # 82 KiB (98): one dequantisation for 64 heads.
    4: LaunchConfig(block_h=64, block_n=16, num_warps=8, stages=3),
}
# For more heads than the tile of 32 has: 89 KiB, Q in registers.
MMA = LaunchConfig(block_h=64, block_n=16, num_warps=8, kernel=Kernel.MMA)
# The same on a GPU with wgmma.
HOPPER = LaunchConfig(block_h=64, block_n=64, num_warps=8, kernel=Kernel.HOPPER)
# Where each multiprocessor has one program, and where it has two at a time. Those of CONFIGS are
# fitted to an H200 that runs the code and has the shared memory of SM12x (benchmarks/README.md,
# "As SM12x would run it"), 16 to 128 heads, 1 to 512 tokens, 128 to 1,152 candidates: the plan is
# within 4 % of the best one measured. That of MMA is fitted to another one, 64 and 128 heads, up to
# 1,792 candidates: beside the others, whose plan it may leave, 4 % from the best at most. That of
# HOPPER is fitted natively to an H100, to the same shapes: 0.5 % from the best in the mean, 13 % at
# most.
PACES = {
    CONFIGS[1]: (Pace(4.5, 1.2), Pace(4.8, 2.0)),
    CONFIGS[2]: (Pace(4.9, 1.36), Pace(7.8, 2.06)),
    CONFIGS[4]: (Pace(9.0, 1.87),),
    MMA: (Pace(11.5, 1.06),),
    HOPPER: (Pace(6.0, 3.1),),
}
# The merge kernel, and what of it each MB of partial results takes.
MERGE_US = 2.5
MERGE_US_PER_MB = 0.1
# Bound of the partial results of a launch, which are fp32.
WORKSPACE_BYTES = 64 << 20
# Programs of a launch for each multiprocessor, after which a last, partly filled wave no longer
# matters: by calculation, 8,192 tokens of 64 heads take 44 waves on 188 multiprocessors, and with 8
# in a launch took 53.
WAVES_PER_LAUNCH = 128
# Splits where one plan serves one token and thousands, and the longest list that has none: more
# would write more fp32 than a prefill reads, fewer would leave one token more waiting.
INVARIANT_SPLITS = 4
INVARIANT_SHORT_LIST = 128
# A prefill of fewer tokens may want splits, and one that reads a row less often than this has no
# gain from unpacking it.
UNPACK_TOKENS = 256
UNPACK_REUSE = 4
# kernel.py's widest tile for unpacked rows.
UNPACKED_GROUP = 2
# Rows that one program unpacks.
UNPACK_BLOCK = 16


@lru_cache(maxsize=4096)
def choose(
    tokens: int,
    heads: int,
    candidates: int,
    *,
    sms: int,
    policy: LaunchPolicy,
    mma: bool = False,
    wgmma: bool = False,
) -> LaunchPlan:
    """Plan a launch for `tokens` queries of `heads` heads over at most `candidates` candidates.

    Depends on shapes and on the device only, never on lengths: a captured CUDA graph stays right
    when the lengths change.

    Args:
        sms: multiprocessors of the GPU.
        mma, wgmma: whether it runs mma.py's and hopper.py's kernel.
    """
    if policy.batch_invariant:
        return _invariant(heads, candidates, sms, policy, mma, wgmma)
    configs = _configs(heads, policy, mma, wgmma)
    _, place, splits = min(
        (_us(config, splits, tokens, heads, candidates, sms), place, splits)
        for place, config in enumerate(configs)
        for splits in _splits(config, tokens, heads, candidates, sms, policy)
    )
    config = configs[place]
    return LaunchPlan(config, splits, _tokens_per_launch(heads, config, sms, policy))


def unpacks(tokens: int, width: int, rows: int) -> bool:
    """Whether a prefill, `tokens` queries of `width` extra candidates, should unpack its `rows`."""
    return tokens >= UNPACK_TOKENS and tokens * width >= UNPACK_REUSE * rows > 0


def choose_unpacked(
    heads: int, *, sms: int, policy: LaunchPolicy, mma: bool = False, wgmma: bool = False
) -> LaunchPlan:
    """Plan a launch whose extra candidates are unpacked: without splits."""
    config = _configs(heads, policy, mma, wgmma)[-1]
    if config.kernel is Kernel.TRITON and not policy.head_block:
        config = CONFIGS[min(UNPACKED_GROUP, _groups(heads)[-1])]
    return LaunchPlan(config, 1, _tokens_per_launch(heads, config, sms, policy))


def _configs(heads: int, policy: LaunchPolicy, mma: bool, wgmma: bool) -> list[LaunchConfig]:
    """Tiles to consider, the widest last; of 64 heads, a Gluon kernel's where it may be taken."""
    if policy.head_block:
        return [CONFIGS[policy.head_block]]
    configs = [CONFIGS[group] for group in _groups(heads)]
    if configs[-1] is CONFIGS[4]:
        if wgmma and policy.wgmma:
            configs[-1] = HOPPER
        elif mma and policy.mma:
            configs[-1] = MMA
    return configs


def _splits(
    config: LaunchConfig, tokens: int, heads: int, candidates: int, sms: int, policy: LaunchPolicy
) -> list[int]:
    """Numbers of splits to consider: none, and those that fill the GPU a few times."""
    most = min(
        _cdiv(candidates, config.block_n),
        policy.topk_chunk // config.block_n,
        WORKSPACE_BYTES // _partial_bytes(tokens, heads),
    )
    fills = range(1, 2 * len(PACES[config]) + 2)
    programs = tokens * _cdiv(heads, config.block_h)
    return sorted({max(1, min(fill * sms // programs, most)) for fill in fills} | {1})


def _us(
    config: LaunchConfig, splits: int, tokens: int, heads: int, candidates: int, sms: int
) -> float:
    """What a plan takes: waves of programs of equal length, and the merge."""
    paces = PACES[config]
    tiles = _cdiv(_cdiv(candidates, config.block_n), splits)
    programs = tokens * _cdiv(heads, config.block_h) * splits
    # A first wave spreads over the multiprocessors; those after it fill one after the other.
    pace = paces[min(_cdiv(programs, sms), len(paces)) - 1]
    us = _cdiv(programs, len(paces) * sms) * pace.of(tiles)
    if splits > 1:
        us += MERGE_US + MERGE_US_PER_MB * splits * _partial_bytes(tokens, heads) / 1e6
    return us


def _partial_bytes(tokens: int, heads: int) -> int:
    """Of one split."""
    return tokens * heads * HEAD_DIM * 4


def _tokens_per_launch(heads: int, config: LaunchConfig, sms: int, policy: LaunchPolicy) -> int:
    blocks_per_chunk = policy.query_chunk * _cdiv(heads, config.block_h)
    return policy.query_chunk * _cdiv(WAVES_PER_LAUNCH * sms, blocks_per_chunk)


def _invariant(
    heads: int, candidates: int, sms: int, policy: LaunchPolicy, mma: bool, wgmma: bool
) -> LaunchPlan:
    """The plan for any number of tokens: the widest tile, and splits by the width of the lists.

    The kernel shares out a token's own candidates, so that only the number of splits matters to its
    sums, and not the launch that it is in.
    """
    config = _configs(heads, policy, mma, wgmma)[-1]
    if candidates <= INVARIANT_SHORT_LIST:
        return LaunchPlan(config, 1, _tokens_per_launch(heads, config, sms, policy))
    splits = max(1, min(INVARIANT_SPLITS, policy.topk_chunk // config.block_n))
    return LaunchPlan(config, splits, max(1, WORKSPACE_BYTES // _partial_bytes(splits, heads)))


def _groups(heads: int) -> list[int]:
    """Keys of CONFIGS whose tile is not more than twice as wide as there are heads."""
    return [g for g in CONFIGS if g == 1 or CONFIGS[g // 2].block_h < heads]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
