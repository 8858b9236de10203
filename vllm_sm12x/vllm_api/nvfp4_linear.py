# SPDX-License-Identifier: Apache-2.0
"""How vLLM chooses the kernel of NVFP4 linear layers. Heavy to import: workers only."""

from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import (
    FlashInferCudnnNvFp4LinearKernel,
    FlashInferCutlassNvFp4LinearKernel,
)
from vllm.platforms.interface import PlatformEnum


def kernels() -> list[type]:
    """vLLM's own list, in the order in which a CUDA platform tries them."""
    possible: list[type] = linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]
    return possible


__all__ = ["FlashInferCudnnNvFp4LinearKernel", "FlashInferCutlassNvFp4LinearKernel", "kernels"]
