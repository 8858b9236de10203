# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA platform, and the platform in force. Imports on a host with an NVIDIA GPU."""

from vllm import platforms
from vllm.platforms.cuda import CudaPlatform
from vllm.platforms.interface import Platform
from vllm.utils.import_utils import resolve_obj_by_qualname as resolve_class


def current_platform_class() -> type[Platform]:
    """The class of `vllm.platforms.current_platform`, which vLLM resolves on first use."""
    return type(platforms.current_platform)


__all__ = ["CudaPlatform", "current_platform_class", "resolve_class"]
