# SPDX-License-Identifier: Apache-2.0
"""vLLM's compilation modes. Not importable while vLLM resolves its platform."""

from vllm.config.compilation import CompilationMode, CUDAGraphMode

__all__ = ["CUDAGraphMode", "CompilationMode"]
