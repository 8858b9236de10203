# SPDX-License-Identifier: Apache-2.0
"""DeepGEMM as vLLM reaches it. Imports nothing of either until `wrappers` is asked for."""

import importlib.util
from pathlib import Path
from types import ModuleType


def wrappers() -> ModuleType:
    """`vllm.utils.deep_gemm`, whose functions load DeepGEMM when they are first called."""
    from vllm.utils import deep_gemm

    return deep_gemm


def package_folder() -> Path | None:
    """The DeepGEMM that vLLM would import: the installed `deep_gemm`, else vLLM's own copy.

    Found without importing it, because that would initialise CUDA and needs nvcc.
    """
    installed = _folder("deep_gemm")
    if installed is not None:
        return installed
    vllm = _folder("vllm")
    vendored = vllm and vllm / "third_party" / "deep_gemm"
    return vendored if vendored and (vendored / "__init__.py").is_file() else None


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
