# SPDX-License-Identifier: Apache-2.0
"""Launch configuration of hc_head: that of hc_pre, whose rows and gates are the same."""

from vllm_sm12x.ops.hc_pre.config import CONFIGS, choose, warps

__all__ = ["CONFIGS", "choose", "warps"]
