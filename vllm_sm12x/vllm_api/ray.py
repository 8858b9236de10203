# SPDX-License-Identifier: Apache-2.0
"""vLLM's Ray executor, looked at without importing it."""

import importlib.util
from pathlib import Path

GET_TIMEOUT = "RAY_CGRAPH_get_timeout"
_EXECUTOR = "v1/executor/ray_executor.py"


def waits_for_compiled_graph() -> bool:
    """Whether vLLM has the Ray executor that gives RAY_CGRAPH_get_timeout a default."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).parent / _EXECUTOR
    return source.is_file() and f'setdefault("{GET_TIMEOUT}"' in source.read_text(encoding="utf-8")
