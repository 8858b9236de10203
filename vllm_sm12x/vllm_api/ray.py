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


def symbols() -> tuple[str, ...]:
    """What shows which Ray executor vLLM has: the variables that it reads."""
    # until: vllm>=0.33, whose Ray executor compiles no graph.
    if waits_for_compiled_graph():
        return ("vllm.envs.VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE",)
    return ("vllm.envs.VLLM_RAY_PER_WORKER_GPUS",)
