# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of fp8_einsum: a static table, chosen from shapes only (graph-safe)."""

from dataclasses import dataclass

SCALE_BLOCK = 128


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile: BLOCK_T tokens by BLOCK_D columns of the output.

    Attributes:
        scales_first: a program loads all its scales before its loop (kernel.py).
        hopper: hopper.py's kernel, of wgmma and TMA, which does not split R.
    """

    block_t: int
    block_d: int
    num_warps: int
    num_stages: int
    scales_first: bool = False
    hopper: bool = False

    def __str__(self) -> str:
        return f"{self.block_t}x{self.block_d}{' wgmma' if self.hopper else ''}"


@dataclass(frozen=True)
class LaunchPlan:
    """A configuration, and how the K steps are shared out."""

    config: LaunchConfig
    num_splits: int
    steps_per_split: int


# All fit sm_120 / sm_121 (101,376 B shared memory, 255 registers) without spills, and but for the
# widest at least twice on a multiprocessor (tests/compile). Microseconds on an H100, 8 / 4 / 2
# groups, as SM12x would run it (benchmarks/README.md). T = 1: 16 x 32 15.7 / 12.0 / 7.9 with 1, 2
# and 4 splits, without 15.7 / 13.0 / -; 16 x 16 for 4 groups 20.0. T = 32: 32 x 64 19.7 / 12.5 /
# 8.8, 32 x 32 with 5 stages 19.2 / 13.7 / 8.7. T = 64: 64 x 64 25.1 / 16.7 / 11.8, 64 x 32 26.5 /
# 20.7 / 15.0. Where MMAs bound it that run says little, since Hopper emulates FP8 `mma.sync` with
# FP16 ones and conversions: T = 4096 took 1007 with 64 x 64 and 1161 with 64 x 128. Natively, by
# wgmma, 483 and 450, and 64 x 64 reads a third more from L2: hence the widest for many tokens.
# Natively 64 x 128 with 4 warps takes 357 and 128 x 64 410, which spill where Triton converts.
CONFIGS = (
    LaunchConfig(block_t=16, block_d=32, num_warps=2, num_stages=7, scales_first=True),
    LaunchConfig(block_t=32, block_d=64, num_warps=4, num_stages=4, scales_first=True),
    LaunchConfig(block_t=64, block_d=64, num_warps=4, num_stages=3),
    LaunchConfig(block_t=64, block_d=128, num_warps=8, num_stages=4),
)
SOME, MANY = CONFIGS[2:]
# For any number of tokens; B is read once for 64 tokens, as it is without.
INVARIANT = SOME
PROGRAMS_PER_SM = 2
# For many tokens natively on Hopper: three programs on a multiprocessor. T = 4096 with 8 groups on
# an H200, one run, us: this one 273, with 4 stages and two programs 295, 128 x 64 with 3 stages
# 311, 128 x 128 with 8 warps 318, MANY 353.
HOPPER = LaunchConfig(block_t=64, block_d=128, num_warps=4, num_stages=3, hopper=True)
# HOPPER serves where it has more programs for each multiprocessor than this: as MANY. With 1.9 it
# would save 4 us of 26, and a call takes some 10 us more on the host.
HOPPER_PROGRAMS_PER_SM = 2
# Row tiles of HOPPER that run next to each other: 4,096 tokens, of which A takes 16 MiB of L2.
HOPPER_BAND = 64
# Parts of R, fp32, that are written and read again.
MAX_SPLITS = 4
# K steps below which a split is only prologue of its pipeline.
MIN_STEPS = 4


def choose(
    tokens: int,
    groups: int,
    cols: int,
    steps: int,
    *,
    sms: int,
    batch_invariant: bool = False,
    hopper: bool = False,
) -> LaunchPlan:
    """The tile that covers the tokens, with R split until the GPU has its programs.

    Args:
        batch_invariant: INVARIANT without splits: a token's bits do not depend on `tokens`.
        hopper: hopper.py's kernel runs on this GPU and with this layout; taken for many tokens.
    """
    if batch_invariant:
        return LaunchPlan(INVARIANT, 1, steps)

    def programs(config: LaunchConfig) -> int:
        return groups * -(-tokens // config.block_t) * -(-cols // config.block_d)

    if hopper and programs(HOPPER) > HOPPER_PROGRAMS_PER_SM * sms:
        return LaunchPlan(HOPPER, 1, steps)
    config = next((c for c in CONFIGS[:2] if tokens <= c.block_t), SOME)
    if programs(MANY) > PROGRAMS_PER_SM * sms:
        config = MANY
    most = min(MAX_SPLITS, steps // MIN_STEPS)
    splits = max(1, min(PROGRAMS_PER_SM * sms // programs(config), most))
    steps_per_split = -(-steps // splits)
    return LaunchPlan(config, -(-steps // steps_per_split), steps_per_split)
