# SPDX-License-Identifier: Apache-2.0
"""How vLLM chooses the backend of MXFP4 experts. Heavy to import: workers only."""

from typing import Any

from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle

# Each gives the backends to try, first to last, where no --moe-backend names one: for DeepSeek V4
# (whose activations vLLM would quantize), and for every other checkpoint.
PRIORITIES = ("_get_priority_backends", "_get_priority_backends_for_gpt_oss")
MARLIN = (oracle.Mxfp4MoeBackend.MARLIN, oracle.Mxfp4MoeBackend.BATCHED_MARLIN)
_ASKING = (oracle.select_deepseek_v4_mxfp4_moe_backend, oracle.select_mxfp4_moe_backend)


def priorities() -> list[list[Any]]:
    """What the two choices hear when they ask."""
    return [
        function.__globals__[name]() for function, name in zip(_ASKING, PRIORITIES, strict=True)
    ]


__all__ = ["MARLIN", "PRIORITIES", "oracle", "priorities"]
