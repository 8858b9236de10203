# SPDX-License-Identifier: Apache-2.0
"""Launch configuration of paged_mqa_logits: static, with a grid from shapes only (graph-safe)."""

from dataclasses import dataclass, replace

from vllm_sm12x.ops.mqa_logits.config import MAX_BLOCK_H


@dataclass(frozen=True)
class LaunchConfig:
    """One compiled tile of BLOCK_N keys, and how many programs share a request."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


# 128 keys by 64 heads on 4 warps: each warp has 32 keys and all heads, so the sum over heads needs
# no exchange between warps, and no warp repeats another's MMAs. 128 keys are two pages of 64. At
# 172 to 238 registers a thread (tests/compile) 2 programs run on an SM at a time, so 2 are
# launched: one wave. Each has 16 KiB of keys in flight, 6 MiB on 188 SMs. Chosen ahead of time,
# not timed.
CONFIG = LaunchConfig(block_n=128, num_warps=4, num_stages=2, programs_per_sm=2)
# More than 64 heads need a second dot, which 4 warps do not have the registers for.
TWO_DOTS = replace(CONFIG, num_warps=8)
# Positions past the context that a program fills with one store instruction a thread and 16 bytes.
FILL_BLOCK = 512


def choose(heads: int) -> LaunchConfig:
    """The configuration for calls with this many heads."""
    return CONFIG if heads <= MAX_BLOCK_H else TWO_DOTS


def programs(requests: int, max_model_len: int, *, sms: int) -> int:
    """Programs that share one request; each takes an equal, contiguous run of its tiles.

    Depends on shapes and the device only, never on context lengths, and is bounded by the GPU and
    not by `max_model_len`: a captured CUDA graph stays right and cheap when contexts are short.
    """
    tiles = -(-max_model_len // CONFIG.block_n)
    return max(1, min(CONFIG.programs_per_sm * sms // requests, tiles))
