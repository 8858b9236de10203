# SPDX-License-Identifier: Apache-2.0
"""vLLM's compilation modes. Not importable while vLLM resolves its platform."""

from typing import Any

from vllm.config.compilation import CompilationMode, CUDAGraphMode


def splits_tokens_among_ranks(compilation_config: Any) -> bool:
    """Whether batches must be multiples of the tensor-parallel size."""
    # until: vllm>=0.32, which has no sequence parallelism of this kind.
    return bool(getattr(compilation_config.pass_config, "enable_sp", False))


__all__ = ["CUDAGraphMode", "CompilationMode", "splits_tokens_among_ranks"]
