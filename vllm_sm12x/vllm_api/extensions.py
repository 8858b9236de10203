# SPDX-License-Identifier: Apache-2.0
"""vLLM's compiled extensions, as files. Imports no vLLM."""

import importlib.util
from pathlib import Path


def moe_extension() -> Path | None:
    """The one with Marlin's kernels for experts, None where it was not built."""
    return _one("_moe_C*.so")


def top_k_extension() -> Path | None:
    """The one with `persistent_topk`, None where it was not built."""
    return _one("_C_stable_libtorch*.so")


def _one(pattern: str) -> Path | None:
    spec = importlib.util.find_spec("vllm")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    return next(iter(sorted(folder.glob(pattern))), None)
