# SPDX-License-Identifier: Apache-2.0
"""How the V1 model runner warms a batch up before it captures it. Heavy to import: workers only."""

import contextlib
from types import SimpleNamespace
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

WARMUP_AND_CAPTURE = "_warmup_and_capture"


class _Seen(Exception):
    """The first dummy run has been asked for; nothing more needs to happen."""


def warms_up_as_it_captures() -> bool:
    """Whether the runner's FULL-graph warm-up asks for the metadata of a capture.

    Asks vLLM's own method, with a runner that notes the first dummy run and ends there.
    """
    asked: list[dict[str, Any]] = []

    def dummy_run(*args: Any, **kwargs: Any) -> None:
        asked.append(kwargs)
        raise _Seen

    runner = SimpleNamespace(
        _dummy_run=dummy_run, compilation_config=SimpleNamespace(cudagraph_num_of_warmups=1)
    )
    batch = SimpleNamespace(num_tokens=2, uniform=True, num_active_loras=0)
    with contextlib.suppress(_Seen):
        getattr(GPUModelRunner, WARMUP_AND_CAPTURE)(runner, batch, CUDAGraphMode.FULL)
    return bool(asked and asked[0].get("is_graph_capturing"))


__all__ = ["WARMUP_AND_CAPTURE", "CUDAGraphMode", "GPUModelRunner", "warms_up_as_it_captures"]
